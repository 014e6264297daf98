"""Token counts for which vLLM captures CUDA graphs, so that a training group replays one. No state, no vLLM.

vLLM's own graphs end at 512 tokens on most cards. 16 SST-2 examples under both signs have 441 tokens on average, 32
examples always have more than 512. A batch larger than every graph runs without one: its kernels are launched one by
one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

SERVING = (1, 2, 4, *range(8, 256, 8))
"""vLLM's own sizes below 256. They serve batches of requests that write one token each."""
TOKENS_OF_PAIR = 1024
"""Tokens of a mini-batch under both signs: 32 SST-2 examples have 882 on average."""
LARGEST = 4096
"""No graph above this: there a layer's products take longer than the host needs to launch them (calculated, not
measured)."""


def padded_size(tokens: int) -> int:
    """Token count of the CUDA graph that a batch of `tokens` runs in.

    Graphs are 16 tokens apart up to 1,024 and 64 apart above: a batch is padded by less than 16 tokens, or by some 6 %
    at most. A graph for every multiple of 16 above 1,024 would take minutes to capture.

    >>> padded_size(441), padded_size(3530)
    (448, 3584)
    """
    multiple = 16 if tokens <= 1024 else 64
    return -(-tokens // multiple) * multiple


def sizes_for(groups: Iterable[int], largest: int = LARGEST) -> list[int]:
    """Sizes for groups of known token counts, and a few small sizes for the requests that are served beside them."""
    sizes = {1, 2, 4, 8, 16, 32, 64, 128, *map(padded_size, groups)}
    return sorted(size for size in sizes if size <= largest)


def default_sizes(slots: int) -> list[int]:
    """Sizes for groups that are not known yet: every padded size up to 1,024 tokens a pair of slots.

    >>> default_sizes(2)[-3:], default_sizes(8)[-3:], default_sizes(32)[-1]
    ([992, 1008, 1024], [3968, 4032, 4096], 4096)
    """
    return sorted({*SERVING, *sizes_for(range(256, min(LARGEST, slots // 2 * TOKENS_OF_PAIR) + 1, 16))})


def chosen_by_user(options: Mapping[str, Any]) -> bool:
    """Whether the user's engine options say which graphs to capture, or that vLLM shall capture none."""
    names = ("cudagraph_capture_sizes", "max_cudagraph_capture_size")
    # vLLM takes it as JSON text from the command line, as a dictionary, or as an object of its own.
    config = options.get("compilation_config")
    if isinstance(config, str):
        config = json.loads(config) if config.lstrip().startswith("{") else {}
    of_config = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    return bool(options.get("enforce_eager")) or any(
        options.get(name) is not None or of_config(name) is not None for name in names
    )
