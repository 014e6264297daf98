"""The commands of the scheduler to the workers, and their results: plain dataclasses that both sides import.

Commands ride on the `SchedulerOutput` of the engine step they belong to, so that every rank sees the same list together
with the step. Results ride back on the step's model output. Commands carry keys and scalars, never tensors. Every
command names its job: a command that fails ends that job and no other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_zo.checkpoint.seed_log.format import StepRecord
from vllm_zo.methods.base import Method
from vllm_zo.methods.plan import ModuleShape, ProbePlan
from vllm_zo.objectives.base import EncodedExample, Objective

COMMANDS_ATTR = "worker_commands"
RESULTS_ATTR = "worker_results"
"""Attributes of vLLM's `SchedulerOutput` and `ModelRunnerOutput`. `patches/0002` makes them fields; without it we set
plain attributes."""
UTILITY_METHODS = (
    "zo_start", "zo_status", "zo_stop", "zo_pause", "zo_resume", "zo_stats", "zo_restore_base", "zo_rollouts",
    "zo_tell", "zo_hear",
    "zo_extend", "zo_forget", "zo_drop",
)  # fmt: skip
"""Names of scheduler methods that a front end calls, as EngineCore utility calls."""
ADAPTER_SCHEME = "zo://"
"""`lora_path` of a published version: zo://<job_id>/<step>."""
PROBE_SCHEME = "zo-probe://"
"""`lora_path` of a probe while its group is open: zo-probe://<group_id>/<probe>."""
PROBE_NAME = "probe:"
"""Start of the model names of probes: probe:<job_id>/<step>/<probe>. They come and go with the steps of a job."""
SLOT_LORA_ID_BASE = 1 << 30
"""`lora_int_id` of ZO slot s is this plus s. vLLM counts user adapters up from 1, far below it."""


@dataclass(frozen=True)
class StartJob:
    """Make the adapter state of a job.

    Attributes:
        seed_log: path of the log from which to rebuild the state; None: the state is zero, or that of `snapshot`.
        upto: how many steps of the log the state has; None: all.
        trains: whether the job has steps; an evaluation has none.
        snapshot: path of a snapshot; with a log, the workers replay only the steps after it. Every rank reads both.
        versions: step -> path of each version that the job has published before it was interrupted.
    """

    job_id: str
    seed: int
    method: Method
    objective: Objective
    update_space: str
    num_bases: int
    target_modules: str
    target_layers: str | None = None
    max_coefficient: float | None = None
    trains: bool = True
    seed_log: str | None = None
    upto: int | None = None
    snapshot: str | None = None
    versions: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StopJob:
    """Free the job's adapter state and slots; with `restore_base`, also bring the original base weights back."""

    job_id: str
    restore_base: bool = False


@dataclass(frozen=True)
class Fold:
    """`W += U_acc V^T` for the current basis, then zero the accumulator. It comes before the first probe of the next
    basis."""

    job_id: str
    key: int
    """Key of the stochastic rounding; `replay.fold_key` derives it from the step that triggers the fold."""


@dataclass(frozen=True)
class OpenGroup:
    """Make a loss table for a perturbation group."""

    job_id: str
    group_id: str
    plan: ProbePlan
    examples: tuple[EncodedExample, ...]


@dataclass(frozen=True)
class Materialise:
    """Write probe `probe` of the group into `slot`: accumulator + sign * eps * direction, from keys and float32
    state."""

    job_id: str
    group_id: str
    slot: int
    probe: int


@dataclass(frozen=True)
class ScoreMember:
    """A member that has tokens in this step. `sequence` indexes the group's sequences (`flatten_sequences`). It is
    scored with each of `probes`, which differ in the LM head alone if there are several."""

    job_id: str
    group_id: str
    req_id: str
    probes: tuple[int, ...]
    sequence: int
    num_computed_tokens: int


@dataclass(frozen=True)
class CloseGroup:
    """Compute the losses of a group, whose members are all scored by the end of this step. A training group has a
    `learning_rate`: compute its coefficients and update, too."""

    job_id: str
    group_id: str
    learning_rate: float | None
    cells: tuple[tuple[float, ...], ...] | None = None
    """(probes, cells) rewards of a group that has some: they are computed outside the workers. None: the worker has
    scored the cells itself."""


@dataclass(frozen=True)
class ReportCells:
    """Answer with the cells of a group, whose members are all scored by the end of this step, and forget the group.

    It is a shard of a training step: who has the cells of all shards decides, and `ApplyRecord` follows.
    """

    job_id: str
    group_id: str
    cells: tuple[tuple[float, ...], ...] | None = None
    """As those of `CloseGroup`."""


@dataclass(frozen=True)
class ApplyRecord:
    """Take a training step whose coefficients are decided: update the state as a replay of the record does."""

    job_id: str
    record: StepRecord


@dataclass(frozen=True)
class MeasureV:
    """Make V of what entered the modules in the job's groups of the base, and write the state to `path`."""

    job_id: str
    path: str


@dataclass(frozen=True)
class SizeU:
    """Give the rows of the job's U the sizes that follow from how often each token is written, and write the state to
    `path`; None: another command will."""

    job_id: str
    path: str | None
    counts: tuple[tuple[int, int], ...]
    """(token, how often it is written)."""


