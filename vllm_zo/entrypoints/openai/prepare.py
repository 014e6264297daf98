"""From files and a request to a job the engine can start: reads, renders, tokenises, writes. Blocks: use a thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_zo.config import JobConfig
from vllm_zo.entrypoints.openai.chat import Template, supervised, with_prompts
from vllm_zo.entrypoints.openai.job_request import ANSWERED, Wanted, job_options, shown_hyperparameters, shown_method
from vllm_zo.entrypoints.openai.settings import ServerSettings
from vllm_zo.entrypoints.openai.state_dir import StateDir
from vllm_zo.entrypoints.openai.uploads import Files
from vllm_zo.entrypoints.training import check_trust, prepare_job
from vllm_zo.errors import ConfigError
from vllm_zo.methods.spaces import resolve_bases
from vllm_zo.objectives import LanguageModeling, Objective, Reward

PROVISIONAL_ROWS = 16
"""Stands for the number of examples while a request is checked and its data has not been read."""


@dataclass(frozen=True)
class Preparer:
    """Everything that jobs are made of.

    Args:
        engine: vLLM's `AsyncLLM`.
        render: the chat template.
        slot_rank: rank of a ZO slot of the engine.
    """

    engine: Any
    state: StateDir
    files: Files
    settings: ServerSettings
    render: Template
    slot_rank: int

    def check(self, wanted: Wanted) -> JobConfig:
        """What is wrong with a request whatever its data, before a job is made of it.

        Raises:
            ConfigError: a value out of range, or a job that does not fit the engine.
        """
        objective = wanted.objective or LanguageModeling()
        check_trust(objective, self.settings.allow_python_graders)
        options = job_options(wanted, PROVISIONAL_ROWS, objective)
        config = JobConfig.from_options(options)
        resolve_bases(config.method, config.space, config.steps, self.slot_rank, config.bases)
        return config

    def prepare(self, job: dict[str, Any]) -> dict[str, Any]:
        """Write the job's directory; returns what its record is to say from now on.

        Raises:
            ConfigError, APIError: a file is gone, a row cannot be used, or the job does not fit.
        """
        wanted = Wanted.from_json(job["wanted"])
        train, objective = self._data(wanted, job["training_file"], "training_file")
        validation = None
        if job["validation_file"] is not None:
            validation, kind = self._data(wanted, job["validation_file"], "validation_file")
            if kind != objective:
                raise ConfigError("validation_file: chats (`messages`) and prompts; use the kind of training_file.")
        options = job_options(wanted, len(train), objective)
        options["output_dir"] = str(self.state.job(job["id"]))
        allow_python = self.settings.allow_python_graders
        config = prepare_job(self.engine, train, validation, None, options, allow_python=allow_python).config
        shown = shown_hyperparameters(wanted, config, len(train))
        return {
            "hyperparameters": shown,
            "method": shown_method(wanted, shown, objective),
            "total_steps": config.steps,
            "exclusive": config.space == "fold",
            "keep_best": config.keep_best and config.space == "bank" and validation is not None,
        }

    def _data(self, wanted: Wanted, file_id: str, param: str) -> tuple[list[dict[str, Any]], Objective]:
        records = self.files.records(file_id, param)
        if isinstance(wanted.objective, Reward) and wanted.objective.template == ANSWERED:
            return with_prompts(records, self.render, wanted.objective, param)
        if wanted.objective is not None:
            return records, wanted.objective
        return supervised(records, self.render, param)
