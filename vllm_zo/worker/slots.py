"""ZO adapter slots: pages of vLLM's stacked LoRA tensors that are written from seeds, never from files.

A page is one slot of `lora_a_stacked` / `lora_b_stacked` across all modules. Its rank is divided into blocks of r,
whose content the method's coordinates decide; for LoZO

    block 0        the perturbation:  A = V_cur^T,  B = sign * eps * scale * U
    block 1 + b    basis b:           A = V_b^T,    B = U_acc[b]

Perturbation and accumulator are separate blocks, so that a 16-bit sum absorbs neither. Every block of every page
carries a tag that says what it holds; materialising writes only the blocks whose tag is stale.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_zo.commands import SLOT_LORA_ID_BASE
from vllm_zo.errors import SlotError
from vllm_zo.methods.base import ProbePlan
from vllm_zo.methods.state import AdapterState
from vllm_zo.worker.modules import Target
from vllm_zo.worker.pages import JobPages, wants_one_launch

if TYPE_CHECKING:
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

BLOCK_EXPONENT = {torch.float16: 10}
"""B is scaled up and A down by 2**this. At learning rate 1e-7 accumulator entries are ~1e-6, subnormal in float16."""


class SlotPool:
    """Owns the last `num_slots` slots of the stacked LoRA tensors. Lives in the worker, one a rank.

    vLLM's LRU never sees these slots: their ids stand in `lora_index_to_id` for good, and the manager's own limit is
    lowered to what the user set.
    """

    def __init__(self, worker_manager: LRUCacheWorkerLoRAManager, num_slots: int) -> None:
        self.num_slots = num_slots
        self.manager: Any = worker_manager._adapter_manager
        self.worker_manager = worker_manager
        self.first = self.manager.lora_config.max_loras - num_slots
        self.slot_rank = self.manager.lora_config.max_lora_rank
        self.dtype = self.manager.lora_config.lora_dtype
        self.exponent = BLOCK_EXPONENT.get(self.dtype, 0)
        self._a_tags: list[dict[int, object]] = [{} for _ in range(num_slots)]
        self._b_tags: list[dict[int, object]] = [{} for _ in range(num_slots)]
        self._owner: list[str | None] = [None] * num_slots
        self._rank = [0] * num_slots
        self._pages: dict[str, JobPages] = {}
        self._reserve()

    # --- keeping the slots out of vLLM's LRU ------------------------------------------------------------------------

    def _reserve(self) -> None:
        manager, worker_manager = self.manager, self.worker_manager
        ids = [SLOT_LORA_ID_BASE + slot for slot in range(self.num_slots)]
        if hasattr(manager, "reserve_slots"):  # `patches/0003`
            manager.reserve_slots(ids, self)
            return
        config = copy.copy(manager.lora_config)
        config.max_loras = self.first
        config.max_cpu_loras = max(manager.lora_config.max_cpu_loras - self.num_slots, self.first)
        manager.lora_config = config
        manager.lora_index_to_id = manager.lora_index_to_id[: self.first] + ids
        manager._last_mapping = None

        remove_all = manager.remove_all_adapters

        def remove_all_adapters() -> None:
            remove_all()
            manager.lora_index_to_id = [None] * self.first + ids
            self.clear()

        manager.remove_all_adapters = remove_all_adapters
        apply_adapters: Callable[[set[Any]], None] = worker_manager._apply_adapters

        def _apply_adapters(requests: set[Any]) -> None:
            serving = set()
            for request in requests:
                if request and request.lora_int_id >= SLOT_LORA_ID_BASE:
                    self.check_materialised(request.lora_int_id - SLOT_LORA_ID_BASE)
                else:
                    serving.add(request)
            apply_adapters(serving)

        worker_manager._apply_adapters = _apply_adapters

    def check_materialised(self, slot: int) -> None:
        """Raise SlotError for a slot that holds nothing: scoring zeros would look like a result."""
        if not 0 <= slot < self.num_slots or self._owner[slot] is None:
            raise SlotError(
                f"ZO slot {slot} is not materialised; a member was scheduled before its Materialise command"
            )

    def clear(self) -> None:
        """Forget all contents (base weights reloaded, sleep mode): every slot must be materialised again."""
        for slot in range(self.num_slots):
            self.evict(slot)

    def evict(self, slot: int) -> None:
        """Free a page. Its content is a function of seeds and the fp32 master, so nothing is saved."""
        self._owner[slot] = None
        self._a_tags[slot].clear()
        self._b_tags[slot].clear()

    def evict_owner(self, owner: str) -> None:
        self._pages.pop(owner, None)
        for slot in range(self.num_slots):
            if self._owner[slot] == owner:
                self.evict(slot)

    # --- writing pages ----------------------------------------------------------------------------------------------

    def materialise(
        self, slot: int, job_id: str, state: AdapterState, targets: tuple[Target, ...], plan: ProbePlan, probe: int
    ) -> None:
        """Write probe `probe` of `plan` into `slot`: only the blocks whose content there is another."""
        self._prepare(slot, job_id, state.layout.rank)
        if job_id not in self._pages:
            self._pages[job_id] = JobPages.of(state.layout, targets, one_launch=wants_one_launch(state.device))
        pages, index = self._pages[job_id], self.first + slot
        blocks = state.blocks(plan, probe)
        self._clear_stale(slot, {block.index for block in blocks}, state, pages)
        for block in blocks:
            if self._a_tags[slot].get(block.index) != block.v_tag:
                pages.a.write(block.v(), index, block.index, 2.0**-self.exponent)
                self._a_tags[slot][block.index] = block.v_tag
            if self._b_tags[slot].get(block.index, "zero") != block.u_tag:
                u_N = block.u() if block.u else _zeros(state)
                pages.b.write(u_N, index, block.index, 2.0**self.exponent)
                self._b_tags[slot][block.index] = block.u_tag
        self.manager._last_mapping = None  # the kernel's view of ranks and shared A is stale

    def _prepare(self, slot: int, job_id: str, rank: int) -> None:
        if self._owner[slot] == job_id:
            return
        self.evict(slot)
        for module in self.manager.modules.values():
            module.reset_lora(self.first + slot)
        self._owner[slot], self._rank[slot] = job_id, rank

    def _clear_stale(self, slot: int, live: set[int], state: AdapterState, pages: JobPages) -> None:
        """Zero blocks that are no part of the state any more: an accumulator that has been folded since would count its
        update twice."""
        for block in [b for b in self._a_tags[slot] if b not in live]:
            pages.b.write(_zeros(state), self.first + slot, block, 1.0)
            self._b_tags[slot].pop(block, None)
            del self._a_tags[slot][block]

    # --- what the CPU kernel may share --------------------------------------------------------------------------------

    def shares_a(self, index: int, other: int) -> bool:
        """Whether two slots of the stacked tensors hold the same A, so that one shrink serves both."""
        a, b = index - self.first, other - self.first
        if a < 0 or b < 0 or self._owner[a] is None or self._owner[a] != self._owner[b]:
            return False
        return self._a_tags[a] == self._a_tags[b]

    def used_rank(self, index: int) -> int:
        """Leading rank rows of a slot that can be non-zero; for slots that are not ours, the whole padded rank."""
        slot = index - self.first
        if slot < 0 or self._owner[slot] is None:
            return int(self.slot_rank)
        return (max(self._a_tags[slot], default=0) + 1) * self._rank[slot]


def _zeros(state: AdapterState) -> Tensor:
    return torch.zeros(state.layout.u_ranges.total, device=state.device)
