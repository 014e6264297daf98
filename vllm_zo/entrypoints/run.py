"""What `finetune` returns: a handle on a job, its numbers so far, and its result."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_zo.checkpoint.export import AdapterReport, export_merged, export_peft
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log import read_seed_log
from vllm_zo.config import JobConfig
from vllm_zo.engine.controller import version_path
from vllm_zo.engine.job import FINAL_STATES, SUCCEEDED
from vllm_zo.entrypoints.engine_client import EngineClient
from vllm_zo.errors import ConfigError, JobError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

Callback = Callable[["JobResult", dict[str, Any]], None]
"""Called as callback(run, record) for every step and evaluation, in order. One with a method `close` has it called when
following the run ends, however it ends; after a pause of the engine records may come again."""

_lora_ids = itertools.count(1 << 20)


class JobResult:
    """What is known of a job, and what it gives back.

    Attributes:
        history: one record a training step: step, loss, accuracy, loss_plus, loss_minus, projected_grad, learning_rate,
            eps, tokens, seconds.
        evaluations: one record an evaluation: step, eval_loss, eval_accuracy and the objective's other metrics.
        directory: seed log, metrics.jsonl and snapshots.
    """

    def __init__(self, directory: Path, config: JobConfig, model: str, callbacks: Iterable[Callback] = ()) -> None:
        self.job_id = directory.name
        self.directory = directory
        self.config = config
        self.model = model
        self.history: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self._callbacks = list(callbacks)
        self._summary: dict[str, Any] = {"status": "queued"}
        self._lora_requests: dict[int, LoRARequest] = {}

    # --- what the engine answers --------------------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """queued, running, succeeded, failed or cancelled."""
        return str(self._summary["status"])

    @property
    def _seen(self) -> int:
        return len(self.history) + len(self.evaluations)

    def _receive(self, answer: dict[str, Any]) -> None:
        """Take in what `zo_status` answered, and hand what is new to the callbacks."""
        records = answer.pop("records")
        first = answer.pop("next") - len(records)
        self._summary = answer
        for record in records[self._seen - first :]:  # somebody else may have polled while this answer was under way
            (self.evaluations if "eval_loss" in record else self.history).append(record)
            for callback in self._callbacks:
                callback(self, record)
        if self.status in FINAL_STATES:
            self._close_callbacks()

    def _close_callbacks(self) -> None:
        for callback in self._callbacks:
            if (close := getattr(callback, "close", None)) is not None:
                close()
        if self.status in FINAL_STATES:
            self._callbacks.clear()  # a job that can go on (the engine was paused) still has records to come

    def _check_succeeded(self) -> None:
        if self.status != SUCCEEDED:
            error = str(self._summary.get("error")).rstrip(".")
            raise JobError(f"job {self.job_id} {self.status}: {error}; its log is in {self.directory}.")

    # --- results ------------------------------------------------------------------------------------------------------

    @property
    def metrics(self) -> dict[str, Any]:
        """Headline numbers: loss, accuracy and what else the objective measures, of the state that is given back, and
        how it started."""
        out: dict[str, Any] = {"steps": len(self.history)}
        if self.history:
            out["train_loss"] = self.history[-1]["loss"]
        if (given := self._given_evaluation()) is not None:
            first = self.evaluations[0]
            out |= {**_scores(given), "step": given["step"]}
            out |= {f"initial_{name}": value for name, value in _scores(first).items()}
        return out

    def _given_evaluation(self) -> dict[str, Any] | None:
        if not self.evaluations:
            return None
        if self.config.keep_best and self.config.space == "bank":
            return min(self.evaluations, key=lambda e: float(e["eval_loss"]))
        return self.evaluations[-1]

    def last_evaluation(self) -> dict[str, float]:
        """What `evaluate` answers."""
        record = self.evaluations[-1]
        return _scores(record)

    @property
    def published(self) -> list[int]:
        """Steps whose state the engine can serve, oldest first; as of the last `poll`."""
        return list(self._summary.get("published") or [])

    @property
    def version(self) -> int:
        """Step of the state that is given back: the best evaluation's, or the newest published one."""
        published = self.published
        if not published:
            raise ConfigError(
                f"job {self.job_id} has published no state yet (it does at every evaluation and at the end)."
            )
        given = self._given_evaluation()
        return int(given["step"]) if given is not None and given["step"] in published else int(published[-1])

    @property
    def version_file(self) -> Path:
        """The fp32 accumulators of the state that is given back."""
        return version_path(self.directory, self.version)

    @property
    def lora_request(self) -> LoRARequest:
        """For `llm.generate(..., lora_request=run.lora_request)`: the tuned state, from the engine's memory.

        Raises:
            ConfigError: the job runs in `fold` space, where the base itself is tuned and there is no adapter.
        """
        self._needs_adapter("lora_request")
        from vllm.lora.request import LoRARequest

        version = self.version
        if version not in self._lora_requests:
            # Every version has its own name: the prefix cache and vLLM's adapter cache go by name.
            name = f"{self.job_id}@{version}"
            self._lora_requests[version] = LoRARequest(name, next(_lora_ids), f"zo://{self.job_id}/{version}")
        return self._lora_requests[version]

    def _needs_adapter(self, what: str) -> None:
        if self.config.space == "fold":
            raise ConfigError(
                f"{what}: update_space='fold' writes the base weights, so there is no adapter. Use save_merged(), or "
                f"train "
                "with update_space='bank'."
            )

    def save(self, directory: str | Path, rank: int | None = None) -> AdapterReport:
        """Write a PEFT adapter directory that `peft` and vLLM load. `rank` compresses it (lossy, reported)."""
        self._needs_adapter("save()")
        log = read_seed_log(self.directory / "seeds.log")
        state = rebuild_state(log, self.version, snapshot=self.version_file)
        return export_peft(state, self.model, directory, rank=rank)

    def save_merged(self, directory: str | Path) -> None:
        """Write a Hugging Face checkpoint with the update merged into the weights; in both update spaces."""
        log = read_seed_log(self.directory / "seeds.log")
        upto = self.version if self.config.space == "bank" else None
        export_merged(self.model, log, directory, upto=upto)

    def plot(self, path: str | Path) -> None:
        """Draw loss and accuracy over steps into an image file."""
        from vllm_zo.entrypoints.plot import plot_run

        name = Path(self.model).name if Path(self.model).is_dir() else self.model  # pictures get shown around
        plot_run(self.history, self.evaluations, path, title=f"{name}: {self.config.method.name}")


