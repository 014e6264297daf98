"""`POST /v1/fine_tuning/jobs`: the fields of a request, and how they become options of a `JobConfig`.

Hyperparameters are those of the algorithm (rank, interval, eps, ...), the options of `JobConfig` (steps, batch_size,
learning_rate, update_space, ...) and OpenAI's three. With `method.type="reinforcement"` those of `Reward` count too
(max_tokens, temperature, samples, shaping, ...), with "dpo" the `beta` of `Preference`. A value that is "auto" or
missing becomes:

    batch_size                 16, or the number of rows where there are fewer
    steps                      n_epochs * ceil(rows / batch_size) where n_epochs is given, else 1000
    learning_rate              measured by the run itself (methods/step_size.py), times learning_rate_multiplier (1)
    eval_interval              steps / n_evals (4), of a continual job 100
    publish_interval           steps / n_checkpoints (4), of a continual job 100
    everything else            the default of `JobConfig` and of the algorithm
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema

from vllm_zo.config import CONTINUAL_INTERVAL, MAX_SEED, JobConfig
from vllm_zo.entrypoints.llm.chats import ANSWERED
from vllm_zo.entrypoints.server.http.errors import APIError
from vllm_zo.errors import ConfigError
from vllm_zo.methods import METHODS, LoZO
from vllm_zo.methods.step_size import AUTO
from vllm_zo.objectives import OBJECTIVES, Objective, Preference, Reward
from vllm_zo.options import Setting, options_of
from vllm_zo.registry import describe
from vllm_zo.validation import check_int, check_keys, check_known, read_int

COUNTS = {"n_evals": "eval_interval", "n_checkpoints": "publish_interval"}
"""Number of evaluations or checkpoints -> the interval of `JobConfig` that it decides."""
DEFAULT_COUNT = 4
NOT_HYPERPARAMETERS = ("output_dir", "seed", "continual")
JOB_OPTIONS = {name: setting for name, setting in options_of(JobConfig).items() if name not in NOT_HYPERPARAMETERS}
MAX_STEPS = 10_000_000
NOT_REWARD_OPTIONS = ("template", "reward", "grader")
REWARD_OPTIONS = {name: setting for name, setting in options_of(Reward).items() if name not in NOT_REWARD_OPTIONS}
PREFERENCE_OPTIONS = {"beta": options_of(Preference)["beta"]}
OWN_OPTIONS = {"reinforcement": REWARD_OPTIONS, "dpo": PREFERENCE_OPTIONS}
"""Kind of job -> the hyperparameters that are options of its objective."""
REFERENCE = {"compute_multiplier": "samples", "eval_samples": "eval_examples", "reasoning_effort": "max_tokens"}
"""OpenAI's hyperparameters of reinforcement, which must be "auto" here -> ours that comes nearest."""


def _schema(*options: Mapping[str, Setting]) -> dict[str, Any]:
    """JSON schema of hyperparameters: each with its range, or "auto"."""
    known = {name: setting.json_schema() for known in options for name, setting in known.items()}
    counts = {name: {"type": "integer", "minimum": 1} for name in ("n_epochs", *COUNTS)}
    accepted = {name: {"anyOf": [schema, {"const": AUTO}]} for name, schema in (counts | known).items()}
    return {"type": "object", "properties": accepted}


METHOD_OPTIONS = {name: setting for part in METHODS.values() for name, setting in options_of(part).items()}
Hyperparameters = Annotated[dict[str, Any], WithJsonSchema(_schema(JOB_OPTIONS, METHOD_OPTIONS))]
RewardHyperparameters = Annotated[dict[str, Any], WithJsonSchema(_schema(JOB_OPTIONS, METHOD_OPTIONS, REWARD_OPTIONS))]
PreferenceHyperparameters = Annotated[
    dict[str, Any], WithJsonSchema(_schema(JOB_OPTIONS, METHOD_OPTIONS, PREFERENCE_OPTIONS))
]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class SupervisedMethod(Strict):
    hyperparameters: Hyperparameters = {}


