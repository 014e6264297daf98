"""The examples of a step are a function of (seed, step), so that any step can be replayed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from vllm_zo import noise
from vllm_zo.errors import ConfigError
from vllm_zo.validation import check_int

ORDER_STREAM = "order"


@dataclass(frozen=True)
class BatchOrder:
    """Mini-batches of example indices. Every epoch is a new shuffle that holds each example once.

    Epochs follow one another without a gap: a batch may hold the last examples of one and the first of the next. With 3
    examples in batches of 2, steps 0, 1 and 2 see (a b) (c | d) (e f), where a b c and d e f are shuffles of 0 1 2.

    Raises:
        ConfigError: the batch is larger than the data, or its size is below 1.
    """

    num_examples: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        check_int("batch_size", self.batch_size, 1)
        if self.batch_size > self.num_examples:
            raise ConfigError(
                f"batch_size={self.batch_size}: the training data has {self.num_examples} examples; "
                "use a smaller batch or more data."
            )

    def batch(self, step: int) -> tuple[int, ...]:
        """(batch_size,) indices of a step's examples (0 is the first step), computed without the steps before it."""
        assert step >= 0
        indices: list[int] = []
        position = step * self.batch_size
        end = position + self.batch_size
        while position < end:
            epoch, start = divmod(position, self.num_examples)
            stop = min(start + end - position, self.num_examples)
            indices += _shuffle(self.num_examples, self.seed, epoch)[start:stop].tolist()
            position += stop - start
        return tuple(indices)

    def first(self, steps: int) -> tuple[int, ...]:
        """The indices of the examples that the first `steps` steps read, in order."""
        if steps * self.batch_size >= self.num_examples:  # the first epoch has them all
            return tuple(range(self.num_examples))
        return tuple(sorted(index for step in range(steps) for index in self.batch(step)))


# A batch touches two epochs at most (it is no larger than the data); twice that serves a second job.
@lru_cache(maxsize=4)
def _shuffle(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """(num_examples,) int64 permutation of an epoch: the order that sorts counter-based random words."""
    ranges = noise.ElementRanges.of([(ORDER_STREAM, 0, num_examples)])
    bits = noise.uniform_bits(noise.derive_key(seed, ORDER_STREAM, epoch), ranges, "cpu")
    # Stable: the order of equal words would depend on numpy's sorting algorithm, and so on its version and the CPU.
    return np.argsort(bits.numpy(), kind="stable")


def sample_split(
    examples: Sequence[dict[str, Any]], sizes: Sequence[int], data_seed: int
) -> tuple[list[dict[str, Any]], ...]:
    """Disjoint random subsets of the training data, such as sizes (1000, 500) for training and development.

    With the data in its published order these are the very examples of the MeZO and LoZO papers for that data seed.
    Their code takes the front of `np.random.permutation` for training and the examples behind it for development, and
    numpy has frozen that generator.

    Raises:
        ConfigError: `sizes` ask for more examples than there are, or the seed is outside [0, 2**32).

    Source: princeton-nlp/MeZO, large_models/tasks.py (`sample_subset`) and run.py.
    """
    check_int("data_seed", data_seed, 0, 2**32 - 1)
    for size in sizes:
        check_int("sizes", size, 1)
    if sum(sizes) > len(examples):
        raise ConfigError(f"sizes={tuple(sizes)!r}: {sum(sizes)} rows wanted, the data has {len(examples)}.")
    order = np.random.RandomState(data_seed).permutation(len(examples)).tolist()
    ends = np.cumsum([0, *sizes]).tolist()
    return tuple([examples[i] for i in order[a:b]] for a, b in pairwise(ends))
