"""MeZO as published: dense Gaussian directions. The worker writes one probe at a time into the base weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vllm_zo.methods.base import Method
from vllm_zo.methods.coordinates import Coordinates, Dense


@dataclass(frozen=True, kw_only=True)
class MeZO(Method):
    """`W <- W - lr * 1/K sum_k c_k Z_k` with Z_k ~ N(0, I), dense. This is the original algorithm, and our reference.

    The engine runs this job alone. It scores one probe, then writes the base weights of the next. That is slow, and
    slower where the engine packs its weights (on a CPU it packs them again for every probe). Beside the model the job
    needs memory for a float32 copy of the trained weights (the update), one more (the direction), and the originals.

    The official code (princeton-nlp/MeZO) adds and subtracts eps Z in the weights' dtype, which drifts in 16 bits. Here
    the worker writes every probe from the original weights and the float32 update, so nothing drifts. The method trains
    linear layers only (no embeddings, biases or norms), without weight decay.

    Source: Fine-Tuning Language Models with Just Forward Passes, arXiv:2305.17333, Algorithm 1.
    """

    name = "mezo"
    update_spaces = ("fold",)
    refusals: ClassVar[Mapping[str, str]] = {"bank": "a dense change is no adapter: it is written into the base"}

    @property
    def coordinates(self) -> Coordinates:
        return Dense()
