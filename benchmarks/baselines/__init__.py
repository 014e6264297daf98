"""Other ways to take a LoZO step, each as fast as its kind allows. `make` builds one by name.

All have the interface of `common.Step`. benchmarks/README.md says what each does and leaves out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.baselines.common import Step

CONTENDERS = {
    "official-full": "official, and all other parameters (embeddings, biases, norms) perturbed too, as released",
    "official": "dense perturbation as in the official code, both options as padded sequences, full logits",
    "official-addmm": "the same with each dense sweep fused into one in-place addmm_",
    "dense-mezo": "MeZO as released: official-full along dense Gaussian directions",
    "strong": "Hugging Face model, low-rank probes as hooks, one padded batch of stems, two label rows, lazy fold",
    "packed": "one-model loop: packed tokens, fused qkv, shared shrink, lazy fold; weights as torch keeps them",
    "packed-prepacked": "packed, with weights prepacked by whatever multiplies fastest here",
    "packed-pruned": "packed-prepacked, and the last layer runs past attention for the last tokens only",
    "compiled": "packed, compiled and in CUDA graphs: plain PyTorch at its best on a GPU",
    "stock-files": "stock vLLM: two adapter files written, loaded and scored a step; the update is in them",
    "stock-in-place": "stock vLLM: a worker extension adds the direction to the weights and takes it away, by RPC",
    "gemms": "nothing but the GEMMs of each layer on the packed tokens: a floor, not a step",
}

CPU_ONLY = ("packed-prepacked", "packed-pruned")
"""Contenders that pack their weights for a CPU's products."""
GPU_ONLY = ("compiled",)
"""It gives the right numbers on a CPU too (the tests check it there), but without graphs it is a slower `packed`."""
OPT_ONLY = ("compiled", "stock-in-place")
"""Contenders that are not written for a Llama."""
STOCK = ("stock-files", "stock-in-place")
"""Contenders that run in vLLM as it is, without this package's plugin."""


def make(name: str, *args: Any, **kwargs: Any) -> Step:
    """Build the contender `name`; the arguments are those of `common.Step`."""
    if name.startswith("official"):
        from benchmarks.baselines.official_lozo import OfficialLOZO

        return OfficialLOZO(*args, fused=name == "official-addmm", everything=name == "official-full", **kwargs)
    if name == "dense-mezo":
        from benchmarks.baselines.official_lozo import DenseMeZO

        return DenseMeZO(*args, **kwargs)
    if name == "strong":
        from benchmarks.baselines.strong_hf import StrongHF

        return StrongHF(*args, **kwargs)
    if name == "compiled":
        from benchmarks.baselines.compiled import Compiled

        return Compiled(*args, **kwargs)
    if name in STOCK:
        from benchmarks.baselines.stock_vllm import FileAdapters, InPlace

        return (FileAdapters if name == "stock-files" else InPlace)(*args, **kwargs)
    on_cpu = kwargs.get("device", "cpu") == "cpu"  # on a GPU nothing is faster than torch's own product
    if name == "gemms":
        from benchmarks.baselines.gemm_floor import GemmFloor

        return GemmFloor(*args, prepack=on_cpu, **kwargs)
    from benchmarks.baselines.hand_packed import HandPacked

    return HandPacked(*args, prepack=name != "packed", prune_last_layer=name == "packed-pruned", **kwargs)
