"""A CPU forward that has only members, outside vLLM's batch, and that can stop between layers.

What enters the layer where it stops is all that it keeps. To go on, the model is called again: layers that have run
return no rows, and the next one gets what was kept. So a forward that has stopped gives the same bits as one that has
not, whatever the engine does meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import set_forward_context

from vllm_zo.worker.cpu.pruned_forward import Forward, RowPruner
from vllm_zo.worker.platform import Chunk


class Stopped(Exception):
    """Leaves the model's forward between two layers."""


class AloneForward(Forward):
    """See `ForwardAlone`. It stops only where the layers of the model are found (`RowPruner.decoder`).

    Args:
        chunks, slots: see `Platform.forward_alone`.
    """

    def __init__(self, pruner: RowPruner, chunks: Sequence[Chunk], slots: Sequence[int]) -> None:
        slots_T = torch.tensor(slots).repeat_interleave(torch.tensor([chunk.rows for chunk in chunks]))
        super().__init__(pruner, pruner.plan_of(chunks), slots_T)
        self.reached = 0
        layers = 1 if pruner.decoder is None else len(pruner.decoder.layers)
        lower, rows = (0, 0) if self.below is None else (self.below.layer, len(self.below.rows_B))
        lower = min(lower, layers - 1)  # the work of an LM head that is trained alone counts as the last layer's
        self.layer_rows = (rows,) * lower + (len(self.plan.keep_U),) * (layers - lower)
        self._chunks = chunks
        self._stop: Callable[[int], bool] = lambda gone: False
        self._began = 0
        """Number of the layer at which the last `go_on` began."""
        self._kept: tuple[Sequence[Any], Mapping[str, Any], int | None] | None = None
        """What enters layer `reached`, and `_attentions_before` there, after the forward has stopped."""

    def go_on(self, stop: Callable[[int], bool]) -> Tensor | None:
        """See `ForwardAlone`."""
        self._stop, self._began = stop, self.reached
        if not self.reached:  # it has run no layer: it begins again
            self._kept, self._attentions_before = None, self.first_attentions
        runner = self.pruner.runner
        # Private: vLLM skips `update_metadata` if the batch's mapping is that of the step before, and would leave the
        # slots of this forward in the wrappers.
        runner.lora_manager._adapter_manager._last_mapping = None
        # No attention metadata: `_attention` answers every layer without vLLM's attention.
        context = set_forward_context(None, runner.vllm_config, num_tokens=len(self.keep))
        try:
            with context, self:
                return self.final_hidden(self._run_model)
        except Stopped:
            return None

    def _run_model(self) -> Tensor:
        token_ids = torch.tensor([token for chunk in self._chunks for token in chunk.token_ids])
        positions = torch.tensor([place for chunk in self._chunks for place in range(chunk.rows)])
        # By name, as vLLM's runner calls it: some models take the first two by position only.
        hidden: Tensor = self.pruner.runner.model(
            input_ids=token_ids[self.keep], positions=positions[self.keep], intermediate_tensors=None
        )
        return hidden

    def layer(self, index: int, original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if index < self.reached:
            assert self.pruner.decoder is not None
            return self.pruner.decoder.of_no_rows
        if self._kept is not None:
            # Before `Forward.layer`, which would take `of_no_rows` for what came out of the layers below.
            kept_args, kept_kwargs, self._attentions_before = self._kept
            args = [_or_kept(now, kept) for now, kept in zip(args, kept_args, strict=True)]
            kwargs = {name: _or_kept(now, kept_kwargs[name]) for name, now in kwargs.items()}
            self._kept = None
        return super().layer(index, original, args, kwargs)

    def run_layer(
        self, index: int, original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        if self._stop(index - self._began):
            self.reached, self._kept = index, (args, kwargs, self._attentions_before)
            self._attentions_before = None  # no linear layer of the replay before layer `reached` is the first one
            raise Stopped
        return super().run_layer(index, original, args, kwargs)


def _or_kept(now: Any, kept: Any) -> Any:
    """An argument of the layer that goes on: as kept where it comes from a layer that has run (`of_no_rows`), as it is
    now where the model itself passes it, such as positions."""
    return kept if isinstance(now, Tensor) and not len(now) else now
