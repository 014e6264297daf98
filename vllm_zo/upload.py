"""Copies small tables from the host to a device, without waiting for the copy.

The tables are first put into pinned memory, because a copy from pageable memory to a GPU makes the host wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(values: Sequence[Any], device: torch.device) -> Tensor:
    """Integers, or sequences of integers of one length, as int64 on the device: (n,) or (n, length)."""
    # The pinned tensor may be freed here: torch does not use its memory again before the copy has read it.
    staged = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return staged.to(device, non_blocking=True)


def upload_into(out: Tensor, values: np.ndarray) -> None:
    """`out[:len(values)] = values`, in the type of `out`; values: (n, ...). `out` keeps its address, which captured
    CUDA graphs know."""
    staged = torch.empty(values.shape, dtype=out.dtype, pin_memory=out.device.type == "cuda")
    staged.copy_(torch.from_numpy(values))
    out[: len(values)].copy_(staged, non_blocking=True)
