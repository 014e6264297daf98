"""The CUDA side of a training worker."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vllm_zo import compat
from vllm_zo.worker.base_weights import BaseWeights
from vllm_zo.worker.cuda import patches
from vllm_zo.worker.cuda.head import KERNEL_DTYPES, TritonHead
from vllm_zo.worker.cuda.host_copy import CopyStream
from vllm_zo.worker.cuda.triton_fold import fold_into
from vllm_zo.worker.cuda.triton_slots import OneLaunchWriter
from vllm_zo.worker.head import Head
from vllm_zo.worker.host_copy import HostCopy
from vllm_zo.worker.platform import Chunk, Chunks, ForwardAlone
from vllm_zo.worker.slot_writers import Piece, SlotWriter


class CUDAPlatform:
    """See `Platform`. Forwards compute every row, in vLLM's CUDA graphs, and all members are requests of vLLM."""

    layers_alone = 0
    fold_into = staticmethod(fold_into)

    def __init__(self, runner: Any, wrappers: Sequence[Any], device: torch.device) -> None:
        self.device = device
        self._copies = CopyStream(device)

    @staticmethod
    def before_load() -> None:
        compat.require(patches.install)

    def head(self, lm_head: Any, logits_processor: Any, tp: Any) -> Head:
        """See `Platform`. Triton kernels do the work if they can read the weight. A quantised head has no `weight`."""
        weight = getattr(lm_head, "weight", None)
        has_kernels = weight is not None and weight.dtype in KERNEL_DTYPES
        return (TritonHead if has_kernels else Head)(lm_head, logits_processor, tp)

    def slot_writer(self, pieces: Sequence[Piece], rank: int) -> SlotWriter:
        """See `Platform`. One launch writes all modules: a 13B model has 240 of them, and a launch for each would take
        longer than everything else that a slot needs."""
        return OneLaunchWriter(pieces, rank)

    def base_weights(self) -> BaseWeights:
        return BaseWeights()

    def sharing_rows(self, chunks: Chunks) -> AbstractContextManager[None]:
        return nullcontext()

    def forward_alone(self, chunks: Sequence[Chunk], slots: Sequence[int]) -> ForwardAlone:
        """Never called, because `layers_alone` is 0.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("members run as requests of vLLM's on CUDA")

    def let_go(self, job_id: str) -> None:
        """Do nothing: nothing is kept for a job."""

    def forget_states(self) -> None:
        """Do nothing: forwards compute every row, and no states are kept."""

    def after_forward(self, hidden: Tensor | None) -> None:
        """Do nothing: GPU attention reads no keys and values beyond a request's tokens."""

    def after_update(self, step: int) -> None:
        """Do nothing: torch's caching allocator keeps device memory for the next step."""

    def sampler_slots_changed(self, wrapper: Any) -> None:
        # vLLM's kernels read the slots from these metadata, not from `sampler_indices`.
        wrapper.prompt_mapping_meta.prepare_tensors(wrapper.sampler_indices)

    def copy_to_host(self, tensors: Sequence[Tensor]) -> HostCopy:
        return self._copies.start(tensors)
