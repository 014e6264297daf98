"""MeZO as published: dense Gaussian directions, written into the base weights one probe at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vllm_zo.methods.base import Method
from vllm_zo.methods.coordinates import Coordinates, Dense


@dataclass(frozen=True, kw_only=True)
class MeZO(Method):
    """`W <- W - lr * 1/K sum_k c_k Z_k`, Z_k ~ N(0, I) dense, for those who need the original and as the reference.

    The engine is this job's: members of one probe run, then the base weights of the next are written. Slow by nature,
    and slower where weights are packed (on CPU every probe packs them again). Memory beside the model: a float32 copy
    of the weights in scope for the update, one for the direction, and the originals.

    Where this differs from the official code (princeton-nlp/MeZO): it adds and subtracts eps Z in the weights' dtype,
    which drifts in 16 bits; here every probe is written anew from the original and the float32 update, so nothing
    drifts, and the update is float32. In scope are linear layers only (no embeddings, biases and norms), without weight
    decay.

    Source: Fine-Tuning Language Models with Just Forward Passes, arXiv:2305.17333, Algorithm 1.
    """

    name = "mezo"
    update_spaces = ("fold",)
    refusals: ClassVar[Mapping[str, str]] = {"bank": "a dense change is no adapter: it is written into the base"}

    @property
    def coordinates(self) -> Coordinates:
        return Dense()
