"""vLLM's LoRA wrapper for CUDA, with our low-rank product and with metadata that the host computes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from vllm_zo.upload import upload_into
from vllm_zo.worker.cuda import triton_lora  # noqa: F401  (registers torch.ops.vllm_zo.lora_linear)
from vllm_zo.worker.cuda.lora_tiles import DeviceTiles, plan


class SharedShrinkPunicaWrapper(PunicaWrapperGPU):
    """Replaces PunicaWrapperGPU, and gives the same results up to rounding, for requests with and without adapters.

    vLLM derives its metadata on the device and reads two numbers back each time the batch changes. A training step
    always changes it, so the host could never prepare the next step while one runs. The host knows the batch: here it
    computes all metadata and uploads them.
    """

    pool: Any = None
    """The SlotPool, once the worker has made its trainer. It knows which slots share A, and how many of their ranks are
    in use."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.tiles = DeviceTiles(max_num_batched_tokens, self.max_loras, device)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        # Not `super().update_metadata`: it would make the kernels' metadata on the device, and wait for them.
        self.is_prefill = mapping.is_prefill
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        slot_of_id = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id is not None}
        slot_of_row = _slots(mapping.index_mapping, slot_of_id)
        fill_metadata(self.token_mapping_meta, slot_of_row)
        fill_metadata(self.prompt_mapping_meta, _slots(mapping.prompt_mapping, slot_of_id))
        self.tiles.update(plan(slot_of_row, *self._sharing(slot_of_row)))

    def _sharing(self, slot_of_row: np.ndarray) -> tuple[list[int], list[int]]:
        """For each slot, the first slot of the batch with the same A, and the number of leading ranks in use.

        Args:
            slot_of_row: (T,) slot of each row, -1 for none.
        """
        owner = list(range(self.max_loras))
        rank = [int(self.lora_config.max_lora_rank)] * self.max_loras
        if self.pool is None:
            return owner, rank
        owners: list[int] = []
        for slot in np.unique(slot_of_row[slot_of_row >= 0]).tolist():
            owner[slot] = next((other for other in owners if self.pool.shares_a(slot, other)), slot)
            rank[slot] = self.pool.used_rank(slot)
            if owner[slot] == slot:
                owners.append(slot)
        return owner, rank

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Tensor | None = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """`y[:, slice i] += scale * x A_i^T B_i^T` in place, with the adapter of each token.

        Args:
            y: (T, sum of output slices).
            x: (T, I).
            lora_a_stacked: for each slice (slots, 1, R, I).
            lora_b_stacked: for each slice (slots, 1, O_i, R).
            add_inputs: False: y is overwritten, and is zero for tokens without an adapter.
        """
        tiles = self.tiles
        torch.ops.vllm_zo.lora_linear(
            y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), list(lora_a_stacked), list(lora_b_stacked),
            tiles.rows, tiles.shrink, tiles.expand, self.token_mapping_meta.no_lora_flag_cpu, scale, add_inputs,
        )  # fmt: skip


def _slots(lora_ids: Iterable[int], slot_of_id: dict[int, int]) -> np.ndarray:
    """(T,) the slot of each row's adapter, -1 for none.

    Raises:
        KeyError: an adapter is in no slot.
    """
    ids = np.fromiter(lora_ids, np.int64)
    found, inverse = np.unique(ids, return_inverse=True)
    # Adapters are numbered from 1: vLLM has 0 for a row without one.
    slots = np.array([slot_of_id[lora_id] if lora_id > 0 else -1 for lora_id in found.tolist()], np.int64)
    return slots[inverse] if len(ids) else ids


def fill_metadata(meta: Any, slot_of_row: np.ndarray) -> None:
    """Write what `LoRAKernelMeta.prepare_tensors` writes, from slots that the host knows. vLLM's own kernels, for
    embeddings and experts, read it.

    Args:
        meta: a `LoRAKernelMeta`.
        slot_of_row: (T,) slot of each row, -1 for none.
    """
    meta._reset()  # private, and what `prepare_tensors` begins with
    no_lora = not (slot_of_row >= 0).any()
    meta.no_lora_flag_cpu[0] = no_lora
    if no_lora:
        return
    slots, counts = np.unique(slot_of_row, return_counts=True)
    upload_into(meta.token_lora_mapping, slot_of_row)
    upload_into(meta.token_indices_sorted_by_lora_ids, np.argsort(slot_of_row, kind="stable"))
    upload_into(meta.active_lora_ids, slots)
    upload_into(meta.num_tokens_per_lora, counts)
    upload_into(meta.lora_token_start_loc, np.concatenate(([0], counts.cumsum())))
    # vLLM captures CUDA graphs for some numbers of adapters only, and uses the next larger one.
    active, captured = len(slots), meta.captured_lora_counts
    place = bisect_left(captured, active)
    meta.num_active_loras_cpu[0] = captured[place] if place < len(captured) else active
