"""The handle that `finetune` returns: it follows a job, keeps its numbers, and gives its result."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vllm_zo.checkpoint.export import AdapterReport, export_merged, export_peft
from vllm_zo.checkpoint.replay import rebuild_state
from vllm_zo.checkpoint.seed_log.reader import read_seed_log
from vllm_zo.config import JobConfig
from vllm_zo.entrypoints.llm.append import Appender
from vllm_zo.entrypoints.llm.client import Client
from vllm_zo.errors import ConfigError, JobError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.jobs.records import EvaluationMetrics, StepMetrics, is_evaluation
from vllm_zo.jobs.status import FINAL, JobStatus

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

Callback = Callable[["JobResult", dict[str, Any]], None]
"""The run calls callback(run, record) for every step and evaluation, in order. If the callback has a method `close`,
the run calls it whenever it stops following the job. More records may come after that: a paused engine may go on."""

# vLLM tells adapters apart by this id, and neither checks nor assigns it in `LLM`. Users number theirs from 1.
_lora_ids = itertools.count(1 << 20)


class JobResult:
    """The numbers of a job so far, and its result.

    Attributes:
        history: one record a training step (`jobs/records.py`) since the job was started or resumed.
        evaluations: one record an evaluation, likewise.
        directory: the directory with all files of the job (`jobs/directory.py`).
    """

    def __init__(
        self,
        client: Any,
        directory: Path,
        config: JobConfig,
        model: str,
        callbacks: Iterable[Callback] = (),
        appender: Appender | None = None,
    ) -> None:
        self._client = client
        self.job_id = directory.name
        self.directory = directory
        self.config = config
        self.model = model
        self.history: list[StepMetrics] = []
        self.evaluations: list[EvaluationMetrics] = []
        self._callbacks = list(callbacks)
        self._appender = appender
        self._summary: dict[str, Any] = {"status": JobStatus.QUEUED}
        self._lora_requests: dict[int, LoRARequest] = {}

    # --- what the engine answers --------------------------------------------------------------------------------------

    @property
    def status(self) -> JobStatus:
        """The job's status at the last `poll`. It equals its word: `run.status == "succeeded"`."""
        return JobStatus(self._summary["status"])

    @property
    def waits_for(self) -> str | None:
        """Why a running job could not go on at the last `poll`, e.g. a full disk. None: nothing stops it."""
        return self._summary.get("waits_for")

    @property
    def engines(self) -> dict[str, dict[str, Any]]:
        """The engines of a cluster at the last `poll` (`Coordinator.stats`); empty where one engine runs the job."""
        return self._summary.get("engines", {})

    @property
    def _seen(self) -> int:
        return len(self.history) + len(self.evaluations)

    def _receive(self, answer: dict[str, Any]) -> None:
        """Keep the answer of `zo_status`, and hand its new records to the callbacks."""
        records = answer.pop("records")
        first = answer.pop("next") - len(records)
        self._summary = answer
        # Another task may have polled while this answer was on its way: records that it has received are left out.
        for record in records[self._seen - first :]:
            if is_evaluation(record):
                self.evaluations.append(record)
            else:
                self.history.append(record)
            for callback in self._callbacks:
                callback(self, record)
        if self.status in FINAL:
            self._close_callbacks()

    def _close_callbacks(self) -> None:
        for callback in self._callbacks:
            if (close := getattr(callback, "close", None)) is not None:
                close()
        if self.status in FINAL:
            # Only of a job that has ended. If the engine is paused, the job goes on later and has more records.
            self._callbacks.clear()

    def _growing(self) -> Appender:
        if self._appender is None:
            raise ConfigError(f"job {self.job_id}: its rows stay as they are; start it with continual=True.")
        return self._appender

    def _check_succeeded(self) -> None:
        if self.status != JobStatus.SUCCEEDED:
            error = str(self._summary.get("error")).rstrip(".")
            raise JobError(f"job {self.job_id} {self.status}: {error}; its log is in {self.directory}.")

    # --- results ------------------------------------------------------------------------------------------------------

    @property
    def metrics(self) -> dict[str, Any]:
        """The main numbers: loss, accuracy and what else the objective measures, for the state that the run gives back
        and (as `initial_...`) for the state before training. `steps` counts those of an interrupted run, too."""
        out: dict[str, Any] = {"steps": self._summary.get("step", 0)}
        if self.history:
            out["train_loss"] = self.history[-1]["loss"]
        if (given := self._given_evaluation()) is not None:
            out |= {**_scores(given), "step": given["step"]}
            out |= {f"initial_{name}": value for name, value in _scores(self._summary["initial"]).items()}
        return out

    def _given_evaluation(self) -> EvaluationMetrics | None:
        """The evaluation of the state that the run gives back; the last evaluation where none is the best."""
        chosen: EvaluationMetrics | None = self._summary.get("best") if self.config.keeps_best else None
        return chosen or (self.evaluations[-1] if self.evaluations else None)

    def last_evaluation(self) -> dict[str, float]:
        """Loss and metrics of the last evaluation: the answer of `evaluate`."""
        return _scores(self.evaluations[-1])

    @property
    def transcripts(self) -> dict[str, Any]:
        """Of rollouts: what the first rows said in the first evaluation ("base") and in the newest one ("newest").

        Each is {"step": ..., "rollouts": [{"row", "reward", "error", "said": [{"role", "text"}, ...]}, ...]}.
        """
        return JobDir(self.directory).read_transcripts()

    @property
    def published(self) -> list[int]:
        """Steps whose state the engine could serve at the last `poll`, oldest first."""
        return list(self._summary.get("published") or [])

    @property
    def version(self) -> int:
        """Step of the state that the run gives back: the best evaluation's, or the newest published one.

        Raises:
            ConfigError: the job has published no state yet.
        """
        step: int | None = self._summary.get("gives_back")
        if step is None:
            raise ConfigError(
                f"job {self.job_id} has published no state yet (it publishes one at every evaluation and at the end)."
            )
        return step

    @property
    def version_file(self) -> Path:
        """The file with the fp32 accumulators of the state that the run gives back."""
        return JobDir(self.directory).version(self.version)

    @property
    def lora_request(self) -> LoRARequest:
        """The tuned state for `llm.generate(..., lora_request=run.lora_request)`. The engine has it in memory.

        Raises:
            ConfigError: the job has published no state yet, or it trains the base itself (`fold`) and has no adapter.
        """
        self._needs_adapter("lora_request")
        from vllm.lora.request import LoRARequest

        version = self.version
        if version not in self._lora_requests:
            # A name for every version: vLLM takes two LoRARequests of one name for the same adapter, and its prefix
            # cache goes by the name, so a newer version would get KV blocks of an older one.
            name = f"{self.job_id}@{version}"
            self._lora_requests[version] = LoRARequest(name, next(_lora_ids), f"zo://{self.job_id}/{version}")
        return self._lora_requests[version]

    def _needs_adapter(self, what: str) -> None:
        if self.config.space == "fold":
            raise ConfigError(
                f"{what}: update_space='fold' writes the base weights, so there is no adapter. Use save_merged(), or "
                "train with update_space='bank'."
            )

    def save(self, directory: str | Path, rank: int | None = None) -> AdapterReport:
        """Write a PEFT adapter directory that `peft` and vLLM can load.

        Args:
            rank: compress the adapter to this rank. The report says how much is lost. None: lossless.

        Raises:
            ConfigError: the job has no adapter (`fold`), or has published no state yet.
            JobError: the directory cannot be written.
        """
        self._needs_adapter("save()")
        log = read_seed_log(JobDir(self.directory).log)
        state = rebuild_state(log, self.version, snapshot=self.version_file)
        return export_peft(state, self.model, directory, rank=rank)

    def save_merged(self, directory: str | Path) -> None:
        """Write a Hugging Face checkpoint with the update merged into the weights. It works in both update spaces."""
        log = read_seed_log(JobDir(self.directory).log)
        # A `fold` job publishes no versions: it gives back the state after its last step.
        upto = self.version if self.config.space == "bank" else None
        export_merged(self.model, log, directory, upto=upto)

    def plot(self, path: str | Path) -> None:
        """Draw loss and accuracy over steps into an image file. Raises ConfigError if matplotlib is not installed."""
        from vllm_zo.entrypoints.llm.plot import plot_run

        # People show pictures to others: the path on this machine stays out of the title.
        name = Path(self.model).name if Path(self.model).is_dir() else self.model
        plot_run(self.history, self.evaluations, path, title=f"{name}: {self.config.method.name}")


