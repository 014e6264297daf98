"""Makes a job that the engine can start from a request and its files: reads, renders, tokenises, writes.

All of it blocks: call it in a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_zo.config import JobConfig
from vllm_zo.data.encode import check_bos_token_id
from vllm_zo.engine.load_job import ONE_WORKER
from vllm_zo.entrypoints.llm.chats import Render, rendered
from vllm_zo.entrypoints.llm.limits import check_layers_exist, check_step, sequences_known
from vllm_zo.entrypoints.llm.prepare import check_trust, prepare_job
from vllm_zo.entrypoints.server.jobs.request import (
    JobRequest,
    Wanted,
    job_options,
    read_request,
    shown_hyperparameters,
    shown_method,
)
from vllm_zo.entrypoints.server.jobs.rollouts import check_host
from vllm_zo.entrypoints.server.settings import ServerSettings
from vllm_zo.entrypoints.server.state.directory import StateDir
from vllm_zo.entrypoints.server.state.files import Files
from vllm_zo.entrypoints.server.state.job_record import JobRecord
from vllm_zo.errors import ConfigError
from vllm_zo.job_memory import check_state, free_memory
from vllm_zo.methods.plan import ModuleShape
from vllm_zo.methods.targets import select_shapes
from vllm_zo.objectives import LanguageModeling, Objective, Rollout, Trust
from vllm_zo.slot_fit import resolve_bases

MAX_VERSIONS = 10_000
"""Most checkpoints of one job: each is a directory on disk and a name that the server serves."""
MAX_REWARD_S = 600.0
"""Largest `timeout_s` of a reward, in seconds: a reward that hangs keeps the job's slots for so long."""


