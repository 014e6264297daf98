"""Published versions: states of jobs that requests may name, `zo://<job_id>/<version>`.

A version is a file of fp32 accumulators; the adapter is made of it and of V's keys when somebody asks. The latest few
stay in memory, because the newest version of a running job is asked for again and again.
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
from vllm_zo.methods.state import AdapterState

if TYPE_CHECKING:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.request import LoRARequest

RESIDENT = 4
"""Adapters kept in host memory. One is rank x (in + out) elements a module; making it again takes milliseconds."""


@dataclass(frozen=True)
class Version:
    """Everything but the accumulators, which are in `path`."""

    make_state: Callable[[], AdapterState]
    """An empty state of the job: its method, layout, seed and bases."""
    touched: dict[int, int]
    """Accumulators in use and the basis each belongs to."""
    path: str


class VersionStore:
    """Knows every version published on this engine. Lives in the worker, one a rank.

    Args:
        dtype: of the adapter's factors. exponent: B is scaled by 2**exponent and A by its inverse (float16 underflow).
    """

    def __init__(self, dtype: torch.dtype, exponent: int) -> None:
        self.dtype = dtype
        self.exponent = exponent
        self._versions: dict[tuple[str, int], Version] = {}
        self._resident: OrderedDict[tuple[str, int], LoRAModel] = OrderedDict()

    def publish(self, job_id: str, version: int, state: AdapterState, path: str) -> None:
        """Register what was just written to `path`."""
        self._versions[job_id, version] = Version(state.factory(), dict(state.basis_of_row), path)
        self._keep((job_id, version), self._make(state))

    def adapter(self, path: str) -> LoRAModel:
        """The adapter behind `zo://<job_id>/<version>`.

        Raises:
            SlotError: never published on this engine, or its file is gone.
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
        state.basis_of_row = dict(version.touched)
        return self._make(state)

    def _make(self, state: AdapterState) -> LoRAModel:
        """The accumulator as a vLLM adapter: A = concat V_b^T, B = concat U_b, one rank block a basis in use."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import LoRALayerWeights

        factors = [state.factors(basis, theta_N) for basis, theta_N in state.bases_to_write()]
        rank = len(factors) * state.layout.rank
        loras = {}
        for index, module in enumerate(state.layout.modules):
            u_OR = torch.cat([u[index] for u, _ in factors], dim=1)
            v_IR = torch.cat([v[index] for _, v in factors], dim=1)
            a = (v_IR.T * 2.0**-self.exponent).to(self.dtype).contiguous().cpu()
            b = (u_OR * 2.0**self.exponent).to(self.dtype).cpu()
            loras[module.name] = LoRALayerWeights(module.name, rank, rank, a, b)
        return LoRAModel(1, rank, loras)


def serve_versions(lora_manager: Any, store: VersionStore) -> None:
    """Adapters whose path is `zo://<job>/<version>` come from `store`; anything else goes vLLM's own way."""

    def version(request: LoRARequest) -> LoRAModel:
        return store.adapter(request.lora_path).clone(request.lora_int_id)

    def refuse(request: LoRARequest) -> LoRAModel:
        raise SlotError(f"{request.lora_path}: ZO slots are materialised by the engine and cannot be loaded")

    sources = {ADAPTER_SCHEME.removesuffix("://"): version, "zo-slot": refuse}
    if hasattr(lora_manager, "register_adapter_source"):  # `patches/0003`
        for scheme, source in sources.items():
            lora_manager.register_adapter_source(scheme, source)
        return
    load = lora_manager._load_adapter

    def _load_adapter(request: LoRARequest) -> LoRAModel:
        scheme, separator, _ = request.lora_path.partition("://")
        return sources.get(scheme, load)(request) if separator else load(request)

    lora_manager._load_adapter = _load_adapter
