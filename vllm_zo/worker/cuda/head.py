"""Scores from an LM head that Triton kernels read in its own type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_zo.upload import upload
from vllm_zo.worker.cuda import triton_scores
from vllm_zo.worker.head import Head, Slots
from vllm_zo.worker.loss_table import Entry, by_table

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Types of weights that the kernels can read."""


class TritonHead(Head):
    """Computes the scores of `Head` in one launch each. Where an adapter changes the head, it leaves them to `Head`."""

    def score_labels(self, hidden: Tensor, entries: Sequence[Entry]) -> None:
        """See `Head`. One launch for each table writes the cells itself."""
        # The kernel cannot sum over ranks before it writes: with several, or with an adapter, torch does the work.
        if self.tp is not None or any(entry.slot is not None for entry in entries):
            super().score_labels(hidden, entries)
            return
        weight, bias = self._held()
        for table, positions, cells in by_table([(entry.table, entry.cell) for entry in entries]):
            triples = [(entries[i].row, entries[i].label, cell) for i, cell in zip(positions, cells, strict=True)]
            uploaded = upload(triples, hidden.device)
            triton_scores.label_logits(
                hidden, weight, bias, uploaded, table.cells_PC, soft_cap=self.soft_cap, scale=self.scale
            )

    def log_probs(self, hidden: Tensor, rows: Sequence[int], labels: Sequence[int], slots_T: Slots | None) -> Tensor:
        """See `Head`."""
        if slots_T is not None:
            return super().log_probs(hidden, rows, labels, slots_T)
        weight, bias = self._held()
        rows_T, label_T = upload([rows, labels], hidden.device)
        parts = triton_scores.log_prob_parts(
            hidden, weight, bias, rows_T, label_T - self.start, soft_cap=self.soft_cap, scale=self.scale
        )
        return self._normalised(*parts)
