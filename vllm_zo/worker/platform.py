"""What a CPU worker and a CUDA worker do differently; everything else in this folder is the same on both."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_zo.worker.base_weights import BaseWeights
from vllm_zo.worker.head import Head
from vllm_zo.worker.host_copy import HostCopy
from vllm_zo.worker.slot_writers import Piece, SlotWriter


@dataclass(frozen=True)
class Chunk:
    """Neighbouring rows of one request in an engine step.

    Attributes:
        rows: number of rows.
        state: names the parameters that the rows run under. None for a request that is not a member; all of its rows
            are kept.
        token_ids: of the rows, if they start a sequence; empty if they continue one.
        targets: rows whose final hidden state is read; 0 is the chunk's first.
        embedded_by: what the embeddings depend on besides token and position: the state if it changes them, else None.
        whole: whether the rows are a whole sequence, from its first token to its last. No later step continues it.
        first_layer: number of the first layer that the state changes. The layers below it are as the model was loaded.
        owner: whose sequence it is (the job's id), where its hidden states may be kept for later steps; else None.
    """

    rows: int
    state: Hashable | None = None
    token_ids: Sequence[int] = ()
    targets: Sequence[int] = ()
    embedded_by: Hashable | None = None
    whole: bool = False
    first_layer: int = 0
    owner: Hashable | None = None


Chunks = Callable[[Sequence[str]], list[Chunk]]
"""Gives the rows of an engine step, from the request ids in the order of vLLM's batch."""


class ForwardAlone(Protocol):
    """A forward of whole sequences that uses neither vLLM's batch nor its KV cache."""

    reached: int
    """How many layers it has run."""
    layer_rows: tuple[int, ...]
    """How many rows each layer computes, where it may stop; one number for all of them where it may not."""

    def go_on(self, stop: Callable[[int], bool]) -> Tensor | None:
        """Run it, or go on where it stopped.

        Args:
            stop: is asked before a layer that has rows whether the forward stops there, and told how many layers it
                has gone on by, those without rows among them.

        Returns:
            (T, D) final hidden states, sequence after sequence; None: it has stopped.
        """


class Platform(Protocol):
    """What a worker asks of its hardware, and the state that this needs from step to step.

    Each worker makes one when its model is loaded.
    """

    device: torch.device

    def __init__(self, runner: Any, wrappers: Sequence[Any], device: torch.device) -> None:
        """Prepare the platform for a loaded model.

        Args:
            runner: vLLM's model runner.
            wrappers: vLLM's LoRA kernels (`PunicaWrapperBase`), one for each part of the model.
            device: of the model.
        """

    @staticmethod
    def before_load() -> None:
        """Apply the patches and settings that vLLM has to find when it loads the model.

        Raises:
            PatchConflictError: the patches do not fit the installed vLLM.
        """

    # --- parts of a trainer -------------------------------------------------------------------------------------------

    def head(self, lm_head: Any, logits_processor: Any, tp: Any) -> Head:
        """Make the `Head` that scores members. tp: vLLM's tensor-parallel group."""

    def slot_writer(self, pieces: Sequence[Piece], rank: int) -> SlotWriter:
        """Make the writer of flat factors into the slots of all modules. rank: LoRA rank of the factors."""

    def base_weights(self) -> BaseWeights:
        """Make the object that reads and changes base weights."""

    @property
    def fold_into(self) -> Callable[..., Tensor]:
        """`methods.fold.fold_into`, or what does the same on this device."""

    # --- an engine step -----------------------------------------------------------------------------------------------

    @property
    def layers_alone(self) -> int:
        """After how many layers a `forward_alone` of this model may stop: 1 if only at its end, 0 if there is none."""

    def sharing_rows(self, chunks: Chunks) -> AbstractContextManager[None]:
        """In the block, vLLM's forward may leave out rows of members whose result is not read."""

    def forward_alone(self, chunks: Sequence[Chunk], slots: Sequence[int]) -> ForwardAlone:
        """Prepare a forward of whole sequences. Slots and base weights must stay as they are until it has ended.

        Args:
            chunks: one for each sequence.
            slots: for each chunk, the slot of its adapter, among all of vLLM's.

        Raises:
            NotImplementedError: the platform has no such forward (`layers_alone` is 0).
        """

    def let_go(self, job_id: str) -> None:
        """Let hidden states that are kept for this job, and for no other, go when the room is needed."""

    def forget_states(self) -> None:
        """Drop the hidden states that are kept, because the base weights are others now."""

    def after_forward(self, hidden: Tensor | None) -> None:
        """Clean up after members, because their parameters may have diverged.

        Args:
            hidden: (T, D) final hidden states of vLLM's forward; None on a pipeline stage that is not the last.
        """

    def after_update(self, step: int) -> None:
        """Clean up after step number `step` of a job."""

    def sampler_slots_changed(self, wrapper: Any) -> None:
        """Update what depends on the slots of the rows to sample from. ServingLogits has just set them in `wrapper`."""

    def copy_to_host(self, tensors: Sequence[Tensor]) -> HostCopy:
        """Begin to copy tensors to the host, with the values that the work queued so far gives them. Later steps run
        meanwhile."""
