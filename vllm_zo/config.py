"""What a user may set: engine options (`zo_training=`) and job options (`finetune`, `vllm-zo train`, OpenAI API)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from vllm_zo.errors import ConfigError
from vllm_zo.methods import LoZO, Method, build_method, known_methods, method_fields
from vllm_zo.methods.base import check_registered
from vllm_zo.methods.schedules import LR_SCHEDULES, LRSchedule
from vllm_zo.methods.spaces import SLOT_RANKS, check_space
from vllm_zo.methods.step_size import AUTO
from vllm_zo.methods.targets import EMBEDDINGS, LM_HEAD, target_pattern
from vllm_zo.objectives import Objective, build_objective, describe
from vllm_zo.validation import (
    check_bool,
    check_float,
    check_int,
    check_keys,
    check_known,
    check_optional_int,
    check_optional_str,
    reject,
)

MAX_SEED = 2**63 - 1
MAY_DIFFER_ON_RESUME = frozenset(
    {
        "output_dir", "checkpoint_interval", "publish_interval", "eval_interval", "eval_examples", "keep_best",
        "divergence_factor",
    }
)  # fmt: skip
"""Job options that cannot change the trajectory of the parameters, only what is measured, kept or stopped."""


@dataclass(frozen=True, kw_only=True)
class ZOTrainingConfig:
    """Engine options: what is reserved for training when the engine starts.

    Example:
        >>> ZOTrainingConfig.from_user({"slot_rank": 32}).slot_rank
        32
    """

    slots: int = 2
    """ZO adapter slots of a running job, reserved beside the user's `max_loras`. A pair of probes needs 2, K directions
    at once 2K."""
    concurrent_jobs: int = 1
    """Jobs that run together, each with `slots` slots of its own; further ones wait for their turn."""
    slot_rank: int = 16
    """Rank of a ZO slot, a value vLLM accepts as `max_lora_rank`: (bases + 1) * the method's rank must fit."""
    token_budget: int | None = None
    """Most member tokens in an engine step that also serves requests. None: no limit beyond the engine's own."""
    state_dir: str | None = None
    """Where jobs keep logs and snapshots. None: a fresh temporary directory, named in the log."""

    def __post_init__(self) -> None:
        check_int("zo_training.slots", self.slots, 2, fix="a pair of probes needs 2")
        check_int("zo_training.concurrent_jobs", self.concurrent_jobs, 1)
        if isinstance(self.slot_rank, bool) or self.slot_rank not in SLOT_RANKS:
            reject("zo_training.slot_rank", self.slot_rank, f"one of {', '.join(map(str, SLOT_RANKS))}")
        check_optional_int("zo_training.token_budget", self.token_budget, 1, fix="None sets no limit")
        check_optional_str("zo_training.state_dir", self.state_dir, "a directory")

    @property
    def total_slots(self) -> int:
        """Slots reserved in the engine's stacked LoRA tensors."""
        return self.slots * self.concurrent_jobs

    @classmethod
    def from_user(cls, value: bool | Mapping[str, Any] | ZOTrainingConfig) -> ZOTrainingConfig | None:
        """`LLM(zo_training=...)`: True for the defaults, a dictionary of options, or None for False.

        Raises:
            ConfigError: another type, an unknown option (with the nearest name), or a value out of range.
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
        """The options an engine was started with: plain values in vLLM's `additional_config`."""
        return cls(**additional_config["zo_training"])


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Job options. Everything that decides the trajectory of a run is here, apart from the data and the model."""

    objective: Objective
    """What the loss is, e.g. Classification(template=..., options=[...])."""
    method: Method = field(default_factory=LoZO)
    """The estimator and its update rule."""
    learning_rate: float | str = AUTO
    """Step size before the schedule; 0 changes nothing. "auto": measured in the run's first 10 steps, which do not move
    yet (methods/step_size.py). LoZO's paper uses 1e-7 for OPT-13B."""
    learning_rate_multiplier: float = 1.0
    """Factor of the learning rate: what to turn where it is "auto"."""
    lr_schedule: LRSchedule = "constant"
    """"constant", "linear" or "cosine"; the last two decay to 0 at the end of the run."""
    warmup_steps: int = 0
    """Steps of linear warm-up, part of `steps`."""
    batch_size: int = 16
    """Examples per step; every probe of the step scores the same ones. A group may be larger than what the engine runs
    at once: it then takes several engine steps."""
    micro_batches: int = 1
    """Mini-batches of `batch_size` examples that a step adds up before it moves, as gradient accumulation does."""
    eps_schedule: LRSchedule = "constant"
    """"constant", "linear" or "cosine"; the last two shrink the probe radius to a tenth at the end of the run."""
    max_coefficient: float | None = None
    """Largest absolute coefficient of a direction (a projected gradient over K): larger ones are cut to it. None: no
    limit."""
    steps: int = 1000
    """Optimiser steps; 0 evaluates only."""
    seed: int = 0
    """Decides batch order and every direction."""
    update_space: str | None = None
    """"bank" (the base is untouched) or "fold" (as published). None: the method's first."""
    bases: int | None = None
    """Bases kept in `bank` space (M). None: one an interval, as far as the engine's slot rank goes."""
    target_modules: str = "all-linear"
    """"all-linear", "attention", "mlp", or a regular expression that matches whole Hugging Face module names."""
    eval_interval: int | None = None
    """Steps between evaluations on the validation data. None: before the first step and after the last only."""
    eval_examples: int | None = None
    """Validation examples scored per evaluation, from the front. None: all."""
    checkpoint_interval: int = 1000
    """Steps between fp32 snapshots. The seed log alone rebuilds every step; a snapshot makes resuming instant."""
    publish_interval: int | None = None
    """Steps between versions that can be served while the job runs. None: at every evaluation and at the end only."""
    output_dir: str | None = None
    """Where the result goes. None: the job's folder in the engine's state directory."""
    keep_best: bool = True
    """Give back the state with the lowest validation loss, where there is validation data; else the last."""
    divergence_factor: float | None = 3.0
    """Stop when the mean training loss of the last 10 steps exceeds this times that of the first 10, plus 1 nat, or
    when 10 steps in a row are not finite. The 1 nat keeps a run that starts near zero from stopping at noise. None:
    only non-finite losses stop a run."""

    def __post_init__(self) -> None:
        check_registered(self.method, known_methods())
        if isinstance(self.objective, type) or not isinstance(self.objective, Objective):
            reject("objective", self.objective, "an objective such as Classification(template=..., options=[...])")
        self.method.validate()
        self._check_optimisation()
        self._check_scope()
        self._check_bookkeeping()

    def _check_optimisation(self) -> None:
        if self.learning_rate != AUTO:
            check_float("learning_rate", self.learning_rate, at_least=0.0, fix=f"{AUTO!r} finds one")
        check_float("learning_rate_multiplier", self.learning_rate_multiplier, above=0.0)
        check_known("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        check_int("steps", self.steps, 0)
        check_int("warmup_steps", self.warmup_steps, 0, self.steps, fix="warm-up is part of steps")
        check_int("batch_size", self.batch_size, 1)
        check_int("micro_batches", self.micro_batches, 1)
        check_known("eps_schedule", self.eps_schedule, LR_SCHEDULES)
        if self.max_coefficient is not None:
            check_float("max_coefficient", self.max_coefficient, above=0.0, fix="None sets no limit")
        check_int("seed", self.seed, 0, MAX_SEED)

    def _check_scope(self) -> None:
        check_space(self.method, self.space)
        check_optional_int("bases", self.bases, 1, fix="None derives it from steps and slot_rank")
        if self.space == "fold" and self.bases not in (None, 1):
            raise ConfigError(f"bases={self.bases}: update_space='fold' keeps one basis; drop bases, or use 'bank'.")
        target_pattern(self.target_modules)
        if self.space == "fold" and self.target_modules in (EMBEDDINGS, LM_HEAD):
            raise ConfigError(
                f"target_modules={self.target_modules!r}: update_space='fold' writes linear layers only; use 'bank' "
                "and a method that runs in it."
            )

    def _check_bookkeeping(self) -> None:
        check_optional_int("eval_interval", self.eval_interval, 1, fix="None evaluates at the start and the end only")
        check_optional_int("eval_examples", self.eval_examples, 1, fix="None evaluates on all")
        check_int("checkpoint_interval", self.checkpoint_interval, 1)
        check_optional_int("publish_interval", self.publish_interval, 1, fix="None publishes at evaluations only")
        check_optional_str("output_dir", self.output_dir, "a directory")
        check_bool("keep_best", self.keep_best)
        if self.divergence_factor is not None:
            check_float("divergence_factor", self.divergence_factor, at_least=1.0, fix="None turns the guard off")

    @property
    def examples_per_step(self) -> int:
        """Examples that every probe of a step scores."""
        return self.batch_size * self.micro_batches

    @property
    def space(self) -> str:
        """The update space the job runs in."""
        return self.method.update_spaces[0] if self.update_space is None else self.update_space

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build from keyword options or from what `to_json` wrote.

        `method` may be a Method, a name, or {"name": ..., hyperparameters}; `objective` an Objective or {"name": ...,
        fields}.

        Raises:
            ConfigError: an unknown option (with the nearest name), a missing one, or a value out of range.
        """
        check_keys("job option", options, [f.name for f in fields(cls)])
        given = dict(options)
        if "objective" not in given:
            raise ConfigError("objective is missing: expected e.g. Classification(template=..., options=[...]).")
        given["objective"] = _built("objective", given["objective"], build_objective, "classification")
        if "method" in given:
            given["method"] = _built("method", given["method"], build_method, "lozo")
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json(json.loads(json.dumps(...)))` gives an equal configuration."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["method"] = {"name": self.method.name, **method_fields(self.method)}
        plain["objective"] = describe(self.objective)
        result: dict[str, Any] = json.loads(json.dumps(plain))
        return result

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls.from_options(value)

    def fingerprint(self) -> str:
        """16 hexadecimal digits, equal for configurations with the same trajectory.

        Everything counts but MAY_DIFFER_ON_RESUME; `steps` too, because the schedule and the bases depend on it.
        """
        canonical = json.dumps(self._trajectory(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def check_resumes(self, saved: JobConfig) -> None:
        """Refuse to continue a run that was started with other options.

        Raises:
            ConfigError: names every option that differs, with both values.
        """
        ours, theirs = self._trajectory(), saved._trajectory()
        differing = [f"{key}={ours[key]!r} (started with {theirs[key]!r})" for key in ours if ours[key] != theirs[key]]
        if differing:
            raise ConfigError(
                f"cannot resume with another configuration: {'; '.join(differing)}. Resume with the values it was "
                f"started with (only {', '.join(sorted(MAY_DIFFER_ON_RESUME))} may differ), or start a new job."
            )

    def _trajectory(self) -> dict[str, Any]:
        plain = self.to_json() | {"update_space": self.space}
        if not isinstance(self.learning_rate, str):
            plain["learning_rate"] = float(self.learning_rate)  # 1 and 1.0 are the same run
        return {key: value for key, value in plain.items() if key not in MAY_DIFFER_ON_RESUME}


def _built(what: str, value: object, build: Callable[..., Any], example: str) -> Any:
    """What a name or {"name": ..., fields} stands for; anything else as it is, for JobConfig to judge."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        return value
    if not isinstance(value.get("name"), str):
        reject(f"{what}.name", value.get("name"), f"a name such as {example!r}")
    return build(**value)