class LiveRule(Strict):
    """When a version of a continual job becomes what `live:<job id>` answers with."""

    metric: str = Field("loss", description="`loss`, or a metric of the objective, of which more is better.")
    tolerance: float = Field(0.0, ge=0, description="By how much a version may be worse than the live one.")
    canary: float = Field(0.0, ge=0, le=0.5, description="Share of requests that the newest version answers first.")


class FeedbackRule(Strict):
    """That a continual job keeps the answers of its versions, and learns from what clients say of them."""

    retention_days: float = Field(gt=0, le=3650, description="Days after which an answer is forgotten.")
    min_score: float = Field(1.0, description="Answers with this score or more are learnt as they are.")


class ZerothOrderMethod(Strict):
    algorithm: str = LoZO.name
    hyperparameters: Hyperparameters = {}
    objective: dict[str, Any] | None = Field(
        None,
        description='{"name": "classification", ...}. None: chats, or prompts and completions, by teacher forcing.',
    )
    grader: dict[str, Any] | None = Field(
        None,
        description="The grader that rewards what the model writes, for objective `reward` or none.",
    )
    continual: bool = Field(False, description="No last step: rows may be appended while the job runs.")
    live: LiveRule | None = Field(None, description="Of a continual job: the name `live:<job id>` and its gate.")
    feedback: FeedbackRule | None = Field(None, description="Of a continual job: learn from feedback.")
    keep_base: bool = Field(
        False, description="After a `fold` job, keep its weights in the base until its model is unloaded."
    )


class ReinforcementMethod(Strict):
    grader: dict[str, Any]
    hyperparameters: RewardHyperparameters = {}


class DPOMethod(Strict):
    hyperparameters: PreferenceHyperparameters = {}


class Method(Strict):
    type: Literal["supervised", "zeroth_order", "reinforcement", "dpo"]
    supervised: SupervisedMethod | None = None
    zeroth_order: ZerothOrderMethod | None = None
    reinforcement: ReinforcementMethod | None = None
    dpo: DPOMethod | None = None


Name = Annotated[str, StringConstraints(max_length=128)]


class Wandb(Strict):
    project: Name
    name: Name | None = None
    entity: Name | None = None
    tags: list[Name] | None = Field(None, max_length=16)


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
    hyperparameters: Hyperparameters | None = Field(None, description="Deprecated: as in method.supervised.")
    suffix: str | None = Field(None, max_length=64)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    integrations: list[Integration] | None = Field(None, max_length=1)
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)


@dataclass(frozen=True)
class Wanted:
    """A create request whose names and values have been checked. Values that depend on the data are still open.

    Attributes:
        objective: None: the kind of data decides.
        given: hyperparameters that are not "auto".
    """

    kind: str
    algorithm: str
    given: dict[str, Any]
    objective: Objective | None
    keep_base: bool
    seed: int
    suffix: str | None
    continual: bool = False
    live: LiveRule | None = None
    feedback: FeedbackRule | None = None


def read_request(request: JobRequest) -> Wanted:
    """Check a request as far as is possible without its data.

    Raises:
        APIError, ConfigError: a field or hyperparameter cannot be used. The message names it, its value, and what the
            server accepts.
    """
    method = request.method or Method(type="supervised")
    for name in ("supervised", "zeroth_order", "reinforcement", "dpo"):
        if name != method.type and getattr(method, name) is not None:
            raise APIError(400, f"method.{name}: given, but method.type is {method.type!r}.", f"method.{name}")
    if method.type == "reinforcement" and method.reinforcement is None:
        raise APIError(400, "method.reinforcement is missing: it holds the grader.", "method.reinforcement")
    wanted = method.zeroth_order or ZerothOrderMethod.model_validate({})
    check_known("method.zeroth_order.algorithm", wanted.algorithm, METHODS)
    part = getattr(method, method.type)
    given = {} if part is None else part.hyperparameters
    if request.hyperparameters:
        if given:
            raise APIError(400, "hyperparameters: given twice; keep those in method.", "hyperparameters")
        given = request.hyperparameters
    check_hyperparameters(wanted.algorithm, given, method.type)
    given = {name: value for name, value in given.items() if value not in (AUTO, None)}
    _check_continual(wanted, given)
    if method.reinforcement:
        objective: Objective | None = _reward(method.reinforcement.grader, given)
    elif method.type == "dpo":
        objective = Preference(**{name: given[name] for name in PREFERENCE_OPTIONS if name in given})
    else:
        objective = _objective(_with_grader(wanted.objective, wanted.grader))
    return Wanted(
        kind=method.type,
        algorithm=wanted.algorithm,
        given=given,
        objective=objective,
        keep_base=wanted.keep_base,
        # 31 bits: every client can hold it, also in JavaScript or as a 32-bit integer.
        seed=secrets.randbits(31) if request.seed is None else request.seed,
        suffix=clean_suffix(request.suffix),
        continual=wanted.continual,
        live=wanted.live or (LiveRule.model_validate({}) if wanted.continual else None),
        feedback=wanted.feedback,
    )


