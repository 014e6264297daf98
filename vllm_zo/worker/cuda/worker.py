"""The training worker on a CUDA device: what `worker_cls` names."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from vllm_zo.worker.cuda.platform import CUDAPlatform
from vllm_zo.worker.worker import ZOWorkerMixin


class ZOCUDAWorker(ZOWorkerMixin, Worker):
    """vLLM's GPU worker, with a Trainer."""

    platform_class = CUDAPlatform
