"""The messages between a coordinator and its engines, and what they may rely on.

The coordinator sends to each engine in order, and what it sends arrives in order or not at all (a pipe). An engine that
misses one is put out, and joins again. So the state of an engine is a function of `Join` and of the commits after it.

Answers may come late, twice or never. A shard's cells do not depend on who scored it, so the first answer counts.

Every message carries the *epoch* of its coordinator. A coordinator that takes over a job has a higher one; engines
ignore messages of a lower one, and a coordinator ignores answers of another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_zo.checkpoint.seed_log.header import SeedLogHeader
from vllm_zo.commands import Command
from vllm_zo.engine.group import Work
from vllm_zo.engine.rollouts import Cost
from vllm_zo.methods.plan import ModuleShape, ProbePlan

# --- to an engine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Join:
    """Make the state that the job has after its first `steps` steps, from its log, and get ready to score."""

    epoch: int
    job_dir: str
    steps: int


@dataclass(frozen=True)
class Score:
    """Score a shard of a step, or a piece of an evaluation, in the state that the commits so far have made.

    Attributes:
        number: names the lease; the answer repeats it.
        plan: the shard's probes.
        example_ids: numbers of the examples in the training data, or in the validation data. For a plan of the base:
            in both, one behind the other.
        trains: whether it belongs to a training step.
        sampling_seeds: as those of `engine.group.Work`.
    """

    epoch: int
    number: int
    plan: ProbePlan
    example_ids: tuple[int, ...]
    trains: bool
    sampling_seeds: tuple[int, ...] = ()

    @classmethod
    def of(cls, epoch: int, number: int, work: Work) -> Score:
        """The message that asks for a work."""
        return cls(epoch, number, work.plan, work.example_ids, work.trains, work.sampling_seeds)


@dataclass(frozen=True)
class Commit:
    """What the workers of every engine do, in this order: apply a record, fold, publish, save."""

    epoch: int
    commands: tuple[Command, ...]


@dataclass(frozen=True)
class Stop:
    """Execute the commits that are left, then forget the job."""

    epoch: int


ToEngine = Join | Score | Commit | Stop

# --- from an engine ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """The engine has the state and is ready.

    Attributes:
        modules: that it trains.
        header: of the log that it would write by itself; None for a job without a log. All engines must agree on it.
        software: names and versions of what computes. All engines must agree on it, too.
    """

    epoch: int
    modules: tuple[ModuleShape, ...]
    header: SeedLogHeader | None
    software: str


@dataclass(frozen=True)
class Scored:
    """(probes, cells) scores of a shard or piece, float32 values; and what its rollouts have cost, if it had some."""

    epoch: int
    number: int
    cells: Sequence[Sequence[float]]
    cost: Cost | None = None


@dataclass(frozen=True)
class Stopped:
    """The engine has forgotten the job: because it was told to, or because of an error."""

    epoch: int
    error: str | None = None


@dataclass(frozen=True)
class Digested:
    """The digest of the engine's state after `steps` steps, which must be that of every other engine."""

    epoch: int
    steps: int
    digest: int


FromEngine = Joined | Scored | Digested | Stopped
