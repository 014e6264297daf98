"""Makes a job that the engine can start from what a caller gives: it checks everything, then writes the directory."""

from __future__ import annotations

import logging
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.config import JobConfig, OnLong, ZOTrainingConfig
from vllm_zo.data import encode_examples, load_examples
from vllm_zo.data.load import Examples
from vllm_zo.entrypoints.llm.chats import Render, rendered
from vllm_zo.entrypoints.llm.limits import check_layers_exist, check_step, check_tokens
from vllm_zo.errors import ConfigError
from vllm_zo.jobs.directory import JobDescription, JobDir
from vllm_zo.objectives import REWARDS, Rollout, Trust
from vllm_zo.objectives.base import EncodedExample, Objective, ReferencedObjective
from vllm_zo.objectives.functions import LOCAL
from vllm_zo.slot_fit import describe_space, resolve_bases

logger = logging.getLogger("vllm.zo")

_temporary_state_dir: Path | None = None
"""Directory for the jobs of engines that have no `state_dir`. The first job that needs it makes it."""


class Trained(Protocol):
    """What an evaluation needs of a run: a `JobResult` has it."""

    @property
    def config(self) -> JobConfig: ...

    @property
    def version_file(self) -> Path: ...


@dataclass(frozen=True)
class PreparedJob:
    """A job whose settings are checked and whose directory is written: the engine can start it.

    Attributes:
        passing: whether nobody needs the directory once there is a result.
    """

    directory: Path
    config: JobConfig
    model: str
    num_bases: int
    passing: bool = False

    def discard(self) -> None:
        """Remove the directory, if nobody needs it any more."""
        if self.passing:
            shutil.rmtree(self.directory, ignore_errors=True)

    def log_start(self) -> None:
        config = self.config
        steps = "steps without end" if config.continual else f"{config.steps} steps"
        logger.info("job %s: %s, %s, in %s", self.directory.name, config.method, steps, self.directory)
        logger.info("%s", describe_space(config.method, config.space, config.steps, self.num_bases))


def job_config(config: JobConfig | None, objective: Objective | None, options: Mapping[str, Any]) -> JobConfig:
    """The arguments of `finetune` as one configuration.

    Raises:
        ConfigError: options are given beside a whole configuration, or a value is out of range.
    """
    given = {**({} if objective is None else {"objective": objective}), **options}
    if config is None:
        return JobConfig.from_options(given)
    if given:
        raise ConfigError(f"{', '.join(given)}: given beside config=JobConfig(...); set it there.")
    return config


def prepare_job(
    engine: Any,
    train: Any,
    validation: Any,
    resume_from: str | Path | None,
    config: JobConfig,
    *,
    render: Render | None = None,
    trust: Trust = Trust.NAMES,
    asked: Objective | None = None,
) -> PreparedJob:
    """Check everything that can be checked before work starts, tokenise, and write the job's directory.

    Args:
        engine: vLLM's `LLMEngine` or `AsyncLLM`.
        render: renders the chats of the data. None: the caller has rendered them.
        trust: what the objective may run in the engine. A caller in Python can run anything anyway; a client of a
            server may not.
        asked: the objective as it was before the caller rendered the data; None: that of `config`.

    Raises:
        ConfigError: a setting, the data, or the run to continue does not fit.
        CorruptLogError: the seed log of the run to continue is damaged at its head.
        JobError: the disk refuses the directory.
    """
    zo = _training_config(engine)
    check_trust(config.objective, trust)
    check_layers_exist(config, engine.model_config.get_total_num_hidden_layers())
    config.check_evaluates(validation is not None)
    bases = resolve_bases(config.method, config.space, config.steps, zo.slot_rank, config.bases)
    train, objective = _loaded(train, config.objective, render, "train")
    if validation is not None:
        validation, kind = _loaded(validation, config.objective, render, "validation")
        if kind != objective:
            raise ConfigError("validation: chats (`messages`) and prompts; use the kind of the training data.")
    asked, config = asked or config.objective, replace(config, objective=objective)
    directory = _job_directory(engine, zo, config, resume_from)
    train_examples = _encode(engine, train, objective, config.on_long)
    if config.examples_per_step > len(train_examples):
        times = f" and micro_batches={config.micro_batches}" if config.micro_batches > 1 else ""
        raise ConfigError(
            f"batch_size={config.batch_size}{times}: the training data has {len(train_examples)} rows; lower "
            "batch_size."
        )
    needed = bases * config.method.coordinates.rank
    if config.method.coordinates.measures_v and needed > len(train_examples):
        raise ConfigError(
            f"bases={bases}: {config.method.name}.v='activations' measures bases * rank = {needed} directions, and the "
            f"training data has {len(train_examples)} rows; lower bases, or give more rows."
        )
    # The worst case: a step may draw examples that all have as many sequences as the largest one.
    most = max(len(example.sequences) for example in train_examples)
    check_step(config, most, engine.vllm_config.scheduler_config.max_num_seqs)
    validation_examples = []
    if validation is not None:
        validation_examples = _encode(engine, validation, objective, config.on_long)[: config.eval_examples]
    if resume_from is not None:
        JobDir(directory).check_same_data(train_examples)
    model = engine.model_config.model
    JobDir(directory).write(JobDescription(model, config, asked=asked), train_examples, validation_examples)
    if resume_from is None:
        JobDir(directory).appended.unlink(missing_ok=True)  # of a job that ended before its first step
    return PreparedJob(directory, config, model, bases)


