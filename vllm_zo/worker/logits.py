"""Members need no logits: vLLM computes them, over the whole vocabulary, for the last token of every request.

Members sample one greedy token that nobody reads, so their rows may hold anything: zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from vllm_zo.worker.scoring import upload


class ServingLogits:
    """Takes the place of `model.compute_logits`: logits of requests that are not members.

    Args:
        batch: the batch of the step that just ran, as the runner has it; None if there is none.
        wrappers: vLLM's LoRA kernels. An adapter on the LM head looks up the slot of each row there.
    """

    def __init__(self, model: Any, vocab_size: int, batch: Callable[[], Any], wrappers: Sequence[Any]) -> None:
        self.compute: Callable[..., Tensor | None] = model.compute_logits
        self.vocab_size = vocab_size
        self.batch = batch
        self.wrappers = wrappers if hasattr(model.logits_processor, "lora_a_stacked") else ()
        self._members: set[str] = set()
        model.compute_logits = self

    def expect(self, members: set[str]) -> None:
        """Request ids of the members of the step that begins. Logits are asked for at its end."""
        self._members = members

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """(rows, hidden size) -> (rows, vocabulary)."""
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
        """Rows of the sampling batch that are not members; None when there are no members or rows are not requests.

        The first logits of a step are those to sample from. Later ones are of prompt tokens (`prompt_logprobs`), whose
        number may happen to be that of the requests.
        """
        members, self._members = self._members, set()
        batch = self.batch() if members else None
        if batch is None or len(batch.req_ids) != rows:
            return None
        return [i for i, req_id in enumerate(batch.req_ids) if req_id not in members]

    @contextmanager
    def _rows_use(self, slots_of: Callable[[Any], Tensor | None]) -> Iterator[None]:
        """In the block, adapters of the LM head find these slots for the rows they are given; None leaves vLLM's."""
        found = [(wrapper, slots_of(wrapper)) for wrapper in self.wrappers]
        changed = [(wrapper, wrapper.sampler_indices.clone(), slots) for wrapper, slots in found if slots is not None]
        for wrapper, _, slots in changed:
            _set_sampler_slots(wrapper, slots)
        try:
            yield
        finally:
            for wrapper, whole, _ in changed:
                _set_sampler_slots(wrapper, whole)


def _slots_of_tokens(wrapper: Any, hidden_states: Tensor) -> Tensor | None:
    """For prompt tokens of one request (`prompt_logprobs`), a view of the step's hidden states; None for rows to sample
    from. vLLM 0.32 takes the slots of the first few requests of the batch, and fails where there are fewer of them than
    tokens."""
    if len(wrapper.sampler_indices) == len(hidden_states):
        return None
    first = hidden_states.storage_offset() // hidden_states.stride(0)
    return wrapper.token_lora_indices[first : first + len(hidden_states)]


def _set_sampler_slots(wrapper: Any, slots: Tensor) -> None:
    wrapper._sampler_indices[: len(slots)] = slots
    wrapper.indices_len[1] = len(slots)
    if hasattr(wrapper, "prompt_mapping_meta"):  # of the Triton kernels
        wrapper.prompt_mapping_meta.prepare_tensors(wrapper.sampler_indices)
