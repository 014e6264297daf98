"""Logits for the requests that are not members.

vLLM computes logits over the whole vocabulary for the last token of every request. Members need none: vLLM samples one
token for them that is not used, so their rows may hold any finite number. They hold zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from vllm_zo.upload import upload
from vllm_zo.worker.patches import COMPUTE_LOGITS


class ServingLogits:
    """Takes the place of `model.compute_logits`: computes the logits of requests that are not members.

    Args:
        model: vLLM's model.
        vocab_size: of the model.
        batch: returns the runner's batch of the step that just ran, or None.
        wrappers: vLLM's LoRA kernels, if the LM head can have adapters: these look up the slot of each row there.
        slots_changed: is called with a wrapper after its slots of the rows to sample from were set.
    """

    def __init__(
        self,
        model: Any,
        vocab_size: int,
        batch: Callable[[], Any],
        wrappers: Sequence[Any],
        slots_changed: Callable[[Any], None],
    ) -> None:
        self.compute: Callable[..., Tensor | None] = model.compute_logits
        self.vocab_size = vocab_size
        self.batch = batch
        self.slots_changed = slots_changed
        self.wrappers = wrappers
        self._members: set[str] = set()
        COMPUTE_LOGITS.on(model, "compute_logits", self)

    def expect(self, members: set[str]) -> None:
        """Set the request ids of the members of the step that begins. vLLM asks for logits later in the step."""
        self._members = members

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """Logits (rows, vocabulary) of hidden states (rows, D). None if vLLM gives none on this rank."""
        serving = self._serving_rows(len(hidden_states))
        if serving is None:
            with self._rows_use(lambda wrapper: _slots_of_tokens(wrapper, hidden_states)):
                return self.compute(hidden_states, *args, **kwargs)
        if not serving:
            return hidden_states.new_zeros((len(hidden_states), self.vocab_size))
        rows = upload(serving, hidden_states.device)
        with self._rows_use(lambda wrapper: wrapper.sampler_indices[rows]):
            logits = self.compute(hidden_states[rows], *args, **kwargs)
        if logits is None:
            return None
        return logits.new_zeros((len(hidden_states), logits.shape[-1])).index_copy_(0, rows, logits)

    def _serving_rows(self, rows: int) -> list[int] | None:
        """The rows to sample from that belong to no member. None if the step has no members, or if the rows are not one
        for each request.
        """
        # vLLM first asks for the logits to sample from, and later in the step for those of prompt tokens
        # (`prompt_logprobs`). Their number can equal that of the requests, so only the first call knows the members.
        members, self._members = self._members, set()
        batch = self.batch() if members else None
        if batch is None or len(batch.req_ids) != rows:
            return None
        return [i for i, req_id in enumerate(batch.req_ids) if req_id not in members]

    @contextmanager
    def _rows_use(self, slots_of: Callable[[Any], Tensor | None]) -> Iterator[None]:
        """In the block, adapters of the LM head use the slots that `slots_of` gives for a wrapper, or, where it gives
        None, those that vLLM has set."""
        # Clones, because `sampler_indices` is a view of the buffer that `_set_sampler_slots` writes to.
        found = [(wrapper, slots_of(wrapper)) for wrapper in self.wrappers]
        changed = [(wrapper, wrapper.sampler_indices.clone(), slots) for wrapper, slots in found if slots is not None]
        for wrapper, _, slots in changed:
            self._set_sampler_slots(wrapper, slots)
        try:
            yield
        finally:
            for wrapper, whole, _ in changed:
                self._set_sampler_slots(wrapper, whole)

    def _set_sampler_slots(self, wrapper: Any, slots: Tensor) -> None:
        # Private: vLLM has no setter. `sampler_indices` is a view of this buffer's first `indices_len[1]` entries.
        wrapper._sampler_indices[: len(slots)] = slots
        wrapper.indices_len[1] = len(slots)
        self.slots_changed(wrapper)


def _slots_of_tokens(wrapper: Any, hidden_states: Tensor) -> Tensor | None:
    """The slots of hidden states (T, D) that are prompt tokens of one request (`prompt_logprobs`); None if they are
    rows to sample from.

    Without this, vLLM 0.32 uses the slots of the batch's first requests, and fails if there are fewer requests than
    tokens.
    """
    if len(wrapper.sampler_indices) == len(hidden_states):
        return None
    # vLLM passes prompt tokens as a view of the step's hidden states: the view's offset tells its first row.
    first = hidden_states.storage_offset() // hidden_states.stride(0)
    return wrapper.token_lora_indices[first : first + len(hidden_states)]
