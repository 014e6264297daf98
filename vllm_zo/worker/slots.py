"""ZO adapter slots: slots of vLLM's stacked LoRA tensors that are written from keys, never from files.

A slot is one index of `lora_a_stacked` / `lora_b_stacked` across all modules. Its rank is divided into blocks of r. The
method's coordinates decide what each block holds; for LoZO

    block 0        the perturbation:  A = V_cur^T,  B = sign * eps * scale * U
    block 1 + b    basis b:           A = V_b^T,    B = U_acc[b]

Perturbation and accumulator are separate blocks, because in one 16-bit sum the smaller of them would vanish. Every
block of every slot has a tag that names its content; materialising writes only blocks with another tag.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_zo.commands import SLOT_LORA_ID_BASE
from vllm_zo.errors import SlotError
from vllm_zo.methods.adapter import ZERO_TAG, probe_blocks
from vllm_zo.methods.plan import ProbePlan
from vllm_zo.methods.state import AdapterState
from vllm_zo.worker.lora_targets import Target
from vllm_zo.worker.patches import APPLY_ADAPTERS, REMOVE_ALL_ADAPTERS
from vllm_zo.worker.slot_writers import Piece, SlotWriter, SlotWriters

if TYPE_CHECKING:
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

BLOCK_EXPONENT = {torch.float16: 10}
"""B is scaled up and A down by two to this power. At a learning rate of 1e-7 accumulator entries are about 1e-6, which
is subnormal in float16."""


class SlotPool:
    """Owns the last `num_slots` slots of the stacked LoRA tensors. Each tensor-parallel rank's worker has one.

    vLLM's LRU never assigns these slots: their ids stay in `lora_index_to_id`, and the limit of vLLM's manager is
    lowered to the number of slots that the user asked for.

    Args:
        make_writer: makes the platform's writer of flat factors from pieces and the LoRA rank.
        weights_changed: is called when vLLM has put other base weights into the model.
    """

    def __init__(
        self,
        worker_manager: LRUCacheWorkerLoRAManager,
        num_slots: int,
        make_writer: Callable[[Sequence[Piece], int], SlotWriter],
        weights_changed: Callable[[], None],
    ) -> None:
        self.num_slots = num_slots
        self._make_writer, self._weights_changed = make_writer, weights_changed
        self.manager: Any = worker_manager._adapter_manager
        self.worker_manager = worker_manager
        self.first = self.manager.lora_config.max_loras - num_slots
        self.slot_rank = self.manager.lora_config.max_lora_rank
        self.dtype = self.manager.lora_config.lora_dtype
        self.exponent = BLOCK_EXPONENT.get(self.dtype, 0)
        # Per slot: block -> tag. A block of B without a tag is zero, because `_prepare` zeroes the slot.
        self._a_tags: list[dict[int, object]] = [{} for _ in range(num_slots)]
        self._b_tags: list[dict[int, object]] = [{} for _ in range(num_slots)]
        self._owner: list[str | None] = [None] * num_slots
        self._rank = [0] * num_slots
        self._writers: dict[str, SlotWriters] = {}
        self._reserve()

    # --- keeping the slots out of vLLM's LRU ------------------------------------------------------------------------

    def _reserve(self) -> None:
        manager, worker_manager = self.manager, self.worker_manager
        ids = [SLOT_LORA_ID_BASE + slot for slot in range(self.num_slots)]
        if REMOVE_ALL_ADAPTERS.unneeded():
            manager.reserve_slots(ids, self)
            return
        # Private from here on: the manager takes a slot as free where `lora_index_to_id` has None, counts slots by its
        # config, and makes no new metadata while `_last_mapping` equals the batch's.
        # The config is a copy, because other objects of vLLM share it, and size their tensors for all slots by it.
        config = copy.copy(manager.lora_config)
        config.max_loras = self.first
        config.max_cpu_loras = max(manager.lora_config.max_cpu_loras - self.num_slots, self.first)
        manager.lora_config = config
        manager.lora_index_to_id = manager.lora_index_to_id[: self.first] + ids
        manager._last_mapping = None

        remove_all = manager.remove_all_adapters

        def remove_all_adapters() -> None:
            remove_all()  # makes a list that is as long as the lowered limit
            manager.lora_index_to_id = [None] * self.first + ids
            self.clear()

        REMOVE_ALL_ADAPTERS.on(manager, "remove_all_adapters", remove_all_adapters)
        apply_adapters: Callable[[set[Any]], None] = worker_manager._apply_adapters

        def _apply_adapters(requests: set[Any]) -> None:
            serving = set()
            for request in requests:
                if request and request.lora_int_id >= SLOT_LORA_ID_BASE:
                    self.check_materialised(request.lora_int_id - SLOT_LORA_ID_BASE)
                else:
                    serving.add(request)
            apply_adapters(serving)

        APPLY_ADAPTERS.on(worker_manager, "_apply_adapters", _apply_adapters)

    def check_materialised(self, slot: int) -> None:
        """Check that a slot of the pool holds a probe: the score of an empty slot would look like a result.

        Raises:
            SlotError: there is no such slot, or it holds nothing.
        """
        if not 0 <= slot < self.num_slots or self._owner[slot] is None:
            raise SlotError(
                f"ZO slot {slot} is not materialised; a member was scheduled before its Materialise command"
            )

    def clear(self) -> None:
        """Forget the content of every slot. vLLM asks for this, for example, after it has reloaded the base weights."""
        for slot in range(self.num_slots):
            self.evict(slot)
        self._weights_changed()

    def evict(self, slot: int) -> None:
        """Free a slot. Nothing is saved, because keys and the float32 state give its content again."""
        self._owner[slot] = None
        self._a_tags[slot].clear()
        self._b_tags[slot].clear()

    def evict_owner(self, owner: str) -> None:
        """Free all slots of a job, and drop its writers, which hold views for its modules."""
        self._writers.pop(owner, None)
        for slot in range(self.num_slots):
            if self._owner[slot] == owner:
                self.evict(slot)

    # --- writing slots ----------------------------------------------------------------------------------------------

    def materialise(
        self, slot: int, job_id: str, state: AdapterState, targets: tuple[Target, ...], plan: ProbePlan, probe: int
    ) -> None:
        """Write probe `probe` of `plan` into `slot`. Blocks that hold the right numbers already are not written."""
        self._prepare(slot, job_id, state.layout.rank)
        if job_id not in self._writers:
            self._writers[job_id] = SlotWriters.of(state.layout, targets, self._make_writer)
        writers, index = self._writers[job_id], self.first + slot
        blocks = probe_blocks(state, plan, probe)
        self._clear_stale(slot, {block.index for block in blocks}, state, writers)
        for block in blocks:
            if self._a_tags[slot].get(block.index) != block.v_tag:
                writers.a.write(block.v(), index, block.index, 2.0**-self.exponent)
                self._a_tags[slot][block.index] = block.v_tag
            if self._b_tags[slot].get(block.index, ZERO_TAG) != block.u_tag:
                u_N = block.u() if block.u else _zeros(state)
                writers.b.write(u_N, index, block.index, 2.0**self.exponent, state.moved_O)
                self._b_tags[slot][block.index] = block.u_tag
        # Otherwise vLLM makes no new metadata for an unchanged batch, and the LoRA wrapper does not ask again which
        # slots share A and which ranks they use.
        self.manager._last_mapping = None

    def _prepare(self, slot: int, job_id: str, rank: int) -> None:
        if self._owner[slot] == job_id:
            return
        # The job before may have used other modules and a larger part of the rank: all of it has to be zero.
        self.evict(slot)
        for module in self.manager.modules.values():
            module.reset_lora(self.first + slot)
        self._owner[slot], self._rank[slot] = job_id, rank

    def _clear_stale(self, slot: int, live: set[int], state: AdapterState, writers: SlotWriters) -> None:
        """Zero B in blocks that are no part of the state any more. An accumulator that has been folded since would
        count twice."""
        for block in [b for b in self._a_tags[slot] if b not in live]:
            writers.b.write(_zeros(state), self.first + slot, block, 1.0)
            self._b_tags[slot].pop(block, None)
            del self._a_tags[slot][block]

    # --- what LoRA kernels ask ----------------------------------------------------------------------------------------

    def shares_a(self, index: int, other: int) -> bool:
        """Whether two slots hold the same A, so that one shrink serves both. They are counted among all of vLLM's."""
        a, b = index - self.first, other - self.first
        if a < 0 or b < 0 or self._owner[a] is None or self._owner[a] != self._owner[b]:
            return False
        return self._a_tags[a] == self._a_tags[b]

    def used_rank(self, index: int) -> int:
        """How many of a slot's leading ranks can be non-zero. A slot for serving may use its whole padded rank."""
        slot = index - self.first
        if slot < 0 or self._owner[slot] is None:
            return int(self.slot_rank)
        return (max(self._a_tags[slot], default=0) + 1) * self._rank[slot]


def _zeros(state: AdapterState) -> Tensor:
    return torch.zeros(state.layout.u_ranges.total, device=state.device)
