"""What the benchmarks run on: shapes of OPT and Llama with random weights, and batches with SST-2's prompt lengths.

The benchmarks download nothing and need no data set. Speed does not depend on the values of weights and tokens, only on
shapes and lengths, and those are real:

* `SHAPES` are the published OPT configurations with pre-LN layers. OPT-350M is not among them: its post-LN layers and
  projected embeddings make it another architecture, and no table of the papers uses it. `smollm2` is SmolLM2-135M: the
  layers of today's models (gated MLP, fewer heads of keys and values than of queries) at the size of OPT-125M.
* `PROMPT_LENGTHS` counts the tokens of 1,000 prompts "{sentence} It was" (SST-2 training sentences; GPT-2's byte-level
  BPE, which has OPT's merges; plus the </s> that OPT's tokenizer puts in front). The MeZO and LoZO protocol has 1,000
  training sentences. These are `random.Random(s).sample(range(67349), 1000)` with s = 5483, the first s whose sample
  has the statistics of the project's reference measurements, to their rounding: a mean prompt of 13.8 tokens and a mean
  longest of 16 prompts of 34.9. So a step of 16 prompts x 2 signs has 441 packed tokens and a padding factor of 2.5.
  The whole training set has 14.4, 36.1, 460 and the same factor of 2.5, so no contender gains from the choice.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cached_property
from math import comb
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The sizes of an OPT, or with `kv_heads` of a Llama. Embeddings are tied and as wide as the layers.

    OPT's layers are pre-LN with biases and ReLU; positions are learnt. Llama's have RMS norms, no biases, an MLP gated
    by SiLU, and rotary positions. Heads of keys and values are as wide as those of the queries, `hidden / heads`.
    """

    hidden: int
    layers: int
    heads: int
    ffn: int
    vocab: int = 50272
    positions: int = 2048
    kv_heads: int | None = None
    """Heads of keys and values of a Llama; None makes an OPT."""

    @property
    def is_llama(self) -> bool:
        return self.kv_heads is not None

    @property
    def layers_path(self) -> str:
        """The name of the list of layers in the causal model of transformers."""
        return "model.layers" if self.is_llama else "model.decoder.layers"

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The trained linear weights of a layer, a scope that the literature calls LoRA-only: name in the layer ->
        (out features, in features). Biases do not train."""
        h, f = self.hidden, self.ffn
        if self.kv_heads is None:
            return {
                "self_attn.q_proj": (h, h), "self_attn.k_proj": (h, h), "self_attn.v_proj": (h, h),
                "self_attn.out_proj": (h, h), "fc1": (f, h), "fc2": (h, f),
            }  # fmt: skip
        kv = h // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h), "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f),
        }  # fmt: skip


SHAPES = {
    "7m": Shape(256, 6, 4, 1024, vocab=8192, positions=512),  # the demo model of examples/
    "125m": Shape(768, 12, 12, 3072),
    "1.3b": Shape(2048, 24, 32, 8192),
    "2.7b": Shape(2560, 32, 32, 10240),
    "6.7b": Shape(4096, 32, 32, 16384),
    "13b": Shape(5120, 40, 40, 20480),
    "smollm2": Shape(576, 30, 9, 1536, vocab=49152, positions=8192, kv_heads=3),
}


def title(name: str) -> str:
    """What reports call a shape."""
    return name if SHAPES[name].is_llama else f"OPT {name}"


BOS, PAD = 2, 1
NUM_SPECIAL = 4
OPTION_IDS = (6587, 372)
"""Token ids of " terrible" and " great" in OPT's vocabulary; with random weights any two of a vocabulary would do."""
OPTION_TEXTS = tuple(f" t{token}" for token in OPTION_IDS)

PROMPT_LENGTHS: dict[int, int] = {
    4: 7, 5: 63, 6: 105, 7: 101, 8: 78, 9: 65, 10: 65, 11: 65, 12: 41, 13: 32, 14: 41, 15: 42, 16: 25, 17: 20, 18: 23,
    19: 17, 20: 21, 21: 17, 22: 19, 23: 17, 24: 13, 25: 12, 26: 10, 27: 10, 28: 8, 29: 6, 30: 9, 31: 10, 32: 8, 33: 6,
    34: 9, 35: 3, 36: 3, 37: 4, 38: 1, 39: 3, 40: 3, 41: 1, 42: 1, 43: 2, 44: 2, 45: 3, 46: 1, 47: 1, 48: 2, 50: 2,
    55: 1, 56: 2,
}  # fmt: skip


def mean_prompt_tokens() -> float:
    return sum(length * count for length, count in PROMPT_LENGTHS.items()) / sum(PROMPT_LENGTHS.values())


