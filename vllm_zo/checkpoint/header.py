"""The first record of a seed log: everything, beside the steps, that decides what a job's state is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from vllm_zo.checkpoint.hf_checkpoint import base_fingerprint
from vllm_zo.config import MAY_DIFFER_ON_RESUME, JobConfig
from vllm_zo.errors import ConfigError
from vllm_zo.methods import build_method, method_fields
from vllm_zo.methods.base import Method, ModuleShape
from vllm_zo.methods.state import AdapterState

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SeedLogHeader:
    """What a replay needs to know, and what a resumed job must share with the job that wrote the log."""

    job_seed: int
    method: str
    """A name in `METHODS`."""
    method_fields: Mapping[str, Any]
    update_space: str
    num_bases: int
    modules: tuple[ModuleShape, ...]
    dtype: str
    """Dtype of the base weights in the engine ("bfloat16"): folds round to it. Accumulators are float32 always."""
    base_model: str
    """Name or directory the model was loaded from; for people, two machines may differ in it."""
    base_fingerprint: str
    job_config: Mapping[str, Any]
    """`JobConfig.to_json()`; kept so that a log alone says how the run was made."""

    @classmethod
    def of(
        cls,
        method: Method,
        *,
        job_seed: int,
        update_space: str,
        num_bases: int,
        modules: Sequence[ModuleShape],
        dtype: torch.dtype | str,
        base_model: str,
        job_config: Mapping[str, Any] | None = None,
    ) -> Self:
        """The header of a job about to start; reads a few kilobytes of the base model for its fingerprint."""
        return cls(
            job_seed=job_seed,
            method=method.name,
            method_fields=method_fields(method),
            update_space=update_space,
            num_bases=num_bases,
            modules=tuple(modules),
            dtype=str(dtype).removeprefix("torch."),
            base_model=base_model,
            base_fingerprint=base_fingerprint(base_model),
            job_config=json.loads(json.dumps(job_config or {})),
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def build_method(self) -> Method:
        return build_method(self.method, **self.method_fields)

    def new_state(self, device: torch.device | str = "cpu") -> AdapterState:
        """The state before the first step, whole modules (no tensor-parallel shard)."""
        method = self.build_method()
        return AdapterState(method, method.layout(self.modules), self.job_seed, self.num_bases, device)

    def to_json(self) -> str:
        """One line; modules as [name, out features, in features]."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["modules"] = [dataclasses.astuple(m) for m in self.modules]
        return json.dumps(plain, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Inverse of `to_json`. Raises ValueError, TypeError or KeyError on anything else."""
        plain = json.loads(line)
        plain["modules"] = tuple(ModuleShape(*entry) for entry in plain["modules"])
        return cls(**plain)

    def check_resumes(self, logged: SeedLogHeader) -> None:
        """Refuse to continue the log of another job; `self` is the job about to run.

        Options that cannot change the trajectory (`MAY_DIFFER_ON_RESUME`) and the name of the model may differ: the
        same weights may lie elsewhere.

        Raises:
            ConfigError: names every field that differs, with both values.
        """
        ours = self._identity()
        # An option that the log's version did not have yet: the run was made with what is now its default.
        new = {f"job_config.{f.name}": f.default for f in dataclasses.fields(JobConfig)}
        known = {key: value for key, value in new.items() if key in ours and ours[key] == value}
        differing = differences(ours, known | logged._identity())
        if differing:
            raise ConfigError(
                f"cannot resume, this is another model or configuration: {'; '.join(differing)}. "
                "Use what the log was written with, or start a new job in another directory."
            )

    def _identity(self) -> dict[str, Any]:
        plain = json.loads(self.to_json())
        config = plain.pop("job_config")
        del plain["base_model"]
        hyperparameters = plain.pop("method_fields")
        return (
            plain
            | {f"{self.method}.{key}": value for key, value in hyperparameters.items()}
            | {f"job_config.{key}": value for key, value in config.items() if key not in MAY_DIFFER_ON_RESUME}
        )


def differences(here: Mapping[str, Any], logged: Mapping[str, Any]) -> list[str]:
    """One phrase for each key whose values differ, e.g. "job_seed=1 (written with 0)"."""
    missing = object()
    phrases = []
    for key in sorted(here.keys() | logged.keys()):
        ours, theirs = here.get(key, missing), logged.get(key, missing)
        if ours == theirs:
            continue
        if key == "modules":
            phrases.append(_module_difference(here[key], logged[key]))
        else:
            shown = ["absent" if value is missing else repr(value) for value in (ours, theirs)]
            phrases.append(f"{key}={shown[0]} (written with {shown[1]})")
    return phrases


def _module_difference(ours: Sequence[Sequence[Any]], theirs: Sequence[Sequence[Any]]) -> str:
    """The whole lists would fill a screen: their lengths and the first entry that differs."""
    pairs = ((a, b) for a, b in zip(ours, theirs, strict=False) if a != b)
    first = next(pairs, None)
    where = f"; the first that differs is {first[0]} (written with {first[1]})" if first else ""
    return f"modules: {len(ours)} target modules (written with {len(theirs)}){where}"
