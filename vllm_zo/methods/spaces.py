"""Update spaces: where a job's update lives, which method runs in which, and which basis a step takes.

bank   The job never writes the base weights. V cycles through M bases, and each basis has an accumulator. The adapter
       is M * r wide and exact, and the engine can serve it at any moment.
fold   The worker adds `U_acc V^T` to W before every refresh of V, which is the method as published. The engine then
       belongs to this job alone.
"""

from __future__ import annotations

from vllm_zo.methods import Method
from vllm_zo.validation import check_known

SPACES = ("bank", "fold")


def check_space(method: Method, space: str) -> None:
    """Check that a space exists and that the method can run in it.

    Raises:
        ConfigError: one of the two does not hold.
    """
    check_known("update_space", space, SPACES)
    method.check_space(space)


def basis_of(method: Method, step: int, space: str, num_bases: int) -> int:
    """The index of the basis at `step`. In `bank` the bases return in turn; in `fold` every refresh has a new one."""
    epoch = method.epoch(step)
    return epoch % num_bases if space == "bank" else epoch


def num_intervals(method: Method, steps: int) -> int:
    """How many intervals a run of `steps` has, at least 1. For LoZO that is ceil(steps / interval)."""
    return method.epoch(steps - 1) + 1 if steps else 1


def equals_published(method: Method, space: str, steps: int, num_bases: int) -> bool:
    """Whether the run equals the published algorithm: in `bank` if no basis returns (LoZO: steps <= M * interval)."""
    if method.coordinates.measured:  # no paper's
        return False
    return space == "fold" or num_intervals(method, steps) <= num_bases
