"""The patch that the scheduler applies to an object of vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_zo.compat.registry import Patch

CACHE_BLOCKS = Patch(
    target="vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.cache_blocks",
    why="members have no block hashes: caching their full blocks would index past them, and a later prompt could hit "
    "KV that was computed under a perturbation",
    how="leaves the blocks of members out of the prefix cache; only on the coordinator of a training engine",
    upstream="none yet",
    remove_when="requests can opt out of being cached, as they can out of reading the cache",
    series="0004-background-requests.patch",
    built_in="vllm.v1.request:Request.__init__(background)",
)


def keep_out_of_prefix_cache(coordinator: Any, is_member: Callable[[Any], bool]) -> None:
    """Make this KV-cache coordinator skip the requests for which `is_member` is true."""
    cache_blocks = coordinator.cache_blocks

    def cache_serving_blocks(request: Any, num_computed_tokens: int) -> None:
        if not is_member(request):
            cache_blocks(request, num_computed_tokens)

    CACHE_BLOCKS.on(coordinator, "cache_blocks", cache_serving_blocks)