def _check_continual(wanted: ZerothOrderMethod, given: Mapping[str, Any]) -> None:
    """Refuse what a continual job cannot have, and what only such a job has. Raises ConfigError."""
    for name in ("live", "feedback"):
        if getattr(wanted, name) is not None and not wanted.continual:
            raise ConfigError(f'method.zeroth_order.{name}: needs "continual": true.')
    for name in ("steps", "n_epochs", *COUNTS) if wanted.continual else ():
        if name in given:
            fix = f"set {COUNTS[name]}" if name in COUNTS else "drop it"
            raise ConfigError(f"hyperparameters.{name}={given[name]!r}: a continual job has no last step; {fix}.")


def check_hyperparameters(algorithm: str, given: Mapping[str, Any], kind: str = "zeroth_order") -> None:
    """Refuse unknown names, and values that contradict each other. `JobConfig` checks the ranges.

    Args:
        kind: of job; some kinds have further names (`OWN_OPTIONS`).

    Raises:
        ConfigError: a name is unknown, or two values decide the same.
    """
    set_values = {name for name, value in given.items() if value not in (AUTO, None)}
    known = {"n_epochs", *COUNTS, *JOB_OPTIONS, *_method_options(algorithm), *OWN_OPTIONS.get(kind, ())}
    if kind == "reinforcement":
        known |= REFERENCE.keys() - set_values
        if unused := sorted(REFERENCE.keys() & set_values):
            raise ConfigError(f"hyperparameters.{unused[0]}: not used here; the nearest is {REFERENCE[unused[0]]!r}.")
    check_keys("hyperparameter", given, known)
    for one, other in (("n_epochs", "steps"), *COUNTS.items()):
        if {one, other} <= set_values:
            raise ConfigError(f"hyperparameters: {one} and {other} decide the same; give one of them.")


def _method_options(algorithm: str) -> list[str]:
    return [f.name for f in fields(METHODS[algorithm])]


def _reward(grader: dict[str, Any], given: Mapping[str, Any]) -> Objective:
    options = {name: given[name] for name in REWARD_OPTIONS if name in given}
    return _objective({"name": Reward.name, "template": ANSWERED, "grader": grader, **options})  # type: ignore[return-value]


def _with_grader(objective: dict[str, Any] | None, grader: dict[str, Any] | None) -> dict[str, Any] | None:
    if grader is None:
        return objective
    if objective is None:
        return {"name": Reward.name, "template": ANSWERED, "grader": grader}
    if objective.get("name") != Reward.name or "grader" in objective:
        raise ConfigError("method.zeroth_order.grader: needs objective 'reward' without a grader, or no objective.")
    return {**objective, "grader": grader}


def _objective(given: dict[str, Any] | None) -> Objective | None:
    if given is None:
        return None
    objective: Objective = OBJECTIVES.build(given)
    return objective


def clean_suffix(suffix: str | None) -> str | None:
    """The suffix with "-" in place of anything but letters, digits, "-" and "_".

    Raises:
        APIError: 400, nothing is left of it.
    """
    if suffix is None:
        return None
    # The name goes into paths of URLs, and colons separate its parts.
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "-", suffix).strip("-")
    if not cleaned:
        raise APIError(400, f"suffix={suffix!r}: expected letters, digits, '-' or '_'.", "suffix")
    return cleaned


