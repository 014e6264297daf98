"""The first record of a seed log: everything that decides a job's state, apart from its steps."""

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
from vllm_zo.methods import METHODS
from vllm_zo.methods.base import Method
from vllm_zo.methods.plan import ModuleShape
from vllm_zo.methods.state import AdapterState
from vllm_zo.registry import settings

FORMAT_VERSION, CONTINUAL_VERSION = 1, 2
"""Format of a log, and of one with a column for appended rows, at which a reader of format 1 would stop."""


@dataclass(frozen=True, kw_only=True)
class SeedLogHeader:
    """The settings that a replay needs, and that a resumed job must share with the job that wrote the log."""

    job_seed: int
    method: str
    """A name in `METHODS`."""
    method_fields: Mapping[str, Any]
    update_space: str
    num_bases: int
    modules: tuple[ModuleShape, ...]
    dtype: str
    """Dtype of the base weights in the engine ("bfloat16"): folds round to it. Accumulators are always float32."""
    base_model: str
    """Name or directory from which the engine loaded the model. It informs people, and may differ on resuming."""
    base_fingerprint: str
    job_config: Mapping[str, Any]
    """`JobConfig.to_json()`, so that the log alone documents the run."""

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
            method_fields=settings(method),
            update_space=update_space,
            num_bases=num_bases,
            modules=tuple(modules),
            dtype=str(dtype).removeprefix("torch."),
            base_model=base_model,
            base_fingerprint=base_fingerprint(base_model),
            # As it will be read back (tuples become lists): `check_resumes` compares it with the header of a log.
            job_config=json.loads(json.dumps(job_config or {})),
        )

    @property
    def format_version(self) -> int:
        return CONTINUAL_VERSION if self.job_config.get("continual") else FORMAT_VERSION

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def build_method(self) -> Method:
        """The job's method. Raises ConfigError: this installation does not have it."""
        method: Method = METHODS.build(self.method, **self.method_fields)
        return method

    def new_state(self, device: torch.device | str = "cpu") -> AdapterState:
        """The state before the first step, whole modules (no tensor-parallel shard)."""
        method = self.build_method()
        return AdapterState(method, method.layout(self.modules), self.job_seed, self.num_bases, device)

    def to_json(self) -> str:
        """The header in one line; a module is [name, out features, in features]."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["modules"] = [dataclasses.astuple(m) for m in self.modules]
        return json.dumps(plain, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Inverse of `to_json`. Raises ValueError, TypeError or KeyError on anything else."""
        plain = json.loads(line)
        plain["modules"] = tuple(ModuleShape(*entry) for entry in plain["modules"])
        return cls(**plain)

    def check_base(self, model: str, fix: str) -> str:
        """Refuse another base model than the one the job trained; returns the fingerprint of `model`.

        Args:
            model: directory, or Hub name in the local cache.
            fix: what the user can do, as the end of the message.

        Raises:
            ConfigError: the fingerprints differ.
        """
        found = base_fingerprint(model)
        if found != self.base_fingerprint:
            raise ConfigError(
                f"base_model={model!r} (fingerprint {found}) is not the model the job trained, {self.base_model!r} "
                f"(fingerprint {self.base_fingerprint}); {fix}."
            )
        return found

    def check_resumes(self, logged: SeedLogHeader) -> None:
        """Refuse to continue the log of another job; `self` is the job about to run.

        Options that cannot change the trajectory (`MAY_DIFFER_ON_RESUME`) may differ, and so may the name of the model:
        the same weights may lie in another place.

        Raises:
            ConfigError: a field differs; the message names every such field with both values.
        """
        ours = self._identity()
        # A log of an older version lacks the options added since. That run did what their defaults do now.
        new = {f"job_config.{f.name}": f.default for f in dataclasses.fields(JobConfig)}
        known = {key: value for key, value in new.items() if key in ours and ours[key] == value}
        differing = differences(ours, known | logged._identity())
        if differing:
            raise ConfigError(
                f"cannot resume: this is another model or configuration: {'; '.join(differing)}. "
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


def differences(here: Mapping[str, Any], logged: Mapping[str, Any], other: str = "written with") -> list[str]:
    """One phrase for each key whose values differ, such as "job_seed=1 (written with 0)". other: words before the value
    that `logged` has."""
    missing = object()
    phrases = []
    for key in sorted(here.keys() | logged.keys()):
        ours, theirs = here.get(key, missing), logged.get(key, missing)
        if ours == theirs:
            continue
        if key == "modules":
            phrases.append(_module_difference(here[key], logged[key], other))
        else:
            shown = ["absent" if value is missing else repr(value) for value in (ours, theirs)]
            phrases.append(f"{key}={shown[0]} ({other} {shown[1]})")
    return phrases


def _module_difference(ours: Sequence[Sequence[Any]], theirs: Sequence[Sequence[Any]], other: str) -> str:
    """The lengths of the two lists and their first difference; the whole lists would fill a screen."""
    pairs = ((a, b) for a, b in zip(ours, theirs, strict=False) if a != b)
    first = next(pairs, None)
    where = f"; the first that differs is {first[0]} ({other} {first[1]})" if first else ""
    return f"modules: {len(ours)} target modules ({other} {len(theirs)}){where}"