def mean_longest(batch_size: int) -> float:
    """The exact expectation of the longest of `batch_size` prompts drawn without replacement, which padding pads to."""
    # Prompt i of the sorted list is the longest in comb(i, batch_size - 1) of all comb(n, batch_size) batches.
    lengths = sorted(length for length, count in PROMPT_LENGTHS.items() for _ in range(count))
    weighted = sum(length * comb(i, batch_size - 1) for i, length in enumerate(lengths))
    return weighted / comb(len(lengths), batch_size)


@dataclass(frozen=True)
class Prompts:
    """1,000 labelled prompts of random tokens with SST-2's lengths, in a fixed order of full batches.

    Every contender of a benchmark builds an equal copy from the same three numbers. The order is that of a vllm_zo job
    with this seed, so ours sees the same batches too. An epoch is a permutation of all prompts, so means over an epoch
    are exactly those of `PROMPT_LENGTHS`. Batches run on across epochs, so none is short.
    """

    vocab: int
    batch_size: int
    seed: int = 0
    template, options, option_ids = "{sentence}", OPTION_TEXTS, OPTION_IDS

    @cached_property
    def rows(self) -> list[tuple[list[int], int]]:
        """(token ids with BOS, index of the right option) for every prompt."""
        # `random` makes its state of the SHA-512 of a text, so every process draws the same prompts.
        rng = random.Random(f"rows {self.seed}")
        lengths = [length for length, count in PROMPT_LENGTHS.items() for _ in range(count)]
        return [([BOS, *rng.choices(range(NUM_SPECIAL, self.vocab), k=n - 1)], rng.randrange(2)) for n in lengths]

    def indices(self, step: int) -> tuple[int, ...]:
        """The indices of the prompts in the batch of a step."""
        from vllm_zo.data.batches import BatchOrder  # here: core_step.py itself stays without torch

        return BatchOrder(len(self.rows), self.batch_size, self.seed).batch(step)

    def batch(self, step: int) -> tuple[list[list[int]], list[int]]:
        """The token ids of the prompts, and the indices of their right options."""
        chosen = [self.rows[i] for i in self.indices(step)]
        return [ids for ids, _ in chosen], [label for _, label in chosen]

    def tokens(self, step: int) -> int:
        """The number of packed tokens of a step: those of its prompts, once for each sign."""
        return 2 * sum(map(len, self.batch(step)[0]))

    def records(self) -> list[dict[str, str | int]]:
        """The prompts as text. The tokenizer that `write_checkpoint` saves gives back the very same ids."""
        return [{"sentence": " ".join(f"t{i}" for i in ids[1:]), "label": label} for ids, label in self.rows]


def write_checkpoint(shape: Shape, dtype: str, directory: str | Path, seed: int = 0, *, weights: bool = True) -> Path:
    """Save a model of random weights (normal, std 0.02) as safetensors, with a config and a tokenizer.

    The tokenizer's words are "t<id>", separated by spaces. It puts </s> in front, as OPT's own does. So a program that
    takes text scores the same tokens as one that takes ids.

    Args:
        dtype: "float32", "bfloat16" or "float16", for the weights in the file and for the run.
        weights: False leaves them out, for programs that make random ones themselves.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    config = config_of(shape)
    if weights:
        torch.manual_seed(seed)
        default = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))  # so that 13B never takes the memory of float32
        try:
            AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        finally:
            torch.set_default_dtype(default)
    else:
        config.dtype = dtype
        config.save_pretrained(directory)
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"t{i}" for i in range(NUM_SPECIAL, shape.vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", BOS)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(directory)
    return Path(directory)


def config_of(shape: Shape) -> Any:
    """The configuration of transformers for a shape."""
    from transformers import LlamaConfig, OPTConfig

    common: dict[str, Any] = {
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "vocab_size": shape.vocab, "max_position_embeddings": shape.positions, "bos_token_id": BOS,
        "eos_token_id": BOS, "pad_token_id": PAD, "attention_dropout": 0.0, "tie_word_embeddings": True,
    }  # fmt: skip
    if shape.is_llama:
        return LlamaConfig(
            intermediate_size=shape.ffn,
            num_key_value_heads=shape.kv_heads,
            architectures=["LlamaForCausalLM"],
            **common,
        )
    return OPTConfig(
        word_embed_proj_dim=shape.hidden, ffn_dim=shape.ffn, dropout=0.0, architectures=["OPTForCausalLM"], **common
    )


if __name__ == "__main__":
    statistics = {"mean prompt": mean_prompt_tokens(), "mean longest of 16": mean_longest(16)}
    print(json.dumps(statistics | {"packed tokens a step": 32 * mean_prompt_tokens()}, indent=2))
