"""A training step on the log path: it is scored in shards, decided here, logged, and then applied by the workers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, chain

import torch
from torch import Tensor

from vllm_zo.commands import GroupResult
from vllm_zo.engine.group import Work
from vllm_zo.engine.rewarder import Cells
from vllm_zo.methods.base import Method
from vllm_zo.methods.decide import decide
from vllm_zo.methods.shards import cut
from vllm_zo.objectives.base import Objective
from vllm_zo.objectives.cells import cell_offsets


class OpenStep:
    """The shards of a step and the cells that have come back of them.

    The decision is made from all cells together, on the CPU and in float32. So it does not depend on the order of the
    answers or on who gave them.

    Args:
        work: the whole step.
        shards: how many shards are wanted (`methods.shards.cut`).
    """

    def __init__(self, work: Work, shards: int) -> None:
        self.work = work
        self.opened_at = time.monotonic()
        self._cut = cut(work.plan, len(work.examples), shards)
        self._left = deque(range(len(self._cut)))
        """Shards that have yet to be issued."""
        self._missing = set(self._left)
        self._sequences = _offsets(len(example.sequences) for example in work.examples)
        """For each example the number of its first sequence, then the number of all."""
        self._offsets = _offsets(cell_offsets([example])[-1] for example in work.examples)
        """The same for its cells."""
        self._dropped: frozenset[int] = frozenset()
        """Probes that the step goes on without."""
        self._cells_PC = torch.full((len(work.plan.probes), self._offsets[-1]), torch.nan)

    def next_shard(self) -> Work | None:
        """The next shard to score; None: all are issued."""
        return self._shard(self._left.popleft()) if self._left else None

    def put_back(self, shard: int) -> None:
        """Take back a shard whose group was dropped; it comes next."""
        self._left.appendleft(shard)

    def _shard(self, index: int) -> Work:
        part, work = self._cut[index], self.work
        seeds = (work.sampling_seeds[self._sequences[e] : self._sequences[e + 1]] for e in part.examples)
        return replace(
            work,
            plan=work.plan.part(part.probes),
            example_ids=tuple(work.example_ids[e] for e in part.examples),
            examples=tuple(work.examples[e] for e in part.examples),
            sampling_seeds=tuple(chain.from_iterable(seeds)),
            shard=index,
        )

    def add(self, shard: int, cells: Sequence[Sequence[float]]) -> bool:
        """Take in the (probes, cells) scores of a shard; returns whether the step has all of them now."""
        part = self._cut[shard]
        columns = [c for e in part.examples for c in range(self._offsets[e], self._offsets[e + 1])]
        probes = torch.tensor(part.probes)[:, None]
        self._cells_PC[probes, torch.tensor(columns)] = torch.tensor(cells, dtype=torch.float32)
        self._missing.discard(shard)
        return not self._missing

    def drop_late(self) -> int | None:
        """Go on without the directions that have no cells yet.

        Returns:
            How many shards were issued whose answers do not count any more. None: the step must wait, because examples
            are missing for all directions, the centre of a one-sided estimate is, or more than half of all directions.
        """
        missing = [self._cut[index] for index in self._missing]
        late = frozenset(probe for part in missing for probe in part.probes)
        probes, whole = self.work.plan.probes, len(self.work.examples)
        centre = any(probes[index].sign == 0 for index in late)
        if centre or 2 * len(late) > len(probes) or any(len(part.examples) < whole for part in missing):
            return None
        issued = len(self._missing - set(self._left))
        self._missing.clear()
        self._left.clear()
        self._dropped = late
        return issued

    @property
    def counted(self) -> Work:
        """The work without the directions that were dropped."""
        if not self._dropped:
            return self.work
        plan = self.work.plan
        kept = tuple(probe for index, probe in enumerate(plan.probes) if index not in self._dropped)
        return replace(self.work, plan=replace(plan, probes=kept))

    def decide(self, group_id: str, method: Method, objective: Objective, max_coefficient: float | None) -> GroupResult:
        """What the step measured and what it applies, once all cells are in. A direction that was dropped has the
        coefficient zero, and those of the others are their mean over fewer."""
        assert not self._missing
        plan = self.counted.plan
        losses_PE, predictions_PE = objective.loss(self._counted_cells, self.work.examples)
        coefficients_K, finite = decide(method, plan, losses_PE, max_coefficient)
        of_key = dict(zip(plan.keys, coefficients_K.tolist(), strict=True))
        coefficients = [of_key.get(key, 0.0) for key in self.work.plan.keys]
        return GroupResult(group_id, losses_PE.tolist(), predictions_PE.tolist(), coefficients, bool(finite.item()))

    def rewards(self) -> Cells:
        """(probes, sequences) rewards of a step whose members generated: a cell is the reward of one completion."""
        return tuple(tuple(of_probe) for of_probe in self._counted_cells.tolist())

    @property
    def _counted_cells(self) -> Tensor:
        kept = [index for index in range(len(self._cells_PC)) if index not in self._dropped]
        return self._cells_PC[kept] if self._dropped else self._cells_PC


def _offsets(counts: Iterable[int]) -> list[int]:
    return list(accumulate(counts, initial=0))