def encode_more(
    engine: Any,
    rows: Any,
    description: JobDescription,
    render: Render | None,
    name: str,
    objective: Objective | None = None,
) -> list[EncodedExample]:
    """Rows for a job that has begun, made as those of its training data were.

    Args:
        description: of the job.
        name: of the rows, in messages.
        objective: reads the rows in place of the job's; it makes the same examples of other fields.

    Raises:
        ConfigError: there are none, one cannot be used, or they are chats and the job learns prompts, or the reverse.
    """
    config = description.config
    records, kind = _loaded(rows, objective or description.asked_objective, render, name)
    if objective is None and kind != config.objective:
        raise ConfigError(f"{name}: chats (`messages`) and prompts; use the kind of the training data.")
    encoded = _encode(engine, records, kind, config.on_long)
    most = max(len(example.sequences) for example in encoded)
    check_step(config, most, engine.vllm_config.scheduler_config.max_num_seqs)
    return encoded


def prepare_evaluation(
    engine: Any,
    data: Any,
    objective: Objective | None,
    run: Trained | None,
    *,
    render: Render | None = None,
    trust: Trust = Trust.NAMES,
) -> PreparedJob:
    """`prepare_job` for a job that scores `data` once, in the state of `run` or of the base.

    Raises:
        ConfigError: there is no objective, or the data does not fit.
        JobError: the disk refuses the directory.
    """
    zo = _training_config(engine)
    objective = objective or (run.config.objective if run else None)
    if objective is None:
        raise ConfigError("objective=None: evaluate needs an objective, or a run to take it from.")
    check_trust(objective, trust)
    records, objective = _loaded(data, objective, render, "data")
    examples = _encode(engine, records, objective, run.config.on_long if run else "error")
    if run is not None and run.config.space == "fold" and isinstance(objective, ReferencedObjective):
        raise ConfigError(
            f"objective={objective!r:.80}: compares the model with the base, and a `fold` run has changed the base; "
            "give `finetune` the data as validation."
        )
    passing = zo.state_dir is None
    if passing:
        directory = Path(tempfile.mkdtemp(prefix="vllm-zo-evaluate-"))
    else:
        directory = _state_dir(zo) / f"evaluate-{uuid.uuid4().hex[:8]}"
    if run is None or run.config.space == "fold":
        # The base itself holds what a `fold` run learnt, so there is no state to load.
        config, initial = JobConfig(objective=objective, steps=0), None
    else:
        config, initial = replace(run.config, objective=objective), run.version_file
    model = engine.model_config.model
    JobDir(directory).write(JobDescription(model, config, evaluate_only=True, initial=initial), [], examples)
    return PreparedJob(directory, config, model, num_bases=1, passing=passing)


def check_played(objective: Objective, chat: Mapping[str, Any] | None, *, wait: bool, apart: bool = False) -> None:
    """Refuse arguments of `finetune` that a job of rollouts cannot have.

    Args:
        apart: other processes than this one play.

    Raises:
        ConfigError: there is such an argument; the message names it.
    """
    if not isinstance(objective, Rollout):
        return
    if not wait:
        raise ConfigError(
            "wait=False: rollouts are played while finetune waits for their job; call it with wait=True, in a thread "
            "or a task of your own if need be."
        )
    if apart and isinstance(objective.play, str) and objective.play.startswith(LOCAL):
        raise ConfigError(
            f"play={objective.play!r}: each engine of a cluster plays in a process of its own. Put the function into a "
            "module that they can import; the script itself is not one."
        )
    if chat is not None:
        raise ConfigError(
            f"chat={dict(chat)!r}: renders chats of the data, and of rollouts the program gets the data as it is; the "
            "template for its requests is Rollout(server={'chat_template': ...})."
        )


def check_trust(objective: Objective, allowed: Trust) -> None:
    """Refuse an objective that runs more code in the engine than `allowed`.

    Raises:
        ConfigError: it does; the message describes the objective.
    """
    if getattr(objective, "trust", Trust.NAMES) > allowed:
        raise ConfigError(
            f"objective={objective!r:.200}: runs Python code of the job, which is not allowed here. Use "
            f"a grader without python, or a registered reward: {', '.join(REWARDS)}."
        )


