"""`llm.finetune(...)` and `llm.evaluate(...)`: methods that `LLM` gains with `zo_training`."""

from __future__ import annotations

import logging
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_zo.checkpoint.hf_checkpoint import base_fingerprint
from vllm_zo.checkpoint.seed_log import read_seed_log
from vllm_zo.config import JobConfig, ZOTrainingConfig
from vllm_zo.data import encode_examples, load_examples
from vllm_zo.engine.job_dir import check_same_data, read_description, write_job
from vllm_zo.entrypoints.engine_client import EngineClient
from vllm_zo.entrypoints.run import Callback, FineTuneRun, JobResult
from vllm_zo.errors import ConfigError
from vllm_zo.methods.spaces import describe_space, resolve_bases
from vllm_zo.objectives import Reward
from vllm_zo.objectives.base import EncodedExample, Objective

logger = logging.getLogger("vllm.zo")


class TrainingMixin:
    """What `LLM` can do with `zo_training` on."""

    llm_engine: Any

    def finetune(
        self,
        train: Any,
        validation: Any = None,
        *,
        objective: Objective,
        resume_from: str | Path | None = None,
        wait: bool = True,
        callbacks: Iterable[Callback] = (),
        progress: bool = True,
        **options: Any,
    ) -> FineTuneRun:
        """Fine-tune the model inside the engine with a zeroth-order method.

        Args:
            train: a JSONL or CSV file, a Hugging Face dataset or its name, or an iterable of dictionaries.
            validation: the same; evaluated before, at `eval_interval` and after. None: no evaluation.
            objective: what the loss is, e.g. `Classification(template=..., options=[...])`.
            resume_from: directory of an earlier run with the same configuration and data; continues its trajectory.
            wait: block until the job has ended. False needs the engine in a child process (vLLM's default), where
                training goes on by itself and `generate` works meanwhile.
            callbacks: called as callback(run, record) for every step and evaluation.
            progress: show a live progress bar.
            options: fields of `JobConfig`: method, learning_rate, lr_schedule, batch_size, steps, seed, update_space,
            ...

        Raises:
            ConfigError: before any work starts, naming the field, the value and the fix.
            JobError: the job failed; its log and last good state are kept.
        """
        client = EngineClient(self.llm_engine)
        if not wait and client.in_process:
            raise ConfigError(
                "wait=False needs the engine in a child process, where training goes on by itself: unset "
                "VLLM_ENABLE_V1_MULTIPROCESSING=0, or call finetune with wait=True."
            )
        options = {"objective": objective, **options}
        job = prepare_job(self.llm_engine, train, validation, resume_from, options, allow_python=True)
        callbacks = with_progress(callbacks, job.config) if progress else callbacks
        run = FineTuneRun(client, job.directory, job.config, job.model, callbacks)
        client.call("zo_start", str(job.directory))
        job.log_start()
        return run.wait() if wait else run

    def evaluate(
        self, data: Any, objective: Objective | None = None, *, run: FineTuneRun | None = None
    ) -> dict[str, float]:
        """Loss and accuracy on `data`, scored inside the engine.

        Args:
            objective: what to score; taken from `run` when that is given.
            run: score the state this run gives back; None: the base model.

        Returns:
            {"loss": mean nats per example, "accuracy": share of examples whose best candidate is the right one, and
            what else the objective measures, e.g. "macro_f1" or "token_accuracy"}
        """
        client = EngineClient(self.llm_engine)
        job = prepare_evaluation(self.llm_engine, data, objective, run, allow_python=True)
        evaluation = FineTuneRun(client, job.directory, job.config, job.model)
        client.call("zo_start", str(job.directory))
        return evaluation.wait().last_evaluation()

    def restore_base(self, run: FineTuneRun) -> None:
        """Bring the base weights back to what they were before a `fold` run."""
        client = EngineClient(self.llm_engine)
        client.call("zo_restore_base", run.job_id)
        client.advance()


@dataclass(frozen=True)
class PreparedJob:
    """A job that is checked and written for the engine to start."""

    directory: Path
    config: JobConfig
    model: str
    num_bases: int

    def log_start(self) -> None:
        config = self.config
        logger.info("job %s: %s, %d steps, in %s", self.directory.name, config.method, config.steps, self.directory)
        logger.info("%s", describe_space(config.method, config.space, config.steps, self.num_bases))


def prepare_job(
    engine: Any,
    train: Any,
    validation: Any,
    resume_from: str | Path | None,
    options: Mapping[str, Any],
    *,
    allow_python: bool = False,
) -> PreparedJob:
    """Check everything that can be checked before work starts, tokenise, and write the job's directory.

    Args:
        engine: vLLM's `LLMEngine` or `AsyncLLM`.
        allow_python: whether a reward may be code that the job names or brings along. Yes for who calls from Python,
            who can run anything anyway; not for who comes over a network.
    """
    zo = _training_config(engine)
    config = JobConfig.from_options(options)
    check_trust(config.objective, allow_python)
    bases = resolve_bases(config.method, config.space, config.steps, zo.slot_rank, config.bases)
    directory = _job_directory(engine, zo, config, resume_from)
    train_examples = _encode(engine, train, config.objective, "train")
    if config.examples_per_step > len(train_examples):
        times = f" and micro_batches={config.micro_batches}" if config.micro_batches > 1 else ""
        raise ConfigError(
            f"batch_size={config.batch_size}{times}: the training data has {len(train_examples)} rows; lower "
            "batch_size."
        )
    validation_examples = [] if validation is None else _encode(engine, validation, config.objective, "validation")
    validation_examples = validation_examples[: config.eval_examples]
    if resume_from is not None:
        check_same_data(directory, train_examples)
    model = engine.model_config.model
    write_job(directory, config, train_examples, validation_examples, model)
    return PreparedJob(directory, config, model, bases)