@dataclass(frozen=True)
class Preparer:
    """Checks requests and prepares jobs.

    Args:
        engine: vLLM's `AsyncLLM`.
        render: the server's chat rendering.
        slot_rank: rank of a ZO slot of the engine.
    """

    engine: Any
    state: StateDir
    files: Files
    settings: ServerSettings
    render: Render
    slot_rank: int
    modules: Sequence[ModuleShape] = ()
    """What jobs can train, on an engine whose workers use the memory of this machine; else empty."""
    engines: int = 1
    """How many the server has. Jobs train on all of them."""

    def check(self, wanted: Wanted) -> JobConfig:
        """Check a request as far as is possible without its data, before a job is made of it.

        Returns:
            The job's configuration. Values that depend on the data are placeholders in the allowed range.

        Raises:
            ConfigError: a value is out of range, or the job does not fit the engine.
        """
        objective = wanted.objective or LanguageModeling()
        check_trust(objective, self._trust)
        check_host(objective, self.settings.rollout_hosts)
        check_bos_token_id(objective, self.engine.model_config.get_vocab_size())
        options = job_options(wanted, None, objective)
        config = JobConfig.from_options(options)
        bases = resolve_bases(config.method, config.space, config.steps, self.slot_rank, config.bases)
        check_layers_exist(config, self.engine.model_config.get_total_num_hidden_layers())
        self._check_bounds(config)
        self._check_engines(objective, config.space, config.continual)
        if self.engines > 1 and (measured := config.method.coordinates.measured):
            raise ConfigError(
                f"{config.method.name}.{measured} {ONE_WORKER}; use 'normal', or a server with one engine."
            )
        if isinstance(objective, Rollout) and config.space == "fold":
            raise ConfigError(
                "update_space='fold' with rollouts: the server answers no requests while a `fold` job changes the "
                "base; train with update_space='bank'."
            )
        self._check_memory(config, bases)
        return config

    def _check_engines(self, objective: Objective | None, space: str, continual: bool) -> None:
        if self.engines == 1:
            return
        with_one = f"this server has {self.engines} engines; start one with --data-parallel-size 1"
        if space == "fold":
            raise ConfigError(
                f"update_space='fold' writes the base, which every engine has, and {with_one}, or train with "
                "update_space='bank'."
            )
        if isinstance(objective, Rollout):
            raise ConfigError(f"rollouts ask one engine several times, and {with_one}.")
        if continual:
            raise ConfigError(f"rows are appended to a job of one engine, and {with_one}.")

    def _check_memory(self, config: JobConfig, bases: int) -> None:
        """Refuse a job whose state the machine has no room for now. The worker looks again when the job starts.

        Raises:
            ConfigError: it does not fit; the message has the figure and the bound.
        """
        try:
            modules = select_shapes(config.target_modules, self.modules, config.target_layers)
        except ConfigError:
            return  # nothing matches: the engine refuses the job
        check_state(config.method, modules, bases, free_memory())

    def check_start(self, job: JobRecord) -> None:
        """Check that a job from before a restart may still start: the server may have other flags than it had then.

        Raises:
            ConfigError: the job runs code, or posts to a host, which the server does not allow any more; or it cannot
                train on several engines, which the server has now.
        """
        objective = read_request(JobRequest.model_validate(job.request)).objective
        self._check_engines(objective, "fold" if job.exclusive else "bank", job.continual)
        if objective is not None:
            check_trust(objective, self._trust)
            check_host(objective, self.settings.rollout_hosts)

    def _check_bounds(self, config: JobConfig) -> None:
        check_step(config, sequences_known(config.objective), self.engine.vllm_config.scheduler_config.max_num_seqs)
        interval = config.publish_interval
        if interval is not None and config.steps // interval > MAX_VERSIONS and not config.continual:
            raise ConfigError(
                f"publish_interval={interval}: {config.steps} steps would give more than {MAX_VERSIONS} checkpoints, "
                "each an adapter that is served; raise it."
            )
        for name in ("max_tokens", "timeout_s"):
            limit = {"max_tokens": self.engine.model_config.max_model_len, "timeout_s": MAX_REWARD_S}[name]
            if (value := getattr(config.objective, name, 0)) > limit:
                raise ConfigError(f"{name}={value}: expected at most {limit}.")

    @property
    def _trust(self) -> Trust:
        return Trust.SOURCE if self.settings.allow_python_graders else Trust.NAMES

    @property
    def model_path(self) -> str:
        """The base model's name or path in the engine."""
        return str(self.engine.model_config.model)

    def prepare(self, job: JobRecord) -> dict[str, Any]:
        """Write the job's directory; returns the fields of its record that the data has decided.

        Raises:
            APIError: a file is gone.
            ConfigError: a row cannot be used, or the job does not fit the engine.
            JobError: the disk refuses the directory.
        """
        # From the request: the record shows values that were worked out without the data.
        wanted = read_request(JobRequest.model_validate(job.request))
        train, objective = self._data(wanted, job.training_file, "training_file")
        validation = None
        if job.validation_file is not None:
            validation, kind = self._data(wanted, job.validation_file, "validation_file")
            if kind != objective:
                raise ConfigError("validation_file: chats (`messages`) and prompts; use the kind of training_file.")
        options = job_options(wanted, len(train), objective)
        options["output_dir"] = str(self.state.job(job.id))
        if self.engines > 1 and options.get("shards") is None:
            options["shards"] = self.engines
        config = JobConfig.from_options(options)
        # A second time: `check` did not know the number of rows, and with it the number of steps.
        self._check_bounds(config)
        asked = wanted.objective or LanguageModeling()
        prepare_job(self.engine, train, validation, None, config, trust=self._trust, asked=asked)
        shown = shown_hyperparameters(wanted, config, len(train))
        return {
            "hyperparameters": shown,
            "method": shown_method(wanted, shown, objective),
            "total_steps": 0 if config.continual else config.steps,
            "exclusive": config.space == "fold",
            "keeps_best": config.keeps_best and validation is not None,
        }

    def _data(self, wanted: Wanted, file_id: str, param: str) -> tuple[list[dict[str, Any]], Objective]:
        records = self.files.records(file_id, param)
        return rendered(records, wanted.objective or LanguageModeling(), self.render, param)