class FineTuneRun(JobResult):
    """A fine-tuning job of this engine."""

    def __init__(
        self, client: EngineClient, directory: Path, config: JobConfig, model: str, callbacks: Iterable[Callback] = ()
    ) -> None:
        super().__init__(directory, config, model, callbacks)
        self._client = client

    def poll(self) -> None:
        """Fetch what is new from the engine and hand it to the callbacks."""
        self._receive(self._client.call("zo_status", self.job_id, self._seen))

    def wait(self) -> FineTuneRun:
        """Block until the job has ended.

        Raises:
            JobError: it failed; the message says why and where its last good state is.
        """
        try:
            while self.status not in FINAL_STATES:
                moving = self._client.advance()
                self.poll()
                if not moving and self.status not in FINAL_STATES:
                    raise JobError(
                        f"job {self.job_id} cannot go on: the engine is paused or shutting down. "
                        "Resume it and call wait() again."
                    )
        except KeyboardInterrupt:
            self.cancel()
            raise
        finally:
            self._close_callbacks()
        # The commands that free the job's slots ride on one more engine step.
        self._client.advance()
        self._check_succeeded()
        return self

    def cancel(self) -> None:
        """Stop at once; what is logged stays usable (`resume_from`, `save`)."""
        self._client.call("zo_stop", self.job_id, True)
        self.poll()
        while self.status not in FINAL_STATES and self._client.advance():  # groups in flight are recorded first
            self.poll()
        self._client.advance()

    def stop(self) -> None:
        """Stop at the next step boundary, evaluate and publish as at a normal end."""
        self._client.call("zo_stop", self.job_id, False)


def _scores(record: dict[str, Any]) -> dict[str, float]:
    """Loss and metrics of an evaluation record, by their own names."""
    return {key.removeprefix("eval_"): value for key, value in record.items() if key.startswith("eval_")}
