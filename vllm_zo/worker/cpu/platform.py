"""The CPU side of a training worker."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_pp_group

from vllm_zo import compat
from vllm_zo.config import ZOTrainingConfig
from vllm_zo.methods.fold import fold_into
from vllm_zo.worker.cpu import native, patches
from vllm_zo.worker.cpu.alone import AloneForward
from vllm_zo.worker.cpu.memory import TRIM_INTERVAL, give_back_freed_memory
from vllm_zo.worker.cpu.packed_weights import PackedWeights
from vllm_zo.worker.cpu.pruned_forward import RowPruner
from vllm_zo.worker.cpu.slot_writer import LoopWriter
from vllm_zo.worker.head import Head
from vllm_zo.worker.host_copy import HostCopy
from vllm_zo.worker.kept_states import KeptStates
from vllm_zo.worker.platform import Chunk, Chunks
from vllm_zo.worker.slot_writers import Piece, SlotWriter


class CPUPlatform:
    """See `Platform`. If the model allows it, forwards leave out rows, and members may run alone."""

    fold_into = functools.partial(fold_into, rounding=native.stochastic_round)

    def __init__(self, runner: Any, wrappers: Sequence[Any], device: torch.device) -> None:
        self.runner, self.device = runner, device
        zo = ZOTrainingConfig.of_engine(runner.vllm_config.additional_config)
        self.rows = RowPruner(runner, wrappers, KeptStates(zo.kept_states_mib << 20))
        self._passed_on: list[Tensor] = []
        """What the latest forward has given to the next pipeline stage."""
        if not get_pp_group().is_last_rank:
            runner.get_model().register_forward_hook(self._note_passed_on)
        if not get_pp_group().is_first_rank and getattr(runner, "intermediate_tensors", None) is None:
            # vLLM 0.32 makes these in a warm-up, which a CPU worker leaves out where it compiles nothing.
            runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=device
            )

    def _note_passed_on(self, model: Any, inputs: Any, output: Any) -> None:
        self._passed_on = list(output.tensors.values())

    @staticmethod
    def before_load() -> None:
        # Here too, although the plugin applies them: VLLM_PLUGINS may leave the plugin out of this process.
        compat.require(patches.install, patches.mend_int8_layers)
        patches.choose_wrapper()

    def head(self, lm_head: Any, logits_processor: Any, tp: Any) -> Head:
        return Head(lm_head, logits_processor, tp)

    def slot_writer(self, pieces: Sequence[Piece], rank: int) -> SlotWriter:
        return LoopWriter(pieces, rank)

    def base_weights(self) -> PackedWeights:
        return PackedWeights()

    @property
    def layers_alone(self) -> int:
        if self.rows.not_alone:
            return 0
        return 1 if self.rows.decoder is None else len(self.rows.decoder.layers)

    def sharing_rows(self, chunks: Chunks) -> AbstractContextManager[None]:
        return self.rows.step(chunks)

    def forward_alone(self, chunks: Sequence[Chunk], slots: Sequence[int]) -> AloneForward:
        return AloneForward(self.rows, chunks, slots)

    def let_go(self, job_id: str) -> None:
        self.rows.kept.ended(job_id)

    def forget_states(self) -> None:
        self.rows.kept.clear()

    def after_forward(self, hidden: Tensor | None) -> None:
        """Clean the KV cache if a member diverged. hidden: (T, D); None: the stage has passed on what it had.

        The cache's blocks go to the next request. CPU attention multiplies what a block holds beyond the request's
        tokens by weights of 0, which gives NaN if it is not finite.
        """
        passed_on, self._passed_on = self._passed_on, []
        # `hidden` may lack parts of the last layer.
        outputs = [*(passed_on if hidden is None else [hidden]), *self.rows.take_last_attention()]
        if self.rows.wrote_kv and not all(torch.isfinite(output).all() for output in outputs):
            for cache in self.runner.kv_caches:
                cache.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def after_update(self, step: int) -> None:
        if step % TRIM_INTERVAL == 0:
            give_back_freed_memory()

    def sampler_slots_changed(self, wrapper: Any) -> None:
        """Do nothing: the CPU wrapper reads the slots from where they were set."""

    def copy_to_host(self, tensors: Sequence[Tensor]) -> HostCopy:
        return HostCopy(tensors)
