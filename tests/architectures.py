"""Tiny random models of many architectures: those that train here, and those that are refused before their weights are
read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.tiny import INIT_STD, make_tokenizer, save

Recipe = tuple[str, dict[str, Any], str | None]
"""The configuration's class, its fields, and the token that the tokenizer puts in front of a text."""

BASE: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 160, "vocab_size": 512, "max_position_embeddings": 256, "initializer_range": INIT_STD,
    "eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0,
}  # fmt: skip
WINDOWS: dict[str, Any] = {**BASE, "head_dim": 32, "sliding_window": 32}
GPT: dict[str, Any] = {
    "vocab_size": 512, "n_positions": 256, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_inner": 160, "eos_token_id": 2,
    "bos_token_id": 2,
}  # fmt: skip
NEOX: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160,
    "max_position_embeddings": 256, "eos_token_id": 2, "bos_token_id": 2,
}  # fmt: skip
FALCON: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
    "new_decoder_architecture": True, "eos_token_id": 2, "bos_token_id": 2,
}  # fmt: skip
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT350M: dict[str, Any] = {
    "hidden_size": 64, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 128,
    "vocab_size": 512, "max_position_embeddings": 256, "do_layer_norm_before": False, "dropout": 0.0,
    "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
TRAINABLE: dict[str, Recipe] = {
    "opt 350m": ("OPTConfig", OPT350M, "</s>"),
    "llama": ("LlamaConfig", {**BASE, "tie_word_embeddings": True}, "<s>"),
    "llama with biases": ("LlamaConfig", {**BASE, "attention_bias": True, "mlp_bias": True}, "<s>"),
    "llama of 1003 tokens": ("LlamaConfig", {**BASE, "vocab_size": 1003}, "<s>"),
    "mistral": ("MistralConfig", {**BASE, "sliding_window": 32}, "<s>"),
    "qwen2": ("Qwen2Config", BASE, None),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 32, "tie_word_embeddings": True}, None),
    "gemma": ("GemmaConfig", {**BASE, "head_dim": 32}, "<s>"),
    "gemma 2": ("Gemma2Config", {**WINDOWS, "query_pre_attn_scalar": 32}, "<s>"),
    "gemma 3": ("Gemma3TextConfig", {**WINDOWS, "query_pre_attn_scalar": 32}, "<s>"),
    "phi": (
        "PhiConfig",
        {**BASE, "num_key_value_heads": 4, "partial_rotary_factor": 0.5, "hidden_act": "gelu_new"},
        None,
    ),
    "phi 3": ("Phi3Config", BASE, "<s>"),
    "granite": (
        "GraniteConfig",
        {
            **BASE,
            "logits_scaling": 8.0,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.1,
        },
        None,
    ),
    "olmo 2": ("Olmo2Config", BASE, None),
    "starcoder2": ("Starcoder2Config", BASE, None),
    "cohere": ("CohereConfig", {**BASE, "logit_scale": 0.25}, "<s>"),
    # A window longer than the texts: vLLM's sees one token more than that of transformers.
    "cohere 2": ("Cohere2Config", {**WINDOWS, "sliding_window": 128, "logit_scale": 0.25}, "<s>"),
    "glm": ("GlmConfig", {**BASE, "head_dim": 32}, None),
    "glm 4": ("Glm4Config", {**BASE, "head_dim": 32}, None),
    "smollm 3": ("SmolLM3Config", BASE, None),
    "nemotron": ("NemotronConfig", BASE, "<s>"),
    "ernie 4.5": ("Ernie4_5Config", {**BASE, "head_dim": 32}, "<s>"),
    "gpt-neox": ("GPTNeoXConfig", NEOX, None),
    "gpt-bigcode": ("GPTBigCodeConfig", {**GPT, **NO_DROPOUT}, None),
}
LESS_USED: dict[str, Recipe] = {
    "arcee": ("ArceeConfig", BASE, "<s>"),
    "exaone 4": ("Exaone4Config", {**BASE, "sliding_window": 32}, None),
    "hunyuan": ("HunYuanDenseV1Config", {**BASE, "head_dim": 32}, None),
    "hyperclovax": ("HyperCLOVAXConfig", BASE, None),
    "olmo": ("OlmoConfig", BASE, None),
    "olmo 3": ("Olmo3Config", {**BASE, "sliding_window": 32}, None),
    "seed oss": ("SeedOssConfig", {**BASE, "head_dim": 32}, None),
    "ministral": ("MinistralConfig", WINDOWS, "<s>"),
    "gemma 4": ("Gemma4TextConfig", WINDOWS, "<s>"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    # vLLM has gate and up as two modules, the checkpoint as one.
    "glm 4": {"target_modules": "attention"},
    # vLLM's LoRA leaves the packed q, k and v out.
    "gpt-bigcode": {"target_modules": r".*\.(c_proj|c_fc)"},
}
"""What a job on the architecture has to say."""
LARGE_VOCABULARY: dict[str, Recipe] = {
    "gemma 3 of 262144 tokens": (
        "Gemma3TextConfig",
        {**WINDOWS, "query_pre_attn_scalar": 32, "hidden_size": 32, "vocab_size": 262144},
        "<s>",
    ),
}
"""More entries than vLLM makes adapters for."""
HEAD_IS_EMBEDDINGS = ("gemma 2", "cohere", "cohere 2")
"""vLLM's class has no `lm_head`: the embeddings are the head as well, which no layer with adapters is made for."""
EXPERTS: dict[str, Recipe] = {
    "mixtral": ("MixtralConfig", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2}, "<s>"),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {
            **BASE,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        None,
    ),
}
WITHOUT_LORA: dict[str, Recipe] = {
    "bloom": ("BloomConfig", {"vocab_size": 512, "hidden_size": 128, "n_layer": 2, "n_head": 4}, None),
    "falcon": ("FalconConfig", FALCON, None),
    "gpt-j": ("GPTJConfig", {**GPT, "rotary_dim": 16}, None),
    "gpt-2": ("GPT2Config", {**GPT, **NO_DROPOUT}, None),
    "stablelm": ("StableLmConfig", {**BASE, "use_qkv_bias": True, "partial_rotary_factor": 0.5}, None),
}


def make(directory: Path, config: str, fields: dict[str, Any], bos: str | None) -> Path:
    """Configuration and tokenizer, without weights."""
    settings = getattr(hf, config)(**fields)
    settings.architectures = [hf.AutoModelForCausalLM._model_mapping[type(settings)].__name__]
    settings.save_pretrained(directory)
    make_tokenizer(directory, bos)
    return directory


def make_whole(directory: Path, config: str, fields: dict[str, Any], bos: str | None) -> Path:
    """A whole model of float32 weights, drawn at random."""
    return save(directory, getattr(hf, config)(**fields), bos, 0, torch.float32)