def job_options(wanted: Wanted, rows: int | None, objective: Objective) -> dict[str, Any]:
    """Options for `JobConfig.from_options`, with a value for every "auto" but that of the learning rate.

    Args:
        rows: number of training examples. None: not known yet; a value that depends on it may be any that is allowed.

    Raises:
        ConfigError: a value is out of range.
    """
    given = wanted.given
    options = {name: given[name] for name in JOB_OPTIONS if name in given}
    options["batch_size"] = batch_size = _count(given, "batch_size", 16 if rows is None else min(16, rows))
    names = _method_options(wanted.algorithm)
    options["method"] = {"name": wanted.algorithm, **{name: given[name] for name in names if name in given}}
    options |= {"objective": objective, "seed": wanted.seed}
    if wanted.continual:
        intervals = {interval: given.get(interval, CONTINUAL_INTERVAL) for interval in COUNTS.values()}
        return {**options, **intervals, "continual": True}
    if "n_epochs" in given:
        epochs = _count(given, "n_epochs", 1)
        options["steps"] = MAX_STEPS if rows is None else epochs * math.ceil(rows / batch_size)
    options["steps"] = steps = _count(options, "steps", 1000, MAX_STEPS)
    for count, interval in COUNTS.items():
        number = _count(given, count, DEFAULT_COUNT)
        if interval not in given:
            options[interval] = max(1, steps // number)
    return options


def _count(given: Mapping[str, Any], name: str, default: int, at_most: int | None = None) -> int:
    number = read_int(name, given.get(name, default))
    check_int(name, number, 1, at_most)
    return int(number)


def shown_hyperparameters(wanted: Wanted, config: JobConfig, rows: int | None) -> dict[str, Any]:
    """Every value that the job runs with, under the names that a request may use.

    Args:
        rows: number of training examples. None: not known yet; a value that depends on it is shown as the client gave
            it, or as "auto".
    """
    plain = config.to_json()
    own = {name: value for name, value in plain["method"].items() if name != "name"}
    of_objective = OWN_OPTIONS.get(wanted.kind, ())
    own |= {name: value for name, value in plain["objective"].items() if name in of_objective}
    shown = {**{name: plain[name] for name in JOB_OPTIONS}, "update_space": config.space, **own}
    if config.continual:
        del shown["steps"]
        return shown if rows is not None else shown | {"batch_size": wanted.given.get("batch_size", AUTO)}
    if rows is not None:
        return {"n_epochs": max(1, round(config.steps * config.batch_size / max(rows, 1))), **shown}
    open_yet = ["n_epochs", "batch_size", *(("steps", *COUNTS.values()) if "n_epochs" in wanted.given else ())]
    return shown | {name: wanted.given.get(name, AUTO) for name in open_yet}


def with_learning_rate(job: Mapping[str, Any], learning_rate: float) -> dict[str, Any]:
    """The changed fields of a job's record once its run has measured the learning rate that was "auto"."""
    shown = {**job["hyperparameters"], "learning_rate": learning_rate}
    kind = job["method"]["type"]
    return {
        "hyperparameters": shown,
        "method": {**job["method"], kind: {**job["method"][kind], "hyperparameters": shown}},
    }


def shown_method(wanted: Wanted, hyperparameters: dict[str, Any], objective: Objective | None) -> dict[str, Any]:
    """The method as the job object shows it."""
    if wanted.kind in ("supervised", "dpo"):
        return {"type": wanted.kind, wanted.kind: {"hyperparameters": hyperparameters}}
    described = None if objective is None else describe(objective)
    if described is not None and wanted.kind == "reinforcement":
        shown = {"grader": described["grader"], "hyperparameters": hyperparameters}
        return {"type": "reinforcement", "reinforcement": shown}
    shown = {"algorithm": wanted.algorithm, "hyperparameters": hyperparameters, "objective": described}
    if wanted.continual:
        rules = {"live": wanted.live, "feedback": wanted.feedback}
        shown |= {"continual": True, **{name: rule and rule.model_dump() for name, rule in rules.items()}}
    return {"type": "zeroth_order", "zeroth_order": shown | {"keep_base": wanted.keep_base}}
