"""Copies from a GPU on a stream of their own, as vLLM copies its sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_zo.worker.host_copy import HostCopy


class CopyStream:
    """Copies tensors to the host on a stream of its own.

    On the stream that computes, a copy would queue behind the next step. The host would then get the result of a step
    only when the next one is done, and the device would idle while the host schedules the one after that.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(self, on_device: Sequence[Tensor]) -> HostCopy:
        """Begin to copy tensors, with the values that the work queued on the current stream so far gives them."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            tensors = [tensor.to("cpu", non_blocking=True) for tensor in on_device]
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        # Otherwise torch could give a tensor's memory to the next step before the copy has read it.
        for tensor in on_device:
            tensor.record_stream(self._stream)
        return HostCopy(tensors, arrived.synchronize)
