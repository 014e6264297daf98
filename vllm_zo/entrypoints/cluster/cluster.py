"""`Cluster`: several engines on one machine, with the training calls of an `LLM`.

    with vllm_zo.Cluster("facebook/opt-1.3b", engines=4) as cluster:
        run = cluster.finetune(train="train.jsonl", objective=..., steps=20_000)

The coordinator runs in this process, and moves while `finetune` waits.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from vllm_zo.cluster.coordinator import Coordinator
from vllm_zo.config import JobConfig, ZOTrainingConfig
from vllm_zo.data import load_examples
from vllm_zo.engine.job import Job
from vllm_zo.engine.load_job import load_job
from vllm_zo.entrypoints.cluster.devices import environments
from vllm_zo.entrypoints.cluster.local import MAX_RESTARTS, LocalEngine, heard
from vllm_zo.entrypoints.cluster.messages import Call, Raised, Started, StartEngine, State
from vllm_zo.entrypoints.llm.callbacks.progress_bar import with_progress
from vllm_zo.entrypoints.llm.client import Client, whole_under_ctrl_c
from vllm_zo.entrypoints.llm.handle import Callback, FineTuneRun
from vllm_zo.entrypoints.llm.options import check_local_model, sizes_kv_cache, world_size_of
from vllm_zo.entrypoints.llm.prepare import PreparedJob, check_played, job_config
from vllm_zo.errors import ConfigError, JobError, ZOError
from vllm_zo.jobs.directory import JobDir
from vllm_zo.objectives.base import Objective
from vllm_zo.validation import check_int

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

logger = logging.getLogger("vllm.zo.cluster")

TURN_S = 0.1
"""The longest that a turn of the coordinator waits for an engine, in seconds. Ctrl-C waits for the end of a turn."""
FORGET_S = 120.0
"""How long engines may take to finish what they have of a job that has ended, in seconds; then they are killed."""


class Engine(Protocol):
    """An engine, as its cluster sees it between jobs."""

    def send(self, message: Call) -> None: ...

    def answer(self) -> Any: ...

    def call(self, method: str, *args: Any) -> Any: ...


class Host(Protocol):
    """Where the engines of a cluster are, and the coordinator of their job."""

    @property
    def engines(self) -> Sequence[Engine]: ...

    def alive(self) -> Sequence[Engine]:
        """The engines that are up, at least one. Raises JobError: none is left."""

    def start(self, directory: JobDir) -> Client:
        """Begin the job in a directory, after the end of one that nobody follows any more."""

    def close(self) -> None: ...


class Cluster:
    """Engines in child processes, each with its share of the machine's cores or GPUs.

    Args:
        model: a directory or a Hugging Face name.
        engines: how many. Each loads the whole model.
        zo_training: as for `LLM`.
        devices: the cores (on a CPU) or GPUs of each engine; None: equal shares of those that this process may use.
        min_engines: a job waits while fewer are ready, and fails once fewer can be.
        ray: address of a Ray cluster on which the engines run: "auto", "HOST:PORT", or "local" for a new one. None:
            they are children of this process.
        options: any other keyword arguments of `LLM`, the same for each engine.

    Raises:
        ConfigError: there are fewer cores or GPUs than engines, or an engine refuses its options or the model.
        JobError: an engine dies while it starts.
    """

    def __init__(
        self,
        model: str,
        engines: int = 2,
        *,
        zo_training: bool | Mapping[str, Any] | ZOTrainingConfig = True,
        devices: Sequence[Sequence[int]] | None = None,
        min_engines: int = 1,
        ray: str | None = None,
        **options: Any,
    ) -> None:
        check_int("engines", engines, 1)
        check_int("min_engines", min_engines, 1, engines)
        zo = ZOTrainingConfig.from_user(zo_training)
        if zo is None:
            raise ConfigError(f"zo_training={zo_training!r}: a cluster is for training; leave it out, or give options.")
        check_local_model(model, f"model={model!r}")
        ranks = world_size_of(options)
        # The worker in the engine's own process, or in children of it: vLLM itself may choose Ray for them.
        options.setdefault("distributed_executor_backend", "uni" if ranks == 1 else "mp")
        start = StartEngine(model, {"use_tqdm_on_load": False, **options, "zo_training": zo})
        kv_cache = not sizes_kv_cache(options)
        if ray is not None and devices is not None:
            raise ConfigError(f"devices={devices!r} with ray={ray!r}: Ray places engines; leave one of the two out.")
        self._host: Host = (
            LocalHost(start, environments(engines, ranks, devices, kv_cache=kv_cache), min_engines)
            if ray is None
            else _on_ray(start, engines, ray, ranks, min_engines=min_engines, kv_cache=kv_cache)
        )

    @property
    def engines(self) -> Sequence[Any]:
        """The engines, for people who want to look at them."""
        return self._host.engines

    # --- training -----------------------------------------------------------------------------------------------------

    def finetune(
        self,
        train: Any,
        validation: Any = None,
        *,
        objective: Objective | None = None,
        config: JobConfig | None = None,
        resume_from: str | Path | None = None,
        chat: Mapping[str, Any] | None = None,
        callbacks: Iterable[Callback] = (),
        progress: bool = True,
        **options: Any,
    ) -> FineTuneRun:
        """Fine-tune the model on all engines. Arguments, result and errors are those of `LLM.finetune`.

        A step is cut into `shards` parts. Unset, a new run has one for each engine, and a resumed run as many as it
        had. The log of a run depends on that number, and not on how many engines there are.
        """
        # Engines may work in other directories than this process.
        resume_from = None if resume_from is None else Path(resume_from).resolve()
        config = self._sharded(job_config(config, objective, options), resume_from)
        if config.output_dir is not None:
            config = replace(config, output_dir=str(Path(config.output_dir).resolve()))
        if config.space == "fold":
            raise ConfigError(
                "update_space='fold' on a cluster: every engine would have to write the base; set "
                "update_space='bank', or train on one engine."
            )
        check_played(config.objective, chat, wait=True, apart=True)
        if config.continual:
            raise ConfigError("continual=True on a cluster: rows are appended to a job of one engine; train it on one.")
        examples = load_examples(train, "train")
        held_out = None if validation is None else load_examples(validation, "validation")
        job: PreparedJob = self._host.alive()[0].call("prepare_job", chat, examples, held_out, resume_from, config)
        run = self._start(job, with_progress(callbacks, job.config) if progress else callbacks)
        job.log_start()
        return run.wait()

    def _sharded(self, config: JobConfig, resume_from: str | Path | None) -> JobConfig:
        if config.shards is not None:
            return config
        if resume_from is not None and JobDir(Path(resume_from)).description.exists():
            return replace(config, shards=JobDir(Path(resume_from)).read_description().config.shards)
        return replace(config, shards=len(self.engines))

    def evaluate(
        self,
        data: Any,
        objective: Objective | None = None,
        *,
        run: FineTuneRun | None = None,
        chat: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Score `data` on all engines. Arguments, result and errors are those of `LLM.evaluate`."""
        state = None if run is None else State(run.config, run.version_file)
        if objective is not None:
            check_played(objective, chat, wait=True, apart=True)
        examples = load_examples(data, "data")
        job: PreparedJob = self._host.alive()[0].call("prepare_evaluation", chat, examples, objective, state)
        result = self._start(job).wait().last_evaluation()
        job.discard()
        return result

    def _start(self, job: PreparedJob, callbacks: Iterable[Callback] = ()) -> FineTuneRun:
        client = self._host.start(JobDir(job.directory))
        return FineTuneRun(client, job.directory, job.config, job.model, callbacks)

    # --- serving ------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[Any],
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        """What `LLM.generate` answers, with the prompts shared out among the engines; not while a job runs.

        Args:
            lora_request: a run's `lora_request`, or any adapter. An engine that was started again after the run does
                not know its versions: save the adapter, and give its directory.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        engines = self._host.alive()[: max(1, len(prompts))]
        shares = [prompts[index :: len(engines)] for index in range(len(engines))]
        for engine, share in zip(engines, shares, strict=True):
            engine.send(Call("generate", (share, sampling_params, lora_request)))
        outputs: list[Any] = [None] * len(prompts)
        for index, engine in enumerate(engines):
            outputs[index :: len(engines)] = engine.answer()
        return outputs

    def close(self) -> None:
        """End all engines, and a job that is left. The cluster cannot be used any more."""
        self._host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _on_ray(start: StartEngine, engines: int, address: str, ranks: int, **options: Any) -> Host:
    from vllm_zo.entrypoints.cluster.on_ray.connect import require_ray

    require_ray()
    from vllm_zo.entrypoints.cluster.on_ray.host import RayHost

    if Path(start.model).is_dir():
        start = replace(start, model=str(Path(start.model).resolve()))
    return RayHost(start, engines, address, ranks, **options)


class LocalHost:
    """Engines in child processes of this one, and the coordinator of their job in it."""

    def __init__(self, start: StartEngine, surroundings: Sequence[Mapping[str, str]], min_engines: int) -> None:
        self._min_engines = min_engines
        self._epochs = itertools.count()
        """One for each job: an answer to another job is ignored."""
        self._latest: Coordinator | None = None
        """Of the newest job."""
        self.engines = [
            LocalEngine(f"engine {index}", start, environment) for index, environment in enumerate(surroundings)
        ]
        try:
            for engine in self.engines:
                _await_start(engine)
        except BaseException:
            self.close()
            raise

    def start(self, directory: JobDir) -> Client:
        self._cancel_abandoned()
        facts = self.alive()[0].facts
        assert facts is not None
        job: Job = load_job(directory, facts, None)
        coordinator = self._latest = Coordinator(job, next(self._epochs), min_engines=self._min_engines)
        return ClusterClient(self.engines, coordinator, self._min_engines)

    def _cancel_abandoned(self) -> None:
        """End a job that nobody follows any more, because a callback has raised: its log is closed in good order."""
        if self._latest is not None:
            self._latest.stop(cancel=True)

    def alive(self) -> list[LocalEngine]:
        """The engines that are up, after starting those again that have died since."""
        for engine in self.engines:
            if engine.process.poll() is not None and engine.restarts < MAX_RESTARTS:
                restart(engine)
        for engine in self.engines:
            if engine.process.poll() is None and not engine.up:
                try:
                    _await_start(engine)
                except ZOError as error:
                    logger.error("%s does not start again: %s", engine.name, error)
        alive = [engine for engine in self.engines if engine.up]
        if not alive:
            raise JobError("no engine is left: each has died too often; make a new Cluster.")
        return alive

    def close(self) -> None:
        self._cancel_abandoned()
        for engine in self.engines:
            engine.connection.close()  # first all: they end at the same time
        for engine in self.engines:
            engine.end()


class ClusterClient:
    """Moves a coordinator and its engines, for the handle of a run."""

    def __init__(self, engines: Sequence[LocalEngine], coordinator: Coordinator, min_engines: int) -> None:
        self._engines, self._coordinator, self._min_engines = engines, coordinator, min_engines
        for engine in self._engines:
            if engine.up:
                coordinator.arrive(engine.name)

    def call(self, method: str, *args: Any) -> Any:
        """What an engine's method of that name does, done by the coordinator."""
        if method == "zo_status":
            return self._coordinator.status(args[1])
        assert method == "zo_stop"
        return self._coordinator.stop(cancel=args[1])

    def advance(self) -> bool:
        """One turn: send what there is to send, and take in what engines say. After the end of the job, until every
        engine has forgotten it."""
        with whole_under_ctrl_c():
            self._turn()
        if self._coordinator.job.status.ended:
            self._drain()
        return True

    def _drain(self) -> None:
        deadline = time.monotonic() + FORGET_S
        while not self._coordinator.ended:
            self._turn()
            if time.monotonic() > deadline:
                for engine in self._engines:
                    if engine.name in self._coordinator.engines:
                        logger.error("%s does not answer, and is killed", engine.name)
                        engine.process.kill()

    def _turn(self) -> None:
        self._send()
        present = [engine for engine in self._engines if not engine.connection.closed]
        for engine in heard(present, TURN_S):
            try:
                message = engine.hear()
            except EOFError:
                self._died(engine)
                continue
            if isinstance(message, Started):
                self._coordinator.arrive(engine.name)
            elif isinstance(message, Raised):  # its process ends, and `_died` follows
                engine.first_error = engine.first_error or message.error
            else:
                self._coordinator.receive(engine.name, message)
        self._send()  # now: engines need not wait until somebody has looked at the records of the step that has ended

    def _send(self) -> None:
        by_name = {engine.name: engine for engine in self._engines}
        for name, message in self._coordinator.messages():
            by_name[name].send(message)

    def _died(self, engine: LocalEngine) -> None:
        why = f"{engine.name} {engine.obituary()}"
        self._coordinator.leave(engine.name)
        engine.connection.close()
        if self._coordinator.job.status.ended:
            return  # it is started again when it is needed
        if engine.restarts < MAX_RESTARTS:
            logger.warning("%s; it is started again, and the others go on", why)
            restart(engine)
        elif (left := sum(not other.connection.closed for other in self._engines)) < self._min_engines:
            few = f"{left} engines are left of {self._min_engines} (min_engines)" if left else "no engine is left"
            self._coordinator.fail(f"{few}; {why}")
        else:
            logger.error("%s, and is given up after %d restarts; the others go on", why, MAX_RESTARTS)


def restart(engine: LocalEngine) -> None:
    """Start an engine that has died. It is up when it says so."""
    engine.connection.close()
    engine.restarts += 1
    engine.spawn()


def _await_start(engine: LocalEngine) -> None:
    try:
        message = engine.hear()
    except EOFError:
        raise JobError(f"{engine.name} {engine.obituary()} while it started; what it printed says why.") from None
    if isinstance(message, Raised):
        raise message.error