def prepare_evaluation(
    engine: Any, data: Any, objective: Objective | None, run: JobResult | None, *, allow_python: bool = False
) -> PreparedJob:
    """`prepare_job` for a job that scores `data` once, in the state of `run` or of the base."""
    zo = _training_config(engine)
    objective = objective or (run.config.objective if run else None)
    if objective is None:
        raise ConfigError("objective=None: evaluate needs an objective, or a run to take it from.")
    check_trust(objective, allow_python)
    examples = _encode(engine, data, objective, "data")
    directory = _state_dir(zo) / f"evaluate-{uuid.uuid4().hex[:8]}"
    if run is None or run.config.space == "fold":
        config, initial = JobConfig(objective=objective, steps=0), None
    else:
        config, initial = replace(run.config, objective=objective), run.version_file
    model = engine.model_config.model
    write_job(directory, config, [], examples, model, evaluate_only=True, initial=initial)
    return PreparedJob(directory, config, model, num_bases=1)


def check_trust(objective: Objective, allow_python: bool) -> None:
    """Refuse a reward that is code where code is not allowed.

    Raises:
        ConfigError: names the reward or grader.
    """
    if isinstance(objective, Reward) and objective.needs_trust and not allow_python:
        raise ConfigError(
            f"reward={objective.reward!r}, grader={objective.grader!r:.60}: runs Python code in the engine, which is "
            "not allowed here. Use a grader without python, or a reward of vllm_zo.rewards."
        )


def with_progress(callbacks: Iterable[Callback], config: JobConfig) -> list[Callback]:
    """The callbacks and a progress bar."""
    from vllm_zo.entrypoints.progress import ProgressBar

    return [*callbacks, ProgressBar(config.steps)]


def _training_config(engine: Any) -> ZOTrainingConfig:
    additional = engine.vllm_config.additional_config
    if not isinstance(additional, dict) or "zo_training" not in additional:
        raise ConfigError("this engine was started without training: use LLM(..., zo_training=True).")
    config = ZOTrainingConfig.from_user(additional["zo_training"])
    assert config is not None
    return config


def _encode(engine: Any, source: Any, objective: Objective, name: str) -> list[EncodedExample]:
    examples = load_examples(source, name)
    tokenizer = engine.get_tokenizer()
    label = str(source) if isinstance(source, str | Path) else name
    return encode_examples(examples, objective, tokenizer, engine.model_config.max_model_len, label)


def _state_dir(zo: ZOTrainingConfig) -> Path:
    if zo.state_dir is not None:
        return Path(zo.state_dir).resolve()
    global _temporary_state_dir
    if _temporary_state_dir is None:
        _temporary_state_dir = Path(tempfile.mkdtemp(prefix="vllm-zo-"))
        logger.info("no state_dir given: jobs keep their logs in %s", _temporary_state_dir)
    return _temporary_state_dir


_temporary_state_dir: Path | None = None


def _job_directory(engine: Any, zo: ZOTrainingConfig, config: JobConfig, resume_from: str | Path | None) -> Path:
    """Absolute: the engine may be another process, and its name is the job's id."""
    if resume_from is not None:
        directory = Path(resume_from).resolve()
        _check_resumes(engine, zo, config, directory)
        return directory
    if config.output_dir is None:
        return _state_dir(zo) / f"zo-{uuid.uuid4().hex[:8]}"
    directory = Path(config.output_dir).resolve()
    if (directory / "seeds.log").exists():
        raise ConfigError(
            f"output_dir={config.output_dir!r} holds another run; pass resume_from= to continue it, or choose another."
        )
    return directory


def _check_resumes(engine: Any, zo: ZOTrainingConfig, config: JobConfig, directory: Path) -> None:
    """Refuse to continue a run with another configuration, model or engine, before anything in it is touched.

    Raises:
        ConfigError: there is no run, or it was made otherwise; names what differs, with both values.
        CorruptLogError: the head of its seed log is damaged, so that no step can be used.
    """
    if not (directory / "job.json").exists():
        raise ConfigError(f"resume_from={str(directory)!r}: no job.json there; give the directory of an earlier run.")
    config.check_resumes(JobConfig.from_json(read_description(directory)["config"]))
    if not (directory / "seeds.log").exists():  # it ended before its first step
        return
    header = read_seed_log(directory / "seeds.log").header
    model_config = engine.model_config
    dtype = str(model_config.dtype).removeprefix("torch.")
    bases = resolve_bases(config.method, config.space, config.steps, zo.slot_rank, config.bases)
    if base_fingerprint(model_config.model) != header.base_fingerprint:
        raise ConfigError(
            f"model={model_config.model!r}: the run in {directory} trained another one, {header.base_model!r}. Start "
            f"the "
            "engine with that model, or start a new job."
        )
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
