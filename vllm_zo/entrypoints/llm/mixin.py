"""`llm.finetune(...)`, `llm.evaluate(...)` and `llm.restore_base(...)`: the methods that vLLM's `LLM` gains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from vllm_zo.config import JobConfig
from vllm_zo.entrypoints.llm.append import Appender
from vllm_zo.entrypoints.llm.callbacks.progress_bar import with_progress
from vllm_zo.entrypoints.llm.chats import chats_of
from vllm_zo.entrypoints.llm.client import EngineClient
from vllm_zo.entrypoints.llm.handle import Callback, FineTuneRun
from vllm_zo.entrypoints.llm.prepare import (
    PreparedJob,
    check_base_as_loaded,
    check_played,
    job_config,
    prepare_evaluation,
    prepare_job,
)
from vllm_zo.errors import ConfigError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives import Rollout, Trust
from vllm_zo.objectives.base import Objective


class TrainingMixin:
    """The training calls of an `LLM` that was made with `zo_training`."""

    llm_engine: Any
    """vLLM's own: `llm/patches.py` puts these functions into the class `LLM`, which sets it."""

    def finetune(
        self,
        train: Any,
        validation: Any = None,
        *,
        objective: Objective | None = None,
        config: JobConfig | None = None,
        resume_from: str | Path | None = None,
        chat: Mapping[str, Any] | None = None,
        wait: bool = True,
        callbacks: Iterable[Callback] = (),
        progress: bool = True,
        **options: Any,
    ) -> FineTuneRun:
        """Fine-tune the model inside the engine with a zeroth-order method.

        Args:
            train: a JSONL or CSV file, a Hugging Face dataset or its name, or an iterable of dictionaries.
            validation: data in the same forms. The job evaluates it before, at every `eval_interval` and after
                training. None: no evaluation.
            objective: defines the loss, e.g. `Classification(template=..., options=[...])`.
            config: objective and options in one object; give neither of them beside it.
            resume_from: directory of an earlier run with the same configuration and data. The job continues it on the
                same trajectory.
            chat: how chats in the data are rendered: the arguments `chat_template`, `chat_template_kwargs` and
                `chat_template_content_format` that you give to `llm.chat`.
            wait: block until the job has ended. False needs the engine in a child process (vLLM's default), where
                training goes on by itself and `generate` works meanwhile.
            callbacks: called as callback(run, record) for every step and evaluation.
            progress: show a live progress bar.
            options: fields of `JobConfig`: method, learning_rate, lr_schedule, batch_size, steps, seed, update_space,
                ...

        Raises:
            ConfigError: an argument or the data cannot work. Raised before any work starts; the message names the
                field, the value and the fix.
            JobError: the job failed; its log and last good state are kept.
        """
        config = job_config(config, objective, options)
        client = EngineClient(self.llm_engine)
        check_played(config.objective, chat, wait=wait)
        if not wait and client.in_process:
            raise ConfigError(
                "wait=False needs the engine in a child process, where training goes on by itself: unset "
                "VLLM_ENABLE_V1_MULTIPROCESSING=0, or call finetune with wait=True."
            )
        render = chats_of(self.llm_engine, chat)
        job = prepare_job(self.llm_engine, train, validation, resume_from, config, render=render, trust=Trust.IMPORTS)
        callbacks = with_progress(callbacks, job.config) if progress else callbacks
        # `zo_start` would accept the job; it would wait for `restore_base`, and this thread for the job.
        check_base_as_loaded(client.call("zo_stats"))
        with _client_for(self.llm_engine, job) as client:
            appender = Appender(self.llm_engine, JobDir(job.directory), render) if job.config.continual else None
            run = FineTuneRun(client, job.directory, job.config, job.model, callbacks, appender)
            client.call("zo_start", str(job.directory))
            job.log_start()
            return run.wait() if wait else run

    def evaluate(
        self,
        data: Any,
        objective: Objective | None = None,
        *,
        run: FineTuneRun | None = None,
        chat: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Score `data` inside the engine.

        Args:
            objective: defines the loss. None: that of `run`.
            run: score the state that this run gives back. None: the base model.
            chat: as for `finetune`.

        Returns:
            {"loss": mean nats per example, "accuracy": share of examples whose best candidate is the right one, and
            what else the objective measures, e.g. "macro_f1" or "token_accuracy"}

        Raises:
            ConfigError: the data or the objective cannot work, or neither objective nor run is given.
            JobError: the evaluation failed.
        """
        render = chats_of(self.llm_engine, chat)
        job = prepare_evaluation(self.llm_engine, data, objective, run, render=render, trust=Trust.IMPORTS)
        with _client_for(self.llm_engine, job) as client:
            evaluation = FineTuneRun(client, job.directory, job.config, job.model)
            client.call("zo_start", str(job.directory))
            result = evaluation.wait().last_evaluation()
        job.discard()
        return result

    def restore_base(self, run: FineTuneRun) -> None:
        """Give the base weights the values that they had before a `fold` run.

        Raises:
            ConfigError: a `fold` job runs, or requests are unfinished.
        """
        client = EngineClient(self.llm_engine)
        client.call("zo_restore_base", run.job_id)
        # In process: the command reaches the workers with the next engine step.
        client.advance()


def _client_for(llm_engine: Any, job: PreparedJob) -> AbstractContextManager[EngineClient]:
    """A client that can follow the job: one that plays its rollouts in the block, where its objective is one."""
    if not isinstance(job.config.objective, Rollout):
        return nullcontext(EngineClient(llm_engine))
    # Only here: it imports vLLM's server.
    from vllm_zo.entrypoints.llm.rollouts.client import RolloutClient

    return RolloutClient(llm_engine, JobDir(job.directory), job.config.objective)
