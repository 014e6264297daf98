"""Results of closed groups on their way to the host, while the next steps run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from vllm_zo.commands import GroupCells, GroupResult


@dataclass(frozen=True)
class HostCopy:
    """Tensors that are on the host once `wait` has returned. `wait` is None if they are there already."""

    tensors: Sequence[Tensor]
    wait: Callable[[], object] | None = None

    def read(self) -> Sequence[Tensor]:
        """The tensors, once they are on the host."""
        if self.wait is not None:
            self.wait()
        return self.tensors


@dataclass(frozen=True)
class PendingGroup:
    """A closed group. Its losses, predictions, coefficients and finite flag are being copied to the host."""

    group_id: str
    numbers: HostCopy

    def resolve(self) -> GroupResult:
        """Wait for the copy and read it.

        A training step waits for the device here and nowhere else. With asynchronous scheduling vLLM reads the output
        of a step after it has begun the next one, so the device does not idle meanwhile.
        """
        losses, predictions, coefficients, finite = self.numbers.read()
        return GroupResult(
            self.group_id, losses.tolist(), predictions.tolist(), coefficients.tolist(), bool(finite.item())
        )


@dataclass(frozen=True)
class PendingCells:
    """The cells of a group that reports them, on their way to the host."""

    group_id: str
    numbers: HostCopy

    def resolve(self) -> GroupCells:
        """Wait for the copy and read it."""
        (cells_PC,) = self.numbers.read()
        return GroupCells(self.group_id, cells_PC.tolist())


Pending = PendingGroup | PendingCells
