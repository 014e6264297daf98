"""Seed logs of jobs that never ran. It imports little: some tests read such a log in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vllm_zo.checkpoint.seed_log.format import StepRecord
from vllm_zo.checkpoint.seed_log.header import SeedLogHeader
from vllm_zo.checkpoint.seed_log.reader import SeedLog
from vllm_zo.methods import Method
from vllm_zo.methods.plan import ModuleShape

MODULES = (
    ModuleShape("layers.0.fc1", 24, 16),
    ModuleShape("layers.0.fc2", 16, 24),
    ModuleShape("layers.1.fc1", 24, 16),  # the shape of another layer: their noise must differ
)
LARGE_RATE = 1e-2
"""Large enough that every update shows in bfloat16 weights and in logits."""


def header_of(method: Method, space: str, num_bases: int = 1, base: str = "no/model", **fields: Any) -> SeedLogHeader:
    defaults: dict[str, Any] = {"job_seed": 11, "modules": MODULES, "dtype": "float32"}
    return SeedLogHeader.of(method, update_space=space, num_bases=num_bases, base_model=base, **(defaults | fields))


def random_log(header: SeedLogHeader, steps: int, seed: int = 0) -> SeedLog:
    """A log as a job would have written it: float32 coefficients, changing rates, one skipped step."""
    generator = torch.Generator().manual_seed(seed)
    queries = header.method_fields["queries"]
    records = []
    for step in range(steps):
        coefficients = torch.randn(queries, generator=generator) * (step != 2)
        records.append(StepRecord(step, LARGE_RATE / (1 + step), tuple(coefficients.tolist()), step != 2))
    return SeedLog(Path("seeds.log"), header, tuple(records))
