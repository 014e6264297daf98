"""Which rows of an engine step have to be computed at all, and how attention gets them in dense batches.

Two members of one probe that begin with the same tokens have the same hidden states there, because causal attention
sees only earlier tokens. These rows are computed once: for example the `</s>` or the instruction that every prompt
begins with, and the prompt that all options of an example share. In the last layer only attention needs every row; the
layers after it need only the rows where something is scored. Before the first attention layer a hidden state depends on
(token id, position) only, so the first product with an unperturbed weight is computed once for each distinct pair.

Where members train only layers l and above, the layers below l see no difference between their probes. There, members
of all states that begin with the same tokens share rows, and the states that an earlier step has kept are not computed
at all (`Below`).

Whole sequences of different lengths become a few batches for attention. Each sequence is padded at its end to the
length of its bucket. Under a causal mask this padding needs no mask of its own, because no real row sees a later one.
Our own kernel for attention gets them without padding.

The functions here are pure: they read nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from vllm_zo.worker import kept_states
from vllm_zo.worker.platform import Chunk

IsKept = Callable[[kept_states.Sequence], bool]

MOST_PADDING = 1.5
"""The longest sequence of a bucket is at most this many times as long as its shortest. With the lengths of SST-2,
attention in 3 to 8 buckets takes the same time within a tenth, and two to three times as long in one bucket."""


@dataclass(frozen=True)
class WholeSequences:
    """All rows of a forward as whole sequences, for attention. A layout is made when the first layer asks for it.

    Attributes:
        rows: of each sequence, which of the U rows (see `RowPlan`) it has; the longest sequence first.
    """

    rows: Sequence[Sequence[int]]

    @property
    def longest(self) -> int:
        """The length of the first sequence."""
        return len(self.rows[0])

    @cached_property
    def unpadded(self) -> Unpadded:
        rows_S = [row for rows in self.rows for row in rows]
        first_S: list[bool] = []
        seen: set[int] = set()
        for row in rows_S:
            first_S.append(row not in seen)
            seen.add(row)
        return Unpadded(
            starts=torch.tensor([0, *accumulate(map(len, self.rows))]),
            rows_S=torch.tensor(rows_S),
            first_S=torch.tensor(first_S, dtype=torch.uint8),
        )

    @cached_property
    def buckets(self) -> Buckets:
        gather: list[int] = []
        shapes: list[tuple[int, int]] = []
        back: dict[int, int] = {}
        # From the longest down: the first sequence of a bucket sets its length.
        for rows in self.rows:
            if not shapes or len(rows) * MOST_PADDING < shapes[-1][1]:
                shapes.append((0, len(rows)))
            count, length = shapes[-1]
            shapes[-1] = count + 1, length
            # Of a shared row any place will do: all hold the same values.
            back.update(zip(rows, range(len(gather), len(gather) + len(rows)), strict=True))
            gather += [*rows, *[rows[-1]] * (length - len(rows))]
        return Buckets(tuple(shapes), torch.tensor(gather), torch.tensor([back[row] for row in range(len(back))]))


@dataclass(frozen=True)
class Unpadded:
    """Sequences one after another.

    Attributes:
        starts: their first places, and the number S of all places.
        rows_S: for each place, which of the U rows it holds.
        first_S: uint8, whether the place is the first with its row.

    Example: the sequences 0 1 3 4 and 0 1 2: starts = 0 4 7, rows = 0 1 3 4 0 1 2, first = 1 1 1 1 0 0 1.
    """

    starts: Tensor
    rows_S: Tensor
    first_S: Tensor


@dataclass(frozen=True)
class Buckets:
    """Sequences as dense batches: P places, bucket after bucket, which hold the U rows and padding.

    Attributes:
        shapes: (sequences, length) of each bucket; P is the sum of their products.
        gather_P: for each place, which of the U rows it holds. Padding repeats the last row of its sequence.
        back_U: for each of the U rows, one of its places.

    Example: the sequences 0 1 3 4 and 0 1 2: one bucket (2, 4), gather = 0 1 3 4 0 1 2 2, back = 4 5 6 2 3.
    """

    shapes: tuple[tuple[int, int], ...]
    gather_P: Tensor
    back_U: Tensor


@dataclass(frozen=True)
class Below:
    """The layers below the first trained one. They compute B rows; with the kept ones, D rows enter that layer.

    Attributes:
        layer: number of the first layer that computes the U rows (see `RowPlan`), each under its state; the number of
            layers if none does.
        rows_B: of the T rows, those that the layers below compute. They are the first B of the D rows.
        loaded_B: whether these are rows of members, which the weights as loaded compute, without an adapter.
        expand_T: for each of the T rows, its place among the B; 0 for a row that is kept, whose result nobody reads.
        whole: the sequences for attention if all rows belong to whole ones, else None.
        kept: the D rows beyond the first B, as sequences whose states are kept, each from its row of that number on.
        to_keep: the sequences whose states may be kept, with their rows among the B.
    """

    layer: int
    rows_B: Tensor
    loaded_B: Tensor
    expand_T: Tensor
    whole: WholeSequences | None
    kept: tuple[tuple[kept_states.Sequence, int], ...]
    to_keep: Mapping[kept_states.Sequence, Tensor]


@dataclass(frozen=True)
class RowPlan:
    """Rows of a step: the batch has T, U of them are computed, P of these are needed past the last attention.

    Attributes:
        keep_U: of the T rows, those that are computed; ascending.
        expand_T: for each of the T rows, its place among the kept ones.
        needed_P: of the U rows, those whose final hidden state is read; ascending.
        first_D: of the U rows, one of each set of rows that are equal before the first attention of the first trained
            layer, whatever their state.
        spread_U: for each of the U rows, its place among those D.
        whole: the sequences for attention if all rows belong to whole ones, else None.
        below: the layers below the first trained one; None if that is the model's first.
    """

    keep_U: Tensor
    expand_T: Tensor
    needed_P: Tensor
    first_D: Tensor
    spread_U: Tensor
    whole: WholeSequences | None = None
    below: Below | None = None

    @property
    def shares(self) -> bool:
        """Whether members share rows."""
        return len(self.keep_U) < len(self.expand_T)

    @property
    def prunes(self) -> bool:
        """Whether the final hidden state of some rows is not read."""
        return len(self.needed_P) < len(self.keep_U)

    @property
    def repeats(self) -> bool:
        """Whether some rows are equal before the first attention of the first trained layer."""
        return len(self.first_D) < len(self.keep_U)

    def through_cache(self) -> RowPlan:
        """The plan for a forward whose attention goes through the KV cache."""
        below = None if self.below is None else replace(self.below, whole=None)
        return replace(self, whole=None, below=below)


def plan_rows(chunks: Sequence[Chunk], layers: int = 0, is_kept: IsKept = lambda sequence: False) -> RowPlan:
    """Merge common prefixes within each state, and below the first trained layer across states; collect what is read.

    Two chunks of one state, with tokens 5 7 9 and 5 7 8 4 and the last row of each as target: T = 7 rows, of which
    keep = 0 1 2 5 6 (5 7 9, 8 4), expand = 0 1 2 0 1 3 4, needed = 2 4. Under two states no rows are merged: all seven
    are kept, but first = 0 1 2 5 6, spread = 0 1 2 0 1 3 4.

    Args:
        layers: of the model, where a forward can change its rows from layer to layer; else 0.
        is_kept: whether the states of a sequence at the first trained layer are kept.
    """
    # All members of a step change their rows at one layer: the lowest that any of them trains. In a job that trains
    # the LM head only, no layer depends on the probe; it enters behind the last one, all its probes in one state.
    first = min((chunk.first_layer for chunk in chunks if chunk.state is not None), default=0)
    rows = _Rows(min(first, layers), is_kept, behind_layers=first >= layers)
    for chunk in chunks:
        rows.add(chunk)
    return rows.plan(whole=all(chunk.whole for chunk in chunks))


class _Rows:
    """Collects the rows of a step, chunk by chunk. Names are those of `RowPlan` and `Below`.

    Args:
        layer: the first one that depends on the states of members.
        behind_layers: whether none does. Nothing attends there, so of a sequence only the rows that are read count.
    """

    def __init__(self, layer: int, kept_at_layer: IsKept, *, behind_layers: bool) -> None:
        self.layer, self.kept_at_layer, self.behind_layers = layer, kept_at_layer, behind_layers
        self.keep: list[int] = []
        self.expand: list[int] = []
        self.needed: set[int] = set()
        self.first: list[int] = []
        self.spread: list[int] = []
        self.member: list[bool] = []
        """For each of the D rows, whether it is a member's."""
        self.is_kept: list[bool] = []
        """For each of the D rows, whether its state is kept."""
        self.children: dict[tuple[Hashable, int], int] = {}
        """A prefix tree: (state at the root, else the row before; token) -> row."""
        self.alike: dict[Hashable, int] = {}
        """What a row depends on where it enters the first trained layer -> its place among D."""
        self.kept: list[tuple[kept_states.Sequence, int]] = []
        self.read: dict[kept_states.Sequence, range] = {}
        """Sequences that are kept behind the layers -> their U rows, which are those that are read."""
        self.sequences: dict[kept_states.Sequence, list[int]] = {}
        """Whole sequences that the layers below compute -> their U rows."""
        self.paths: list[list[int]] = []
        """Of each chunk, its U rows."""

    def add(self, chunk: Chunk) -> None:
        start, entering = len(self.expand), len(self.first)
        sequence = None
        if chunk.whole:
            rows = tuple(chunk.targets) if self.behind_layers else None
            sequence = kept_states.Sequence(chunk.owner, self.layer, tuple(chunk.token_ids), rows)
        is_kept = self.layer > 0 and sequence is not None and self.kept_at_layer(sequence)
        if is_kept and self.behind_layers:
            self._read(chunk, sequence)  # type: ignore[arg-type]  # it is one of the kept
            return
        # Kept and computed sequences share no rows: the rows that attention needs below are there in one of two ways.
        node: Hashable = ("state", chunk.state, is_kept)  # a tuple, which equals no row number
        for i in range(chunk.rows):
            # A chunk that continues a sequence has no token ids: its earlier rows are unknown, so it shares none.
            row = self.children.get((node, chunk.token_ids[i])) if chunk.token_ids else None
            if row is None:
                row = self._new_row(chunk, i, start, node, is_kept)
            self.expand.append(row)
            node = row
        # vLLM may read any row of a request that is not a member.
        targets = range(chunk.rows) if chunk.state is None else chunk.targets
        self.needed.update(self.expand[start + i] for i in targets)
        self.paths.append(self.expand[start:])
        if is_kept and (new := len(self.first) - entering):  # new rows are the end of a sequence: prefixes are shared
            self.kept.append((sequence, chunk.rows - new))  # type: ignore[arg-type]  # it is one of the kept
        elif sequence is not None and not is_kept:
            self.sequences.setdefault(sequence, self.paths[-1])

    def _read(self, chunk: Chunk, sequence: kept_states.Sequence) -> None:
        """Add a sequence that is kept behind the layers: the rows that are read. Any row may stand for the others."""
        start, row = len(self.expand), len(self.keep)
        rows = self.read.get(sequence)
        if rows is None:
            rows = self.read[sequence] = range(row, row + len(chunk.targets))
            place = len(self.first)
            self.keep += [start + target for target in chunk.targets]
            self.first += rows
            self.spread += range(place, place + len(rows))
            self.member += [True] * len(rows)
            self.is_kept += [True] * len(rows)
            self.kept.append((sequence, 0))
        self.expand += [rows[0]] * chunk.rows
        for target, row in zip(chunk.targets, rows, strict=True):
            self.expand[start + target] = row
        self.needed.update(rows)

    def _new_row(self, chunk: Chunk, i: int, start: int, node: Hashable, is_kept: bool) -> int:
        row, alike = len(self.keep), len(self.first)
        self.keep.append(start + i)
        if chunk.token_ids:
            token = chunk.token_ids[i]
            self.children[node, token] = row
            # At the first layer a row depends on its own token, above it on all tokens so far.
            before = (chunk.embedded_by, i) if not self.layer else self.spread[node] if isinstance(node, int) else None
            alike = self.alike.setdefault((before, is_kept, token), alike)
        if alike == len(self.first):
            self.first.append(row)
            self.member.append(chunk.state is not None)
            self.is_kept.append(is_kept)
        self.spread.append(alike)
        return row

    def plan(self, *, whole: bool) -> RowPlan:
        # Computed rows before kept ones, each in their order.
        order = sorted(range(len(self.first)), key=self.is_kept.__getitem__)
        self.first = [self.first[d] for d in order]
        place = {d: i for i, d in enumerate(order)}
        self.spread = [place[d] for d in self.spread]
        return RowPlan(
            keep_U=torch.tensor(self.keep, dtype=torch.int64),
            expand_T=torch.tensor(self.expand, dtype=torch.int64),
            needed_P=torch.tensor(sorted(self.needed), dtype=torch.int64),
            first_D=torch.tensor(self.first, dtype=torch.int64),
            spread_U=torch.tensor(self.spread, dtype=torch.int64),
            whole=whole_sequences(self.paths) if whole else None,
            below=self._below([self.member[d] for d in order], whole=whole) if self.layer else None,
        )

    def _below(self, member: Sequence[bool], *, whole: bool) -> Below:
        computed = len(self.is_kept) - sum(self.is_kept)
        paths = {sequence: [self.spread[row] for row in rows] for sequence, rows in self.sequences.items()}
        # One of each set of equal sequences: owners differ where jobs have examples in common.
        distinct = list({sequence.token_ids: path for sequence, path in paths.items()}.values())
        places = [self.spread[row] for row in self.expand]
        return Below(
            layer=self.layer,
            rows_B=torch.tensor([self.keep[row] for row in self.first[:computed]], dtype=torch.int64),
            loaded_B=torch.tensor(member[:computed], dtype=torch.bool),
            expand_T=torch.tensor([d if d < computed else 0 for d in places], dtype=torch.int64),
            whole=whole_sequences(distinct) if whole and distinct else None,
            kept=tuple(self.kept),
            to_keep={
                s: torch.tensor(path if s.rows is None else [path[row] for row in s.rows])
                for s, path in paths.items()
                if s.owner is not None
            },
        )


def whole_sequences(paths: Iterable[Sequence[int]]) -> WholeSequences:
    """paths: of each sequence its rows."""
    return WholeSequences(sorted(paths, key=len, reverse=True))
