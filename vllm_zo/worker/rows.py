"""Which rows of an engine step have to be computed at all. Pure.

Two members of one probe that begin with the same tokens have the same hidden states there: causal attention sees
nothing behind a token. Those rows are computed once: the `</s>` or the instruction that every prompt begins with, the
prompt that all options of an example share. And of the last layer, only attention sees every row; what comes after it
is needed where something is scored. Before the first attention a row is its token at its place, whatever came before it
and whatever it is perturbed by: what multiplies an unperturbed weight there needs each such pair once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_zo.worker.buckets import Buckets, fill_buckets


@dataclass(frozen=True)
class Chunk:
    """Neighbouring rows of one request in an engine step.

    Attributes:
        rows: how many.
        state: the parameters it runs under; None for a request that is not ours, whose rows are all kept.
        token_ids: of the rows, where they start a sequence; empty where they continue one.
        targets: rows (0 is the chunk's first) whose final hidden state is read.
        embedded_by: what their embeddings depend on besides token and place: None, or the state if that changes them.
        whole: they are a sequence from its first token to its last, of which nothing is asked after this step.
    """

    rows: int
    state: Hashable | None = None
    token_ids: Sequence[int] = ()
    targets: Sequence[int] = ()
    embedded_by: Hashable | None = None
    whole: bool = False


@dataclass(frozen=True)
class RowPlan:
    """Rows of a step: T are asked for, U are computed, P are needed past the last attention.

    Attributes:
        keep_U: of the T rows, those that are computed; ascending.
        expand_T: where each of the T rows is among the kept ones.
        needed_P: of the U rows, those whose final hidden state somebody reads; ascending.
        first_D: of the U rows, one of each that are alike before the first attention, whatever their state.
        spread_U: where each of the U rows is among those D.
        buckets: the sequences, where all rows belong to whole ones.
    """

    keep_U: Tensor
    expand_T: Tensor
    needed_P: Tensor
    first_D: Tensor
    spread_U: Tensor
    buckets: Buckets | None = None

    @property
    def shares(self) -> bool:
        return len(self.keep_U) < len(self.expand_T)

    @property
    def prunes(self) -> bool:
        return len(self.needed_P) < len(self.keep_U)

    @property
    def repeats(self) -> bool:
        """Whether rows are alike before the first attention."""
        return len(self.first_D) < len(self.keep_U)


def plan_rows(chunks: Sequence[Chunk]) -> RowPlan:
    """Merge common prefixes within each state, and collect what is read.

    Two chunks of one state, with tokens 5 7 9 and 5 7 8 4 and the last row of each as target: T = 7 rows, of which
    keep = 0 1 2 5 6 (5 7 9, 8 4), expand = 0 1 2 0 1 3 4, needed = 2 4. Under two states nothing is merged: keep is all
    seven, but first = 0 1 2 5 6, spread = 0 1 2 0 1 3 4.
    """
    keep: list[int] = []
    expand: list[int] = []
    needed: set[int] = set()
    first: list[int] = []
    spread: list[int] = []
    inputs: dict[tuple[Hashable, int, int], int] = {}
    """(embeddings, token, position) -> row of D."""
    children: dict[tuple[Hashable, int], int] = {}
    """Prefix tree: (row or state before, token) -> row."""
    for chunk in chunks:
        start = len(expand)
        node: Hashable = ("state", chunk.state)
        for i in range(chunk.rows):
            row = children.get((node, chunk.token_ids[i])) if chunk.token_ids else None
            if row is None:
                row = len(keep)
                keep.append(start + i)
                alike = len(first)
                if chunk.token_ids:
                    children[node, chunk.token_ids[i]] = row
                    alike = inputs.setdefault((chunk.embedded_by, chunk.token_ids[i], i), alike)
                if alike == len(first):
                    first.append(row)
                spread.append(alike)
            expand.append(row)
            node = row
        targets = range(chunk.rows) if chunk.state is None else chunk.targets
        needed.update(expand[start + i] for i in targets)
    whole = all(chunk.whole for chunk in chunks)
    return RowPlan(
        keep_U=torch.tensor(keep),
        expand_T=torch.tensor(expand),
        needed_P=torch.tensor(sorted(needed), dtype=torch.int64),
        first_D=torch.tensor(first),
        spread_U=torch.tensor(spread),
        buckets=fill_buckets([chunk.rows for chunk in chunks], expand) if whole else None,
    )
