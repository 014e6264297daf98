"""Requests of rollouts: requests of clients that a probe answers, for as long as its group is open."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vllm_zo.engine.group import PerturbationGroup

BlockHash = Any


class ProbeRequests:
    """Which requests belong to which probe. Inside vLLM's scheduler they carry no LoRA request, as members do, so that
    they do not count against the limit for serving adapters."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Any, PerturbationGroup, int]] = {}
        """Request id -> (vLLM's request, group, slot), until vLLM has let go of it."""
        self._hashes: dict[PerturbationGroup, set[BlockHash]] = {}
        """Hashes of the blocks that a group's probes have put into the prefix cache."""

    def __bool__(self) -> bool:
        return bool(self._held)

    def __contains__(self, req_id: object) -> bool:
        return req_id in self._held

    def take(self, request: Any, group: PerturbationGroup, slot: int) -> None:
        """Take a request for a probe that has just arrived."""
        assert group.rollouts is not None
        # The path names the group, which is another one each time a step is taken again: no probe finds the blocks of
        # another state. The salt takes the place of the LoRA request, which is part of the hashes made until now.
        request.cache_salt = request.lora_request.lora_path
        request.lora_request = None
        request.block_hashes.clear()
        request.update_block_hashes()
        self._held[request.request_id] = request, group, slot
        group.rollouts.cost.requests += 1

    def slot_of(self, req_id: str) -> int:
        return self._held[req_id][2]

    def scheduled(self, req_id: str, num_tokens: int) -> None:
        """Count the tokens that a request has in this step."""
        rollouts = self._held[req_id][1].rollouts
        assert rollouts is not None
        rollouts.cost.tokens += num_tokens

    def let_go(self, unfinished: Collection[str]) -> None:
        """Forget requests that have ended.

        Args:
            unfinished: ids of the requests that vLLM holds.
        """
        for req_id in [req_id for req_id in self._held if req_id not in unfinished]:
            request, group, _ = self._held.pop(req_id)
            self._hashes.setdefault(group, set()).update(request.block_hashes)

    def orphans(self) -> list[Any]:
        """vLLM's requests whose probe answers no more: its rollouts have all ended, or its group was dropped."""
        return [request for request, group, _ in self._held.values() if not group.answers]

    def dead_blocks(self) -> set[BlockHash]:
        """Hashes of cached blocks of groups that answer no more. To be called once no request of theirs is held."""
        dead = [group for group in self._hashes if not group.answers]
        return set().union(*(self._hashes.pop(group) for group in dead))
