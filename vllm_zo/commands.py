"""What the scheduler tells the workers, and what they answer. Plain dataclasses: the leaf both sides import.

Commands ride on the `SchedulerOutput` of the engine step they belong to, so that every rank sees the same list with the
step itself; results ride back on the step's model output. Seeds and scalars travel, never tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_zo.methods.base import Method, ModuleShape, ProbePlan
from vllm_zo.objectives.base import EncodedExample, Objective

COMMANDS_ATTR = "worker_commands"
RESULTS_ATTR = "worker_results"
"""Attributes of vLLM's two messages: fields where `patches/0002` is in, plain attributes where it is not."""
UTILITY_METHODS = (
    "zo_start", "zo_status", "zo_stop", "zo_pause", "zo_resume", "zo_stats", "zo_restore_base",
)  # fmt: skip
"""Methods of the scheduler that a front end calls by name, as EngineCore utility calls."""
ADAPTER_SCHEME = "zo://"
"""`lora_path` of a published version: zo://<job_id>/<step>."""
SLOT_LORA_ID_BASE = 1 << 30
"""`lora_int_id` of ZO slot s is this plus s; user adapters count up from 1 and never get here."""


@dataclass(frozen=True)
class StartJob:
    """Make the adapter state of a job: zeros, or what `seed_log` says (a path every rank can read), helped by
    `snapshot`."""

    job_id: str
    seed: int
    method: Method
    objective: Objective
    update_space: str
    num_bases: int
    target_modules: str
    max_coefficient: float | None = None
    seed_log: str | None = None
    snapshot: str | None = None


@dataclass(frozen=True)
class StopJob:
    """Free the job's adapter state and slots; in `fold` space, keep or restore the base as told."""

    job_id: str
    restore_base: bool = False


@dataclass(frozen=True)
class Fold:
    """`W += U_acc V^T` for the current basis, then forget it. Before the first probe of the next basis."""

    job_id: str
    key: int
    """Seeds the stochastic rounding; the step that triggers the fold."""


@dataclass(frozen=True)
class OpenGroup:
    """Make a loss table for a perturbation group."""

    group_id: str
    job_id: str
    plan: ProbePlan
    examples: tuple[EncodedExample, ...]


@dataclass(frozen=True)
class Materialise:
    """Write probe `probe` of the group into `slot`: (accumulator + sign * eps * direction), from seeds and fp32
    state."""

    slot: int
    group_id: str
    probe: int


@dataclass(frozen=True)
class ScoreMember:
    """A member that has tokens in this step. `row` indexes the rows of the group's examples, flattened."""

    req_id: str
    group_id: str
    probe: int
    row: int
    num_computed_tokens: int


@dataclass(frozen=True)
class CloseGroup:
    """All members are scored by the end of this step: compute losses. With a `learning_rate` it is a training group:
    compute coefficients, and update unless the method wants another round."""

    group_id: str
    learning_rate: float | None
    cells: tuple[tuple[float, ...], ...] | None = None
    """(probes, cells) of a group whose members generated: the rewards, which the scheduler knows and the worker does
    not. None: the worker has scored the cells itself."""


@dataclass(frozen=True)
class DropGroup:
    """Forget a group that was cancelled; nothing changes."""

    group_id: str


@dataclass(frozen=True)
class Publish:
    """Write the job's accumulator to `path`: from now on `zo://<job_id>/<version>` can be served."""

    job_id: str
    version: int
    path: str


@dataclass(frozen=True)
class Snapshot:
    """Write the fp32 accumulator to `path` (atomically)."""

    job_id: str
    path: str
    step: int


Command = StartJob | StopJob | Fold | OpenGroup | Materialise | CloseGroup | DropGroup | Publish | Snapshot


@dataclass
class ZOCommands:
    """Everything the workers do for training in one engine step.

    `before` runs in order before the forward; `members` are scored after it; then `after` runs in order.
    """

    before: list[Command] = field(default_factory=list)
    members: list[ScoreMember] = field(default_factory=list)
    after: list[Command] = field(default_factory=list)
    alone: bool = False
    """Members are no requests of vLLM's in this step, which has no others either: the workers run them whole, in a
    forward of their own."""
    generates: bool = False
    """Members that generate have tokens in this step. vLLM samples for them as for any request."""

    def __bool__(self) -> bool:
        return bool(self.before or self.members or self.after or self.generates)


@dataclass
class GroupResult:
    """What one closed group measured.

    Attributes:
        losses: (P, E) nats per example, nested lists.
        predictions: (P, E) candidate indices.
        coefficients: (K,) as *applied*: zeros when a loss was not finite; empty for an evaluation group.
        finite: whether every loss was finite.
    """

    group_id: str
    losses: list[list[float]]
    predictions: list[list[int]]
    coefficients: list[float]
    finite: bool


@dataclass
class CommandFailed:
    """A command raised in the worker. The job stops with this message; serving goes on."""

    job_id: str
    message: str


@dataclass
class ZOResults:
    groups: list[GroupResult] = field(default_factory=list)
    failures: list[CommandFailed] = field(default_factory=list)
    modules: dict[str, list[ModuleShape]] = field(default_factory=dict)
    """job_id -> modules in scope, answered once after StartJob (the seed log's header wants them)."""
    members_alone: bool = False
    """Whether the worker can run members alone; said with `modules`."""