class FineTuneRun(JobResult):
    """The handle on a fine-tuning job of an `LLM`."""

    _client: Client

    def add(self, rows: Any) -> int:
        """Append rows to a continual job, in any form that `finetune` takes; returns how many examples they make. The
        disk has them then, and the job draws from them from its next step on.

        Raises:
            ConfigError: the job's rows cannot grow, it has ended, or a row cannot be used: then none is appended.
            JobError: the disk refuses; none is appended.
        """
        appender = self._growing()
        self._client.call("zo_extend", self.job_id, appender.size)  # refuses a job that has ended
        count = appender.append(rows)
        self._client.call("zo_extend", self.job_id, appender.size)
        return count

    def poll(self) -> None:
        """Fetch the new records from the engine and hand them to the callbacks."""
        self._receive(self._client.call("zo_status", self.job_id, self._seen))

    def wait(self) -> FineTuneRun:
        """Block until the job has ended.

        Raises:
            JobError: it failed; the message says why and where its last good state is.
        """
        try:
            while self.status not in FINAL:
                moving = self._client.advance()
                self.poll()
                if self.status == JobStatus.PAUSED and (why := self._summary.get("paused_because")) is not None:
                    raise JobError(f"job {self.job_id} is paused: {why}.")
                # In process: without work the engine will never move by itself, and this loop would spin for ever.
                if not moving and self.status not in FINAL:
                    raise JobError(
                        f"job {self.job_id} cannot go on: the engine is paused or shutting down, or zo_training.window "
                        "is closed. Call wait() again once it goes on."
                    )
        except KeyboardInterrupt:
            self.cancel()
            raise
        finally:
            self._close_callbacks()
        # In process: one more engine step carries the commands that free the job's slots to the workers.
        self._client.advance()
        self._check_succeeded()
        return self

    def cancel(self) -> None:
        """Stop the job at once and wait for its end. The logged steps stay usable (`resume_from`, `save`)."""
        self._client.call("zo_stop", self.job_id, True)
        self.poll()
        while self.status not in FINAL and self._client.advance():  # groups in flight are recorded first
            self.poll()
        self._client.advance()

    def stop(self) -> None:
        """Ask the job to stop at its next step boundary; it evaluates and publishes there, as at a normal end."""
        self._client.call("zo_stop", self.job_id, False)

    def resume(self) -> None:
        """Let a job go on that has paused itself (`max_drift`). Raises ConfigError: it is not paused."""
        self._client.call("zo_resume", self.job_id)


def _scores(record: EvaluationMetrics) -> dict[str, float]:
    """Loss and metrics of an evaluation, by their own names."""
    scores = {key.removeprefix("eval_"): value for key, value in record.items() if key.startswith("eval_")}
    return cast(dict[str, float], scores)
