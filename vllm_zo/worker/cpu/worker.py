"""The training worker on a CPU: what `worker_cls` names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_zo.worker.cpu.crowding import Crowding
from vllm_zo.worker.cpu.kernels import choose_kernels
from vllm_zo.worker.cpu.memory import keep_freed_memory
from vllm_zo.worker.cpu.platform import CPUPlatform
from vllm_zo.worker.worker import ZOWorkerMixin


class ZOCPUWorker(ZOWorkerMixin, CPUWorker):
    """vLLM's CPU worker, with a Trainer."""

    platform_class = CPUPlatform

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        choose_kernels(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        self._crowding = Crowding()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        keep_freed_memory()

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        self._crowding.look()
        return super().execute_model(*args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        with _drawing_only_what_counts(self.model_runner):
            return super().sample_tokens(*args, **kwargs)


@contextmanager
def _drawing_only_what_counts(runner: Any) -> Iterator[None]:
    """In the block, a request in the middle of its prefill has no generator.

    vLLM samples for it too, and takes the draw back by the generator's offset. The generator of a CPU has none
    ("CPU Generator does not use offset", vLLM 0.30 to 0.32), so a long prompt with a seed would end the engine. Without
    a generator there is nothing to take back: the request draws the same numbers, in however many parts it is read.
    The V2 runner has no generators: it makes each number of the seed and the position.
    """
    if not isinstance(runner, GPUModelRunner):
        yield
        return
    batch = runner.input_batch
    generators: dict[int, Any] = batch.generators
    unread = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist() if generators else []
    kept = {index: generators.pop(index) for index in unread if index in generators}
    try:
        yield
    finally:
        generators.update(kept)
