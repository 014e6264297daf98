"""How much memory a job takes, calculated before it starts, and how much there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from vllm_zo.errors import ConfigError
from vllm_zo.methods import Method
from vllm_zo.methods.plan import ModuleShape

NUMBER_BYTES = 4
"""Every trained number, factor and direction is float32."""
TEMPORARIES = 3
"""Vectors of all trained numbers that an update makes beside the state."""
MOMENT_BYTES = 3 * 8
"""Where V is measured: the float64 second moment of the inputs, its eigenvectors, and as much to find them."""
RESIDENT = 4
"""Published adapters that stay in host memory. Each has rank x (inputs + outputs) elements for every module; making one
again takes milliseconds."""
TOKEN_BYTES, EXAMPLE_BYTES = 40, 2000
"""A tokenised example in the engine, as Python objects: each of its tokens, and the example itself."""
GIB = 1 << 30


def state_bytes(method: Method, modules: Sequence[ModuleShape], num_bases: int, *, regenerates: bool = False) -> int:
    """The memory that a worker needs to train `modules`: accumulators, optimizer state, the factors and directions of
    one step, and the adapters that it publishes.

    Args:
        num_bases: bases that the state holds at once.
        regenerates: the worker draws directions again, and holds one at a time (a GPU does).

    Raises:
        ConfigError: the rank does not fit a module.
    """
    layout = method.layout(tuple(modules))
    numbers = method.coordinates.ranges(layout).total
    factors = layout.u_ranges.total + layout.v_ranges.total
    # Twice: `torch.stack` copies the directions while the list of them exists.
    directions = 1 if regenerates else 2 * len(method.plan(0, 0, 0).keys)
    optimizer = method.optimizer.init(torch.empty(numbers, device="meta"))
    in_optimizer = sum(tensor.numel() * tensor.element_size() for tensor in optimizer.values())
    vectors = (num_bases + directions + TEMPORARIES) * numbers + (1 + RESIDENT * num_bases) * factors
    measured = NUMBER_BYTES * numbers if method.coordinates.measures_u else 0
    if method.coordinates.measures_v:
        measured = NUMBER_BYTES * num_bases * layout.v_ranges.total + MOMENT_BYTES * modules[0].in_features ** 2
    return NUMBER_BYTES * vectors + measured + in_optimizer


def check_state(
    method: Method, modules: Sequence[ModuleShape], num_bases: int, free_bytes: int, *, regenerates: bool = False
) -> None:
    """Refuse a job whose state does not fit into `free_bytes`.

    Raises:
        ConfigError: it does not; the message has both figures.
    """
    if (needed := state_bytes(method, modules, num_bases, regenerates=regenerates)) > free_bytes:
        raise ConfigError(
            f"{method.name}.rank={method.coordinates.rank}, queries={method.queries}, {num_bases} bases, "
            f"{len(modules)} modules: the job's state takes {_gib(needed)}, and {_gib(free_bytes)} are free; lower one "
            "of them, choose fewer target_modules, or start the engine with a smaller KV cache."
        )


def check_examples(name: str, examples: int, tokens: int) -> None:
    """Refuse examples that do not fit into the memory of the machine once more: the engine reads its own copy.

    Raises:
        ConfigError: they do not; the message has both figures.
    """
    needed, free_bytes = TOKEN_BYTES * tokens + EXAMPLE_BYTES * examples, free_memory()
    if needed > free_bytes:
        raise ConfigError(
            f"{name}: {examples} rows, {tokens} tokens: they take {_gib(needed)} in the engine, and "
            f"{_gib(free_bytes)} are free; use fewer rows."
        )


def free_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take from the machine, or from its container where that has a lower limit.

    Args:
        group: where Linux shows the container's limit.
    """
    available = int(psutil.virtual_memory().available)
    try:  # psutil knows only the machine's memory, and Linux kills a process that exceeds its container's
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no cgroup v2 here, or its limit is "max"
        return available
    # What is used includes copies of files, which Linux gives up when a process needs the memory.
    files = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
    return max(0, min(available, limit - used + files))


def free_on(device: torch.device) -> int:
    """Bytes that this process may still take on `device`."""
    if device.type != "cuda":
        return free_memory()
    free = int(torch.cuda.mem_get_info(device)[0])
    # PyTorch keeps what it has freed, for itself.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _gib(count: int) -> str:
    return f"{count / GIB:.3g} GiB"
