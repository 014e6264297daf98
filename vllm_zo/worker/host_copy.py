"""Results of closed groups on their way to the host, beside the steps that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_zo.commands import GroupResult


@dataclass
class PendingGroup:
    """A closed group whose numbers are on their way."""

    group_id: str
    losses: Tensor
    predictions: Tensor
    coefficients: Tensor
    finite: Tensor
    arrived: torch.cuda.Event | None
    """None: they are there."""

    def resolve(self) -> GroupResult:
        """The only wait for the device, and not in the step."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return GroupResult(
            self.group_id,
            self.losses.tolist(),
            self.predictions.tolist(),
            self.coefficients.tolist(),
            bool(self.finite.item()),
        )


class HostCopies:
    """Copies on a stream of their own, as vLLM copies its sampled tokens.

    On the stream that computes, a copy asked for later would queue behind the next step: the host would hear of a step
    when the one after it is done, and the device would idle while the third is scheduled.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(
        self, group_id: str, losses: Tensor, predictions: Tensor, coefficients: Tensor, finite: Tensor
    ) -> PendingGroup:
        """Begin to copy what has been queued on the current stream so far."""
        if self._stream is None:
            return PendingGroup(group_id, losses, predictions, coefficients, finite, arrived=None)
        on_device = (losses, predictions, coefficients, finite)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            losses, predictions, coefficients, finite = (tensor.to("cpu", non_blocking=True) for tensor in on_device)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        for tensor in on_device:  # or its memory could be given to the next step before it is read
            tensor.record_stream(self._stream)
        return PendingGroup(group_id, losses, predictions, coefficients, finite, arrived)