def check_base_as_loaded(stats: Mapping[str, Any]) -> None:
    """Refuse to train from weights that an ended `fold` job has changed: the job would wait for `restore_base`.

    Args:
        stats: the answer of `zo_stats`.

    Raises:
        ConfigError: the base holds the weights of such a job.
    """
    owner = stats["base_owner"]
    # While the owner itself has not ended, the new job may queue behind it.
    if owner is not None and owner not in stats["jobs"]:
        raise ConfigError(
            f"job {owner} (update_space='fold') has changed the base weights, and a job starts from the model as it "
            "was loaded: call llm.restore_base(run) first, or load what run.save_merged() wrote."
        )


def _training_config(engine: Any) -> ZOTrainingConfig:
    additional = engine.vllm_config.additional_config
    if not isinstance(additional, dict) or "zo_training" not in additional:
        raise ConfigError("this engine was started without training: use LLM(..., zo_training=True).")
    config = ZOTrainingConfig.from_user(additional["zo_training"])
    assert config is not None
    return config


def _loaded(source: Any, objective: Objective, render: Render | None, name: str) -> tuple[Examples, Objective]:
    """The records of a source, chats rendered, and the objective for them. `name` is the argument's."""
    examples = load_examples(source, name)
    if render is None:
        return examples, objective
    records, objective = rendered(examples, objective, render, examples.source)
    return Examples(records, examples.source), objective


def _encode(engine: Any, examples: Examples, objective: Objective, on_long: OnLong) -> list[EncodedExample]:
    tokenizer = engine.get_tokenizer()
    model = engine.model_config
    encoded = encode_examples(
        examples, objective, tokenizer, model.max_model_len, examples.source, model.get_vocab_size(), on_long
    )
    check_tokens(encoded, examples.source)
    return encoded


def _state_dir(zo: ZOTrainingConfig) -> Path:
    if zo.state_dir is not None:
        return Path(zo.state_dir).resolve()
    global _temporary_state_dir
    if _temporary_state_dir is None:
        _temporary_state_dir = Path(tempfile.mkdtemp(prefix="vllm-zo-"))
        logger.info("no state_dir given: jobs keep their logs in %s", _temporary_state_dir)
    return _temporary_state_dir


def _job_directory(engine: Any, zo: ZOTrainingConfig, config: JobConfig, resume_from: str | Path | None) -> Path:
    """Absolute path of the job's directory: the engine's process may work in another one. Its name is the job's id.

    Raises:
        ConfigError: `output_dir` holds another run, or the run to continue differs.
        CorruptLogError: the seed log of the run to continue is damaged at its head.
    """
    if resume_from is not None:
        directory = Path(resume_from).resolve()
        _check_resumes(engine, zo, config, directory)
        return directory
    if config.output_dir is None:
        return _state_dir(zo) / f"zo-{uuid.uuid4().hex[:8]}"
    directory = Path(config.output_dir).resolve()
    if JobDir(directory).log.exists():
        raise ConfigError(
            f"output_dir={config.output_dir!r} holds another run; pass resume_from= to continue it, or choose another."
        )
    return directory


def _check_resumes(engine: Any, zo: ZOTrainingConfig, config: JobConfig, directory: Path) -> None:
    """Refuse to continue a run with another configuration, model or engine, before anything in it is touched.

    Raises:
        ConfigError: there is no run, or it was made differently; the message names what differs, with both values.
        CorruptLogError: the head of its seed log is damaged, so that no step can be used.
    """
    if not JobDir(directory).description.exists():
        raise ConfigError(f"resume_from={str(directory)!r}: no job.json there; give the directory of an earlier run.")
    config.check_resumes(JobDir(directory).read_description().config)
    if not JobDir(directory).log.exists():  # it ended before its first step
        return
    header = read_seed_log(JobDir(directory).log).header
    model_config = engine.model_config
    dtype = str(model_config.dtype).removeprefix("torch.")
    bases = resolve_bases(config.method, config.space, config.steps, zo.slot_rank, config.bases)
    header.check_base(model_config.model, fix="start the engine with that model, or start a new job")
    if dtype != header.dtype:
        raise ConfigError(
            f"dtype={dtype!r}: the run in {directory} was made in {header.dtype!r}; start the engine with that dtype."
        )
    if bases != header.num_bases:
        raise ConfigError(
            f"zo_training.slot_rank={zo.slot_rank}: gives {bases} bases, the run in {directory} has "
            f"{header.num_bases}; "
            "start the engine with the slot_rank it had then."
        )
