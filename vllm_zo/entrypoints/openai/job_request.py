"""`POST /v1/fine_tuning/jobs`: what may be asked for, and what it means as options of a `JobConfig`.

Hyperparameters are those of the algorithm (rank, interval, eps, ...), the options of `JobConfig` (steps, batch_size,
learning_rate, update_space, ...) and OpenAI's three; with `method.type="reinforcement"` those of `Reward` too
(max_tokens, temperature, samples, shaping, ...). A value of "auto", or none, resolves to:

    batch_size                 16, or the number of rows where there are fewer
    steps                      n_epochs * ceil(rows / batch_size) where n_epochs is given, else 1000
    learning_rate              measured by the run itself (methods/step_size.py), times learning_rate_multiplier (1)
    eval_interval              steps / n_evals (4)
    publish_interval           steps / n_checkpoints (4)
    everything else            the default of `JobConfig` and of the algorithm
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from vllm_zo.config import MAX_SEED, JobConfig
from vllm_zo.entrypoints.openai.errors import APIError
from vllm_zo.errors import ConfigError
from vllm_zo.methods import LoZO, known_methods
from vllm_zo.methods.step_size import AUTO
from vllm_zo.objectives import OBJECTIVES, Objective, Reward, build_objective, describe
from vllm_zo.validation import check_int, check_keys, check_known

COUNTS = {"n_evals": "eval_interval", "n_checkpoints": "publish_interval"}
"""How many evaluations and checkpoints -> the interval of `JobConfig` that gives them."""
DEFAULT_COUNT = 4
NOT_HYPERPARAMETERS = ("objective", "method", "output_dir", "seed")
JOB_OPTIONS = tuple(f.name for f in fields(JobConfig) if f.name not in NOT_HYPERPARAMETERS)
MAX_STEPS = 10_000_000
ANSWERED = "{prompt}"
"""Template of a reward that has none: the record's prompt, or what the chat template makes of its messages."""
REWARD_OPTIONS = tuple(f.name for f in fields(Reward) if f.name not in ("template", "reward", "grader"))
REFERENCE = {"compute_multiplier": "samples", "eval_samples": "eval_examples", "reasoning_effort": "max_tokens"}
"""OpenAI's hyperparameters of reinforcement that mean nothing here but "auto" -> ours that is nearest."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class SupervisedMethod(Strict):
    hyperparameters: dict[str, Any] = {}


class ZerothOrderMethod(Strict):
    algorithm: str = LoZO.name
    hyperparameters: dict[str, Any] = {}
    objective: dict[str, Any] | None = Field(
        None, description='{"name": "classification", ...}; none: teacher forcing on chats or prompts and completions.'
    )
    grader: dict[str, Any] | None = Field(
        None, description="The reward of what the model writes: of the objective, or without one of `prompt` or chats."
    )
    keep_base: bool = Field(
        False, description="After a `fold` job leave its weights in the base, until its model is unloaded."
    )


class ReinforcementMethod(Strict):
    grader: dict[str, Any]
    hyperparameters: dict[str, Any] = {}


class Method(Strict):
    type: Literal["supervised", "zeroth_order", "reinforcement"]
    supervised: SupervisedMethod | None = None
    zeroth_order: ZerothOrderMethod | None = None
    reinforcement: ReinforcementMethod | None = None


class Wandb(Strict):
    project: str
    name: str | None = None
    entity: str | None = None
    tags: list[str] | None = None


class Integration(Strict):
    type: Literal["wandb"]
    wandb: Wandb


MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class JobRequest(Strict):
    model: str
    training_file: str
    validation_file: str | None = None
    method: Method | None = None
    hyperparameters: dict[str, Any] | None = Field(None, description="Deprecated: as in method.supervised.")
    suffix: str | None = Field(None, max_length=64)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    integrations: list[Integration] | None = Field(None, max_length=1)
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)


@dataclass(frozen=True)
class Wanted:
    """A create request whose names and values are known to be good; what depends on the data is still open.

    Attributes:
        objective: None: decided by the kind of data.
        given: hyperparameters that are not "auto".
    """

    kind: str
    algorithm: str
    given: dict[str, Any]
    objective: Objective | None
    keep_base: bool
    seed: int
    suffix: str | None

    def to_json(self) -> dict[str, Any]:
        objective = None if self.objective is None else describe(self.objective)
        return {**asdict(self), "objective": objective}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Wanted:
        objective = value["objective"]
        return cls(**{**value, "objective": None if objective is None else build_objective(**objective)})


def read_request(request: JobRequest) -> Wanted:
    """Check a request as far as is possible without its data.

    Raises:
        APIError, ConfigError: names the field or the hyperparameter, its value and what is accepted.
    """
    method = request.method or Method(type="supervised")
    for name in ("supervised", "zeroth_order", "reinforcement"):
        if name != method.type and getattr(method, name) is not None:
            raise APIError(400, f"method.{name}: given, but method.type is {method.type!r}.", f"method.{name}")
    if method.type == "reinforcement" and method.reinforcement is None:
        raise APIError(400, "method.reinforcement is missing: it holds the grader.", "method.reinforcement")
    wanted = method.zeroth_order or ZerothOrderMethod(objective=None, keep_base=False, grader=None)
    check_known("method.zeroth_order.algorithm", wanted.algorithm, known_methods())
    given = (method.supervised or SupervisedMethod()).hyperparameters | wanted.hyperparameters
    given |= method.reinforcement.hyperparameters if method.reinforcement else {}
    if request.hyperparameters:
        if given:
            raise APIError(400, "hyperparameters: given twice; keep those in method.", "hyperparameters")
        given = request.hyperparameters
    check_hyperparameters(wanted.algorithm, given, REWARD_OPTIONS if method.reinforcement else ())
    given = {name: value for name, value in given.items() if value not in (AUTO, None)}
    if method.reinforcement:
        objective: Objective | None = _reward(method.reinforcement.grader, given)
    else:
        objective = _objective(_with_grader(wanted.objective, wanted.grader))
    return Wanted(
        kind=method.type,
        algorithm=wanted.algorithm,
        given=given,
        objective=objective,
        keep_base=wanted.keep_base,
        seed=secrets.randbits(31) if request.seed is None else request.seed,
        suffix=clean_suffix(request.suffix),
    )


def check_hyperparameters(algorithm: str, given: Mapping[str, Any], more: Collection[str] = ()) -> None:
    """Refuse unknown names, and combinations that contradict each other; ranges are `JobConfig`'s to judge.

    Args:
        more: names that are known besides those of every job: `REWARD_OPTIONS` where there is a reward.
    """
    set_values = {name for name, value in given.items() if value not in (AUTO, None)}
    known = {"n_epochs", *COUNTS, *JOB_OPTIONS, *_method_options(algorithm), *more}
    if more:
        known |= REFERENCE.keys() - set_values
        if unused := sorted(REFERENCE.keys() & set_values):
            raise ConfigError(f"hyperparameters.{unused[0]}: not used here; the nearest is {REFERENCE[unused[0]]!r}.")
    check_keys("hyperparameter", given, known)
    for one, other in (("n_epochs", "steps"), *COUNTS.items()):
        if {one, other} <= set_values:
            raise ConfigError(f"hyperparameters: {one} and {other} decide the same; give one of them.")


def _method_options(algorithm: str) -> list[str]:
    return [f.name for f in fields(known_methods()[algorithm])]


def _reward(grader: dict[str, Any], given: Mapping[str, Any]) -> Objective:
    options = {name: given[name] for name in REWARD_OPTIONS if name in given}
    return _objective({"name": Reward.name, "template": ANSWERED, "grader": grader, **options})  # type: ignore[return-value]


def _with_grader(objective: dict[str, Any] | None, grader: dict[str, Any] | None) -> dict[str, Any] | None:
    if grader is None:
        return objective
    if objective is None:
        return {"name": Reward.name, "template": ANSWERED, "grader": grader}
    if objective.get("name") != Reward.name or "grader" in objective:
        raise ConfigError("method.zeroth_order.grader: goes with no objective, or with objective 'reward' without one.")
    return {**objective, "grader": grader}


def _objective(given: dict[str, Any] | None) -> Objective | None:
    if given is None:
        return None
    name = given.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"objective.name={name!r}: expected one of {', '.join(OBJECTIVES)}.")
    try:
        return build_objective(**{str(key): value for key, value in given.items()})
    except TypeError as error:
        raise ConfigError(f"objective: {error}.") from None


def clean_suffix(suffix: str | None) -> str | None:
    """A suffix as it stands in a model's name: letters, digits, "-" and "_"; anything else becomes "-".

    Raises:
        APIError: nothing is left of it.
    """
    if suffix is None:
        return None
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "-", suffix).strip("-")
    if not cleaned:
        raise APIError(400, f"suffix={suffix!r}: expected letters, digits, '-' or '_'.", "suffix")
    return cleaned


def job_options(wanted: Wanted, rows: int, objective: Objective) -> dict[str, Any]:
    """Options for `JobConfig.from_options`, every "auto" resolved but that of the learning rate.

    Args:
        rows: training examples.

    Raises:
        ConfigError: a value out of range.
    """
    given = wanted.given
    options = {name: given[name] for name in JOB_OPTIONS if name in given}
    options["batch_size"] = batch_size = given.get("batch_size", min(16, rows))
    check_int("batch_size", batch_size, 1)
    if "n_epochs" in given:
        check_int("n_epochs", given["n_epochs"], 1)
        options["steps"] = given["n_epochs"] * math.ceil(rows / batch_size)
    steps = options.setdefault("steps", 1000)
    check_int("steps", steps, 1, MAX_STEPS)
    for count, interval in COUNTS.items():
        check_int(count, given.get(count, DEFAULT_COUNT), 1)
        if interval not in given:
            options[interval] = max(1, steps // given.get(count, DEFAULT_COUNT))
    names = _method_options(wanted.algorithm)
    options["method"] = {"name": wanted.algorithm, **{name: given[name] for name in names if name in given}}
    return {**options, "objective": objective, "seed": wanted.seed}


def shown_hyperparameters(wanted: Wanted, config: JobConfig, rows: int) -> dict[str, Any]:
    """Every value that the job runs with, under the names a request may use."""
    plain = config.to_json()
    own = {name: value for name, value in plain["method"].items() if name != "name"}
    if wanted.kind == "reinforcement":
        own |= {name: value for name, value in plain["objective"].items() if name in REWARD_OPTIONS}
    return {
        "n_epochs": max(1, round(config.steps * config.batch_size / max(rows, 1))),
        **{name: plain[name] for name in JOB_OPTIONS},
        "update_space": config.space,
        **own,
    }


def with_learning_rate(job: Mapping[str, Any], learning_rate: float) -> dict[str, Any]:
    """What changes in a job's record when its run has measured the learning rate that was "auto"."""
    shown = {**job["hyperparameters"], "learning_rate": learning_rate}
    kind = job["method"]["type"]
    return {
        "hyperparameters": shown,
        "method": {**job["method"], kind: {**job["method"][kind], "hyperparameters": shown}},
    }


def shown_method(wanted: Wanted, hyperparameters: dict[str, Any], objective: Objective | None) -> dict[str, Any]:
    """The method as the job object shows it."""
    if wanted.kind == "supervised":
        return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    if isinstance(objective, Reward) and wanted.kind == "reinforcement":
        return {
            "type": "reinforcement",
            "reinforcement": {"grader": objective.grader, "hyperparameters": hyperparameters},
        }
    shown: dict[str, Any] = {"algorithm": wanted.algorithm, "hyperparameters": hyperparameters}
    shown["objective"] = None if objective is None else describe(cast(Any, objective))
    return {"type": "zeroth_order", "zeroth_order": shown | {"keep_base": wanted.keep_base}}
