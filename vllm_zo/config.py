"""What a user may set: engine options (`zo_training=`) and job options (`finetune`, `vllm-zo train`, OpenAI API)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args

from vllm_zo.errors import ConfigError
from vllm_zo.hours import Hours
from vllm_zo.methods import METHODS, LoZO, Method
from vllm_zo.methods.layers import NAMED, SYNTAX, check_layers
from vllm_zo.methods.schedules import LR_SCHEDULES, LRSchedule
from vllm_zo.methods.spaces import SPACES, check_space
from vllm_zo.methods.step_size import AUTO
from vllm_zo.methods.targets import EMBEDDINGS, LM_HEAD, PRESETS, target_pattern
from vllm_zo.objectives import OBJECTIVES, GeneratingObjective, Objective, ReferencedObjective, Rollout
from vllm_zo.objectives.base import steps_per_generation
from vllm_zo.objectives.shared_options import PANEL
from vllm_zo.options import check_options, option
from vllm_zo.registry import describe
from vllm_zo.slot_fit import MANY_STEPS, SLOT_RANKS
from vllm_zo.validation import check_int, check_keys, check_unicode, reject

OPTIMISATION, RESULTS, CONTINUAL = "Optimisation", "Evaluation and results", "Jobs that go on"
"""Headings of `vllm-zo train --help`."""
OnLong = Literal["error", "drop", "truncate-left"]
BufferPolicy = Literal["newest", "reservoir", "mixed"]
BUFFER_POLICIES: tuple[str, ...] = get_args(BufferPolicy)
CONTINUAL_INTERVAL = 100
"""Steps between the versions of a continual job, where nothing else is said."""
MAX_BUFFER_ROWS = 1_000_000
MAX_SEED = 2**63 - 1
"""The largest signed 64-bit integer."""
MAY_DIFFER_ON_RESUME = frozenset(
    {
        "output_dir", "checkpoint_interval", "publish_interval", "eval_interval", "eval_examples", "keep_best",
        "divergence_factor", "max_seconds", "patience", "max_drift", "keep_versions",
    }
)  # fmt: skip
"""Job options that cannot change the trajectory of the parameters. They change what a run measures, what it keeps, and
when it stops."""


@dataclass(frozen=True, kw_only=True)
class ZOTrainingConfig:
    """Engine options: what the engine reserves for training when it starts.

    Example:
        >>> ZOTrainingConfig.from_user({"slot_rank": 32}).slot_rank
        32
    """

    slots: int = option(
        2,
        minimum=2,
        fix="a pair of probes needs 2",
        panel="Engine",
        help="Adapter slots of training. With 2 for each query, all probes run at once.",
    )
    """Adapter slots of one running job. The engine reserves them in addition to the user's `max_loras`. A pair of
    probes needs 2 slots; K directions that run at once need 2K."""
    concurrent_jobs: int = option(1, minimum=1, help="Most jobs at a time.")
    """Each of them has `slots` slots of its own. Further jobs wait for their turn."""
    slot_rank: int = option(16, choices=SLOT_RANKS, panel="Engine", help="Rank of a slot. It holds (bases + 1) * rank.")
    """A value that vLLM accepts as `max_lora_rank`. (bases + 1) times the method's rank must fit into it."""
    token_budget: int | None = option(
        None, minimum=1, fix="None sets no limit", help="Most member tokens in a step that also serves requests."
    )
    """On the average of such steps: a sequence that is longer starts once in several steps. None sets no limit beyond
    the engine's own."""
    slowdown: float | None = option(
        None,
        above=1,
        fix="None sets no target",
        help="How many times as long training may make what requests wait for.",
    )
    """1.1: a tenth longer (`engine/pacing.py`). None sets no target: then training takes what serving leaves."""
    window: str | None = option(None, text="two times of day", help='When jobs run: "22:00-06:00", local time.')
    """None: at any time."""
    idle_only: bool = option(False, help="Jobs run only while there are no requests.")
    """Not in an engine step that also serves, whatever `slowdown` would allow."""
    kept_states_mib: int = option(
        256, minimum=0, panel="Engine", help="MiB for hidden states below the first trained layer; 0 keeps none."
    )
    """A job with `target_layers` keeps what enters its first layer, an example at a time, until this is full. Later
    jobs use it too; what no job uses goes when the room is needed."""
    state_dir: str | None = option(None, text="a directory", help="Where jobs keep logs and snapshots.")
    """None stands for a fresh temporary directory; the log names it."""

    def __post_init__(self) -> None:
        check_options(self, "zo_training.")
        if self.window is not None:
            Hours.read("zo_training.window", self.window)

    @property
    def total_slots(self) -> int:
        """How many slots the engine reserves in its stacked LoRA tensors."""
        return self.slots * self.concurrent_jobs

    @classmethod
    def from_user(cls, value: bool | Mapping[str, Any] | ZOTrainingConfig) -> ZOTrainingConfig | None:
        """The options that `LLM(zo_training=...)` stands for. True gives the defaults, False gives None.

        Raises:
            ConfigError: the value has another type, an option is unknown (the message has the nearest name), or a value
                is out of range.
        """
        if isinstance(value, ZOTrainingConfig):
            return value
        if isinstance(value, bool):
            return cls() if value else None
        if not isinstance(value, Mapping):
            reject("zo_training", value, "True, False or a dictionary of options")
        check_keys("zo_training option", value, [f.name for f in fields(cls)])
        return cls(**value)

    @classmethod
    def of_engine(cls, additional_config: Mapping[str, Any]) -> ZOTrainingConfig:
        """The options with which an engine was started. vLLM's `additional_config` holds them as plain values."""
        return cls(**additional_config["zo_training"])


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Job options. They decide the trajectory of a run, together with the data and the model."""

    objective: Objective
    """It defines the loss, e.g. Classification(template=..., options=[...])."""
    method: Method = field(default_factory=LoZO)
    """The estimator and its update rule."""
    on_long: OnLong = option(
        "error",
        choices=get_args(OnLong),
        panel=PANEL,
        help=f"What to do with rows that are too long: {', '.join(get_args(OnLong))}.",
    )
    """A row is too long if the engine's `max_model_len` has no room for it. "drop" leaves it out. "truncate-left" drops
    tokens from the front of its prompt, behind the token that starts it; what is scored stays whole."""
    learning_rate: float | str = option(
        AUTO,
        minimum=0,
        word=AUTO,
        fix=f"{AUTO!r} finds one",
        metavar="FLOAT|auto",
        panel=OPTIMISATION,
        help="Step size. auto measures one in the first steps.",
    )
    """The rate before the schedule. With 0 a run changes nothing. With "auto" the run measures the rate in its first 10
    steps, which do not move yet, and lowers eps where probes go too far (methods/step_size.py). LoZO's paper uses 1e-7
    for OPT-13B."""
    learning_rate_multiplier: float = option(1.0, above=0, panel=OPTIMISATION, help="Multiplies the learning rate.")
    """The factor to change where the learning rate is "auto"."""
    lr_schedule: LRSchedule = option(
        "constant", choices=LR_SCHEDULES, panel=OPTIMISATION, help=f"{', '.join(LR_SCHEDULES)}."
    )
    """"linear" and "cosine" decay to 0 at the end of the run."""
    warmup_steps: int = option(0, minimum=0, panel=OPTIMISATION, help="Steps of linear warm-up.")
    """They are part of `steps`."""
    batch_size: int = option(16, minimum=1, panel=OPTIMISATION, help="Examples a step.")
    """Every probe of a step scores the same examples. A group may be larger than what the engine runs at once; it then
    takes several engine steps."""
    micro_batches: int = option(1, minimum=1, panel=OPTIMISATION, help="Mini-batches for each step.")
    """Each has `batch_size` examples, as in gradient accumulation."""
    eps_schedule: LRSchedule = option(
        "constant", choices=LR_SCHEDULES, panel=OPTIMISATION, help=f"{', '.join(LR_SCHEDULES)}; of the probe radius."
    )
    """"linear" and "cosine" shrink the probe radius to a tenth at the end of the run."""
    shards: int | None = option(
        None,
        minimum=1,
        fix="None scores a step whole",
        panel=OPTIMISATION,
        help="Parts in which a step is scored, on one engine or several. Unset: whole, decided on the device.",
    )
    """A part is a batch of its own, so the number is a property of the run: with equal parts, any number of engines
    takes the same steps."""
    deadline: float | None = option(
        None,
        above=0,
        fix="None waits for all",
        panel=OPTIMISATION,
        help="On several engines: seconds after which a step drops directions without a score. Unset: it waits.",
    )
    """At most half of a step's directions are dropped, and their coefficients in the log are zero. Whether one is late
    depends on the machines, so such a run does not repeat; its log replays as any other."""
    max_coefficient: float | None = option(
        None,
        above=0,
        fix="None sets no limit",
        panel=OPTIMISATION,
        help="The largest size of a coefficient; larger ones are cut to it. Unset: no limit.",
    )
    """The largest absolute coefficient of a direction (a projected gradient divided by K)."""
    continual: bool = option(False, panel=CONTINUAL, help="No last step: rows may be appended while the job runs.")
    """It ends when it is stopped. `steps` then has no meaning, and rates and radii cannot decay towards an end."""
    steps: int = option(1000, minimum=0, panel=OPTIMISATION, help="Optimiser steps; 0 evaluates only.")
    max_seconds: float | None = option(
        None,
        above=0,
        fix="None sets no limit",
        panel=OPTIMISATION,
        help="Seconds after which a run takes no further step. Unset: no limit.",
    )
    """The step that is under way is finished; then the run evaluates, publishes and succeeds, as after its last step.
    The time while a job rests or waits for a lane does not count; a resumed run counts anew."""
    seed: int = option(
        0, minimum=0, maximum=MAX_SEED, panel=OPTIMISATION, help="Decides batch order and every direction."
    )
    update_space: str | None = option(
        None, choices=SPACES, panel="Method", help=f"{' or '.join(SPACES)}. Unset: the method's first."
    )
    """"bank" leaves the base weights untouched. "fold" writes the updates into them, as the papers do."""
    bases: int | None = option(
        None,
        minimum=1,
        fix="None derives it from steps and slot_rank",
        panel="Method",
        help="Bases that `bank` keeps. Unset: one for each interval, as many as a slot holds.",
    )
    target_modules: str = option(
        "all-linear",
        text=f"one of {', '.join(PRESETS)}, or a regular expression",
        panel="Method",
        help=f"{', '.join(PRESETS)}, or a regular expression for whole names.",
    )
    """An expression must match whole Hugging Face module names."""
    target_layers: str | None = option(
        None,
        text=SYNTAX,
        fix="None trains all layers",
        metavar="LAYERS",
        panel="Method",
        help=f"Layers to train: '20:', '-10:', '0,5,20:25', {', '.join(NAMED)}. Unset: all.",
    )
    """What is below the first of them is computed once an example, not once a probe, and kept from step to step as far
    as `kept_states_mib` goes. Embeddings and LM head are not in a layer: `target_modules` alone decides about them."""
    eval_interval: int | None = option(
        None,
        minimum=1,
        fix="None evaluates at the start and the end only",
        panel=RESULTS,
        help="Steps between evaluations. Unset: at the start and the end.",
    )
    patience: int | None = option(
        None,
        minimum=1,
        fix="None never stops a run early",
        panel=RESULTS,
        help="Stop when so many evaluations in a row bring no better loss. Unset: never.",
    )
    """The run then ends as after its last step, and gives back the state of its best evaluation."""
    eval_examples: int | None = option(
        None,
        minimum=1,
        fix="None evaluates on all",
        panel=RESULTS,
        help="Validation examples an evaluation scores. Unset: all.",
    )
    """They come from the front of the validation data."""
    checkpoint_interval: int = option(
        1000, minimum=1, panel=RESULTS, help="Steps between snapshots (the seed log has every step)."
    )
    """The seed log alone rebuilds every step; a snapshot (float32) makes resuming instant."""
    publish_interval: int | None = option(
        None,
        minimum=1,
        fix="None publishes at evaluations only",
        panel=RESULTS,
        help="Steps between versions that can be served. Unset: evaluations.",
    )
    output_dir: str | None = option(None, text="a directory", help="Directory for the result.")
    """None stands for the job's folder in the engine's state directory."""
    keep_best: bool = option(
        True,
        flag="--keep-best/--keep-last",
        panel=RESULTS,
        help="Give back the state of the best evaluation (default), or of the last step.",
    )
    """With validation data, True gives back the state with the lowest validation loss. Without, a run always gives back
    its last state."""
    divergence_factor: float | None = option(
        3.0,
        minimum=1,
        fix="None turns the guard off",
        panel=RESULTS,
        help="Stop when the loss has grown by about this factor.",
    )
    """A run stops when the mean training loss of its last 10 steps exceeds this factor times that of its first 10, plus
    1 nat, or when the losses of 10 steps in a row are not finite. Without the 1 nat, noise would stop a run that starts
    near zero. With None only losses that are not finite stop a run."""

    buffer_rows: int = option(
        4096, minimum=1, maximum=MAX_BUFFER_ROWS, panel=CONTINUAL, help="Most rows that steps are drawn from."
    )
    """Of the policy "mixed": the most appended ones."""
    buffer_policy: BufferPolicy = option(
        "newest", choices=BUFFER_POLICIES, panel=CONTINUAL, help=f"Which rows stay: {', '.join(BUFFER_POLICIES)}."
    )
    """The newest rows; a uniform sample of all so far; or all that the job began with and the newest appended ones,
    half of a mini-batch of either (data/buffer.py)."""
    max_drift: float | None = option(
        None,
        above=0,
        fix="None sets no limit",
        panel=CONTINUAL,
        help="Pause when the norm of the update exceeds this. Unset: no limit.",
    )
    """The Frobenius norm of the update over all trained weights, measured whenever a version is published."""
    keep_versions: int = option(8, minimum=2, panel=CONTINUAL, help="How many of the newest versions are kept.")
    """Older ones are removed, except those that a server still needs."""

    def __post_init__(self) -> None:
        # The dataclass is frozen: a plain assignment would raise.
        object.__setattr__(self, "method", METHODS.build(self.method))
        object.__setattr__(self, "objective", OBJECTIVES.build(self.objective))
        check_unicode("objective", describe(self.objective))
        check_options(self)
        if self.continual:
            self._check_continual()
        check_int("warmup_steps", self.warmup_steps, 0, self.steps, fix="warm-up is part of steps")
        # Last: it asks the method that was built above, about options that `check_options` has checked.
        self._check_scope()

    def _check_scope(self) -> None:
        check_space(self.method, self.space)
        if self.space == "fold" and self.bases not in (None, 1):
            raise ConfigError(f"bases={self.bases}: update_space='fold' keeps one basis; drop bases, or use 'bank'.")
        target_pattern(self.target_modules)
        if self.method.coordinates.measured:
            self._check_measures()
        if self.target_layers is not None:
            check_layers(self.target_layers)
            if self.target_modules in (EMBEDDINGS, LM_HEAD):
                raise ConfigError(
                    f"target_layers={self.target_layers!r}: target_modules={self.target_modules!r} is in no layer; "
                    "drop one of the two."
                )
        if self.space == "fold" and self.target_modules in (EMBEDDINGS, LM_HEAD):
            raise ConfigError(
                f"target_modules={self.target_modules!r}: update_space='fold' writes linear layers only; use 'bank' "
                "and a method that runs in it."
            )

    def _check_measures(self) -> None:
        coordinates = self.method.coordinates
        of_v, of_u = "what enters the LM head where the training rows are scored", "the tokens of the training rows"
        measured = f"{self.method.name}.{coordinates.measured} measures {of_v if coordinates.measures_v else of_u}"
        if self.target_modules != LM_HEAD:
            raise ConfigError(f"target_modules={self.target_modules!r}: {measured}; train {LM_HEAD!r} alone.")
        if self.continual:
            raise ConfigError(f"continual=True: {measured}, before the first step; later rows may be others.")
        # Where probes write, each step has other rows: what enters the head there is not what was measured.
        writes = isinstance(self.objective, GeneratingObjective) and self.objective.steps_per_generation is None
        if isinstance(self.objective, Rollout | ReferencedObjective) or (coordinates.measures_v and writes):
            normal = "v='normal'" if coordinates.measures_v else "u='normal'"
            raise ConfigError(f"objective={self.objective.name!r}: {measured}; use {normal}.")

    def _check_continual(self) -> None:
        if (steps := steps_per_generation(self.objective)) is not None:
            raise ConfigError(
                f"continual=True: steps_per_generation={steps} needs rows that do not change; drop one of the two."
            )
        object.__setattr__(self, "steps", MANY_STEPS)
        if self.publish_interval is None:
            object.__setattr__(self, "publish_interval", CONTINUAL_INTERVAL)
        for name in ("lr_schedule", "eps_schedule"):
            if (schedule := getattr(self, name)) != "constant":
                raise ConfigError(f"{name}={schedule!r}: a continual job has no end to decay to; use 'constant'.")
        if self.space != "bank":
            raise ConfigError(
                "update_space='fold': a continual job serves its versions; use 'bank', and a method for it."
            )
        if isinstance(self.objective, Rollout | ReferencedObjective):
            raise ConfigError(
                f"objective={self.objective.name!r}: a continual job takes rows that the engine can score or write by "
                "itself."
            )
        if self.examples_per_step > self.buffer_rows:
            raise ConfigError(
                f"buffer_rows={self.buffer_rows}: a step draws {self.examples_per_step} rows; raise it, or lower "
                "batch_size."
            )

    def check_evaluates(self, has_validation: bool) -> None:
        """Refuse a run that can never stop early although it should.

        Raises:
            ConfigError: `patience` is set, and the run has no evaluations to count.
        """
        if self.patience is not None and (self.eval_interval is None or not has_validation):
            missing = "validation data" if self.eval_interval else "eval_interval, the steps between evaluations"
            raise ConfigError(f"patience={self.patience}: counts evaluations, and needs {missing}.")

    @property
    def examples_per_step(self) -> int:
        """How many examples every probe of a step scores."""
        return self.batch_size * self.micro_batches

    @property
    def space(self) -> str:
        """The update space in which the job runs."""
        return self.method.update_spaces[0] if self.update_space is None else self.update_space

    @property
    def keeps_best(self) -> bool:
        """Whether the run gives back the state of its best evaluation. In `fold` it cannot: the base weights hold the
        last state only. A continual job does not: the best state of other times is no answer to today's rows."""
        return self.keep_best and self.space == "bank" and not self.continual

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build from keyword options or from what `to_json` wrote.

        `method` may be a Method, a name, or {"name": ..., hyperparameters}. `objective` may be an Objective or
        {"name": ..., fields}.

        Raises:
            ConfigError: an option is unknown (the message has the nearest name), the objective is missing, or a value
                is out of range.
        """
        check_keys("job option", options, [f.name for f in fields(cls)])
        given = dict(options)
        if given.get("continual") and (steps := given.pop("steps", None)) not in (None, MANY_STEPS):
            raise ConfigError(f"steps={steps!r}: a continual job has no last step; drop one of the two.")
        if "objective" not in given:
            raise ConfigError("objective is missing: expected e.g. Classification(template=..., options=[...]).")
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json(json.loads(json.dumps(...)))` gives an equal configuration."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["method"] = describe(self.method)
        plain["objective"] = describe(self.objective)
        # The round trip turns tuples into lists: two configurations compare equal however their values were given.
        result: dict[str, Any] = json.loads(json.dumps(plain))
        return result

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls.from_options(value)

    def check_resumes(self, saved: JobConfig) -> None:
        """Refuse to continue a run that a user started with other options.

        Every option but those of MAY_DIFFER_ON_RESUME must be equal. So must `steps`, because the schedule and the
        number of bases depend on it.

        Raises:
            ConfigError: an option differs. The message names all that do, with both values.
        """
        ours, theirs = self._trajectory(), saved._trajectory()
        differing = [f"{key}={ours[key]!r} (started with {theirs[key]!r})" for key in ours if ours[key] != theirs[key]]
        if differing:
            raise ConfigError(
                f"cannot resume with another configuration: {'; '.join(differing)}. Resume with the values it was "
                f"started with (only {', '.join(sorted(MAY_DIFFER_ON_RESUME))} may differ), or start a new job."
            )

    def _trajectory(self) -> dict[str, Any]:
        # The resolved space: a run that left it open may be resumed with the same space given by name.
        plain = self.to_json() | {"update_space": self.space}
        return {key: value for key, value in plain.items() if key not in MAY_DIFFER_ON_RESUME}
