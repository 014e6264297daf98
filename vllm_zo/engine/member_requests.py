"""vLLM's requests of members: ordinary ones, made by the scheduler itself, that no client awaits.

Their KV is that of a probe, so they stay out of the prefix cache. The exception is a member that writes and whose probe
changes the LM head alone: its KV is that of the base. So all probes share the blocks of a prompt, with each other, with
requests to the base, and with the steps of later epochs; a step then computes what the probes write, and of a prompt
what no whole block holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.request import Request

from vllm_zo.engine.group import Member
from vllm_zo.engine.patches import CACHE_BLOCKS, keep_out_of_prefix_cache
from vllm_zo.engine.writing import Writing
from vllm_zo.objectives.base import ScoringSequence

MEMBER_CLIENT = -1
"""`client_index` of members. Front ends count from 0, so no output of a member belongs to one."""
MEMBER_PRIORITY = 1 << 30
"""vLLM's priority policy takes the lowest number first: members run after every request and are preempted before it."""
_HAS_BACKGROUND = CACHE_BLOCKS.unneeded()
"""Whether this vLLM has the background requests of `patches/0004`, and so keeps members out of the prefix cache."""


class MemberRequests:
    """Makes the requests of one scheduler's members.

    Args:
        coordinator: of the scheduler's KV cache.
        hash_block_size: tokens of which the prefix cache makes one hash.
    """

    def __init__(self, vllm_config: VllmConfig, coordinator: Any, hash_block_size: int) -> None:
        self._vllm_config, self._hash_block_size = vllm_config, hash_block_size
        keep_out_of_prefix_cache(coordinator, lambda r: r.client_index == MEMBER_CLIENT and not r.block_hashes)
        # A hit in the prefix cache would give a member KV that the unperturbed weights computed.
        self._scored = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, skip_reading_prefix_cache=True)

    def make(self, member: Member) -> Request:
        of_base = member.kv_of_base and self._vllm_config.cache_config.enable_prefix_caching
        generation, params = member.generation, self._scored
        if generation is not None:
            params = self._writing.params(generation, member.sampling_seed, reads_prefix_cache=of_base)
        return Request(
            request_id=member.req_id,
            prompt_token_ids=list(member.token_ids),
            sampling_params=params,
            pooling_params=None,
            client_index=MEMBER_CLIENT,
            priority=MEMBER_PRIORITY,
            # Without a hasher a request has no block hashes, and finds nothing in the prefix cache.
            block_hasher=self._hasher if of_base else None,
            **({"background": True} if _HAS_BACKGROUND else {}),
        )

    def text(self, continued: ScoringSequence, completion: Sequence[int]) -> str:
        """The text of a member's completion; the reward threads call it."""
        return self._writing.text(continued, completion)

    @cached_property
    def _writing(self) -> Writing:
        # Made when the first member that generates is scheduled, so that no two reward threads make it at once.
        return Writing(self._vllm_config.model_config)

    @cached_property
    def _hasher(self) -> Any:
        # Equal to the engine core's, which has seeded the hashes by the time a member comes.
        hash_of = get_hash_fn_by_name(self._vllm_config.cache_config.prefix_caching_hash_algo)
        return get_request_block_hasher(self._hash_block_size, hash_of)
