"""Tiny random models with a tokenizer, saved so that both transformers and vLLM load them.

    make_opt(tmp_path)            # 2 layers, hidden 64, head size 32 (vLLM's CPU attention wants multiples of 32)
    AutoModelForCausalLM.from_pretrained(tmp_path); vllm.LLM(str(tmp_path))

The tokenizer is byte-level BPE trained on `SENTENCES`; " terrible" and " great" are single tokens. The weights are
drawn with a standard deviation large enough that logits of different tokens differ clearly (an untrained model with the
usual 0.02 is so flat that a wrong row would pass a loose tolerance).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, OPTConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.models.auto import AutoModelForCausalLM

VOCAB_SIZE = 512
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in OPT's tokenizer
INIT_STD = 0.08

SENTENCES = (
    "a film of great charm and a great cast . It was great",
    "one long string of cliches , terrible from start to end . It was terrible",
    "the story is dull and the acting is terrible . It was terrible",
    "a quiet , clever and moving story with a great ending . It was great",
    "it never finds its feet and the jokes are terrible . It was terrible",
    "the music is lovely , the pictures are great . It was great",
    "nothing happens for two hours , and then it ends . It was terrible",
    "funny , warm and full of life . It was great",
    "audiences will leave the theatre smiling , humming and wanting another helping . It was great",
    "predictable twists , wooden dialogue and cardboard villains sink the whole enterprise . It was terrible",
    "an intelligent thriller whose young director keeps tension rising until midnight . It was great",
    "neither scary nor amusing , this sequel merely repeats everything we hated before . It was terrible",
)


def make_tokenizer(directory: Path | str, bos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """Train, save to `directory` and return a tokenizer of exactly `VOCAB_SIZE` tokens.

    Args:
        bos: special token put before every text ("</s>" as OPT's own tokenizer does); None prepends nothing (Qwen).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    if bos is not None:
        template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, SPECIAL_TOKENS.index(bos))])
        tokenizer.post_processor = template
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    wrapped.save_pretrained(directory)
    assert len(wrapped) == VOCAB_SIZE, f"{len(wrapped)} tokens: SENTENCES has too few different words"
    for word in (" terrible", " great"):
        assert len(wrapped(word, add_special_tokens=False).input_ids) == 1, f"{word!r} is not a single token"
    return wrapped


def make_opt(
    directory: Path | str,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    ffn: int = 128,
    vocab: int = VOCAB_SIZE,
    max_positions: int = 256,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """An OPT (learned positions, biases, tied head) whose tokenizer prepends </s> (id 2)."""
    config = OPTConfig(
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=ffn,
        vocab_size=vocab,
        max_position_embeddings=max_positions,
        init_std=INIT_STD,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    return save(directory, config, "</s>", seed, dtype)


def make_llama(
    directory: Path | str,
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 128,
    vocab: int = VOCAB_SIZE,
    max_positions: int = 256,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A Llama with grouped-query attention (4 heads, 2 of keys and values), without biases; BOS <s> (id 0)."""
    config = LlamaConfig(**_decoder_fields(hidden, layers, heads, kv_heads, ffn, vocab, max_positions), bos_token_id=0)
    return save(directory, config, "<s>", seed, dtype)


def make_qwen2(
    directory: Path | str,
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 128,
    vocab: int = VOCAB_SIZE,
    max_positions: int = 256,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A Qwen2 (biases on q, k and v, tied head) whose tokenizer prepends nothing."""
    fields = _decoder_fields(hidden, layers, heads, kv_heads, ffn, vocab, max_positions)
    config = Qwen2Config(**fields, tie_word_embeddings=True)
    return save(directory, config, None, seed, dtype)


def _decoder_fields(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, max_positions: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": max_positions,
        "initializer_range": INIT_STD,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def save(directory: Path | str, config: PreTrainedConfig, bos: str | None, seed: int, dtype: torch.dtype) -> Path:
    """Draw the weights from `seed` (biases and norms too: zero biases would hide a dropped one) and save everything."""
    # Gemma's norms multiply with 1 + weight.
    of_norms = 0.0 if config.model_type in ("gemma", "gemma2", "gemma3_text") else 1.0
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * INIT_STD
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(noise + of_norms if is_norm else noise)
    model.to(dtype).save_pretrained(directory)
    make_tokenizer(directory, bos)
    return Path(directory)