@dataclass(frozen=True)
class ForgetRows:
    """Let go of what is kept of the job's sequences from step to step: its next steps score others."""

    job_id: str


@dataclass(frozen=True)
class DropGroup:
    """Forget a cancelled group, which changes nothing."""

    job_id: str
    group_id: str


@dataclass(frozen=True)
class Publish:
    """Write the job's accumulators to `path`. From then on the engine can serve `zo://<job_id>/<version>`."""

    job_id: str
    version: int
    path: str
    measure: bool = False
    """Answer with the norm of the update (`Drift`)."""


@dataclass(frozen=True)
class Unpublish:
    """Remove a version and its file: newer ones have taken its place."""

    job_id: str
    version: int
    path: str


@dataclass(frozen=True)
class ForgetVersions:
    """Serve no version of a job any more. Their files stay."""

    job_id: str


@dataclass(frozen=True)
class Snapshot:
    """Write the float32 accumulators and the optimizer's state to `path`, atomically."""

    job_id: str
    path: str
    step: int


@dataclass(frozen=True)
class ReportDigest:
    """Answer with the digest of the job's state (`AdapterState.digest`), which has `steps` steps."""

    job_id: str
    steps: int


Command = (
    StartJob | StopJob | Fold | OpenGroup | Materialise | CloseGroup | ReportCells | ApplyRecord | MeasureV | SizeU
    | ForgetRows | DropGroup | Publish | Unpublish | ForgetVersions | Snapshot | ReportDigest
)  # fmt: skip


@dataclass(frozen=True)
class Alone:
    """vLLM schedules no member in this step. The workers run each member's whole sequence themselves, in one forward
    outside vLLM's request path. Without members they go on with such a forward that has stopped.

    Attributes:
        doorbell: where they look between layers whether a request has come (`doorbell.py`). Then the forward stops, and
            so does what comes after it. None: only `layers` stops it.
        layers: the most layers that it runs in this step; None: as many as it has.
    """

    doorbell: str | None = None
    layers: int | None = None


@dataclass
class ZOCommands:
    """Everything that the workers do for training in one engine step.

    They execute `before` in order, then the forward, score `members`, and execute `after` in order. A forward that has
    stopped comes before everything else that they are told.
    """

    before: list[Command] = field(default_factory=list)
    members: list[ScoreMember] = field(default_factory=list)
    after: list[Command] = field(default_factory=list)
    alone: Alone | None = None
    generates: bool = False
    """Members that generate have tokens in this step. vLLM samples for them as for any request."""

    @property
    def more(self) -> bool:
        """Whether they are told more than to go on with a forward that has stopped."""
        return bool(self.before or self.members or self.after or self.generates)

    def __bool__(self) -> bool:
        return self.more or self.alone is not None


@dataclass
class GroupResult:
    """What one closed group measured.

    Attributes:
        losses: (P, E) nats per example, nested lists.
        predictions: (P, E) candidate indices.
        coefficients: (K,) as the step *applied* them: zeros when a loss was not finite; empty for an evaluation group.
        finite: whether every loss, and in training every coefficient, was finite.
    """

    group_id: str
    losses: list[list[float]]
    predictions: list[list[int]]
    coefficients: list[float]
    finite: bool


@dataclass
class GroupCells:
    """The (probes, cells) scores of a group that was asked to report them, float32 values. NaN: it was not scored."""

    group_id: str
    cells: list[list[float]]


@dataclass
class StateDigest:
    """The digest of a job's state after `steps` steps. Equal states have equal digests."""

    job_id: str
    steps: int
    digest: int


@dataclass
class CommandFailed:
    """A command raised in the worker. The job stops with this message; serving goes on."""

    job_id: str
    message: str


@dataclass
class Unpublished:
    """A version that the disk refused. The engine cannot serve it; the job goes on."""

    job_id: str
    version: int


@dataclass
class Drift:
    """How far a version is from the base: the Frobenius norm of its update."""

    job_id: str
    version: int
    norm: float


@dataclass
class ZOResults:
    """Everything that the workers answer in one engine step."""

    groups: list[GroupResult | GroupCells] = field(default_factory=list)
    unpublished: list[Unpublished] = field(default_factory=list)
    drifts: list[Drift] = field(default_factory=list)
    failures: list[CommandFailed] = field(default_factory=list)
    digests: list[StateDigest] = field(default_factory=list)
    modules: dict[str, list[ModuleShape]] = field(default_factory=dict)
    """job_id -> modules in scope, once after StartJob: the header of the seed log holds them."""
    layers_alone: int = 0
    """After how many layers a forward of members alone may stop: 1 if only at its end, 0 if the worker cannot run
    members alone. Valid in an answer that has `modules`."""
    stopped_at: int | None = None
    """How many layers the forward has run that stopped in this step; None: none has."""
    layer_rows: tuple[int, ...] = ()
    """How many rows each layer of the forward of members alone computes that began in this step; () if none did. No
    reason to answer by itself."""

    def __bool__(self) -> bool:
        answers = self.groups or self.unpublished or self.drifts or self.failures or self.digests or self.modules
        return bool(answers) or self.stopped_at is not None
