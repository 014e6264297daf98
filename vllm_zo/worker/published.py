"""Published versions: states of jobs that requests may name as `zo://<job_id>/<version>`.

A version is a file of float32 accumulators. When a request names it, the adapter is made from the file and the keys of
V. The last few adapters stay in memory, because clients ask for the newest version of a running job again and again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_zo.checkpoint.snapshot import load_snapshot
from vllm_zo.commands import ADAPTER_SCHEME
from vllm_zo.errors import SlotError
from vllm_zo.job_memory import RESIDENT
from vllm_zo.methods.adapter import whole_adapter
from vllm_zo.methods.state import AdapterState
from vllm_zo.worker.lora_targets import ModuleNames
from vllm_zo.worker.patches import LOAD_ADAPTER

if TYPE_CHECKING:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.request import LoRARequest


@dataclass(frozen=True)
class Version:
    """A published version. The file `path` has its accumulators; the rest is here."""

    make_state: Callable[[], AdapterState]
    """Makes an empty state of the job, with its method, layout, seed and number of bases."""
    path: str


class VersionStore:
    """Knows the versions of every job that this engine has run. Each tensor-parallel rank's worker has one.

    Args:
        dtype: type of the adapters' factors.
        exponent: B is scaled by 2**exponent and A by its inverse, against underflow in float16 (`BLOCK_EXPONENT`).
        names: of the engine's model.
    """

    def __init__(self, dtype: torch.dtype, exponent: int, names: ModuleNames) -> None:
        self.dtype = dtype
        self.exponent = exponent
        self.names = names
        self._versions: dict[tuple[str, int], Version] = {}
        self._resident: OrderedDict[tuple[str, int], LoRAModel] = OrderedDict()

    def publish(self, job_id: str, version: int, state: AdapterState, path: str) -> None:
        """Register the version that has just been written to `path`.

        Args:
            state: the job's, as it was written. The store does not keep it, because the job's next step changes it.
        """
        self.know(job_id, version, state, path)
        self._keep((job_id, version), self._make(state))

    def know(self, job_id: str, version: int, state: AdapterState, path: str) -> None:
        """Register a version that the job has written to `path` earlier. `state` is any state of the job."""
        self._versions[job_id, version] = Version(state.factory(), path)

    def forget(self, job_id: str, version: int) -> None:
        """Serve a version no more. Requests that use it keep what vLLM has loaded."""
        self._versions.pop((job_id, version), None)
        self._resident.pop((job_id, version), None)

    def forget_job(self, job_id: str) -> None:
        """Serve no version of a job any more."""
        for of, version in [key for key in self._versions if key[0] == job_id]:
            self.forget(of, version)

    def adapter(self, path: str) -> LoRAModel:
        """The adapter that `path`, `zo://<job_id>/<version>`, names.

        Raises:
            SlotError: the version was never published on this engine, or its file is gone.
        """
        job_id, _, number = path.removeprefix(ADAPTER_SCHEME).rpartition("/")
        key = job_id, int(number)
        if key not in self._resident:
            self._keep(key, self._load(key))
        self._resident.move_to_end(key)
        return self._resident[key]

    def _keep(self, key: tuple[str, int], model: LoRAModel) -> None:
        self._resident[key] = model
        if len(self._resident) > RESIDENT:
            self._resident.popitem(last=False)

    def _load(self, key: tuple[str, int]) -> LoRAModel:
        version = self._versions.get(key)
        name = f"{ADAPTER_SCHEME}{key[0]}/{key[1]}"
        if version is None:
            have = sorted(f"{ADAPTER_SCHEME}{j}/{v}" for j, v in self._versions)
            raise SlotError(f"{name} is not published on this engine; published: {have or 'nothing'}")
        if not Path(version.path).exists():
            raise SlotError(f"{name}: its file {version.path} is gone")
        state = version.make_state()
        load_snapshot(version.path, state)
        return self._make(state)

    def _make(self, state: AdapterState) -> LoRAModel:
        """The state as a vLLM adapter: A = [V_b^T, ...], B = [U_b, ...], with a rank block for each basis in use."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import LoRALayerWeights

        loras, rank = {}, 0
        for module, u_OR, v_IR in whole_adapter(state):
            rank = u_OR.shape[1]
            a = (v_IR.T * 2.0**-self.exponent).to(self.dtype).contiguous().cpu()
            b = (u_OR * 2.0**self.exponent).to(self.dtype).cpu()
            # lora_alpha = rank: vLLM's scaling is 1, because the factors hold the whole change.
            name = self.names.of_vllm(module.name)
            loras[name] = LoRALayerWeights(name, rank, rank, a, b)
        return LoRAModel(1, rank, loras)


def serve_versions(lora_manager: Any, store: VersionStore) -> None:
    """Make vLLM take adapters with a path `zo://<job>/<version>` from `store`. It loads all others as before.

    Args:
        lora_manager: vLLM's `WorkerLoRAManager`.
    """

    def version(request: LoRARequest) -> LoRAModel:
        # A clone, because vLLM packs q, k and v into one entry of the adapter's dictionary, in place.
        return store.adapter(request.lora_path).clone(request.lora_int_id)

    def refuse(request: LoRARequest) -> LoRAModel:
        raise SlotError(f"{request.lora_path}: ZO slots are materialised by the engine and cannot be loaded")

    sources = {ADAPTER_SCHEME.removesuffix("://"): version, "zo-slot": refuse}
    if LOAD_ADAPTER.unneeded():
        for scheme, source in sources.items():
            lora_manager.register_adapter_source(scheme, source)
        return
    load = lora_manager._load_adapter  # private: vLLM has no other place that turns a path into an adapter

    def _load_adapter(request: LoRARequest) -> LoRAModel:
        scheme, separator, _ = request.lora_path.partition("://")
        return sources.get(scheme, load)(request) if separator else load(request)

    LOAD_ADAPTER.on(lora_manager, "_load_adapter", _load_adapter)
