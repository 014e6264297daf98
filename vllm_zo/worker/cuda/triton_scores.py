"""Scores of members on a GPU, from an LM head in its own type; `worker/head.py` defines the scores.

    label_logits      one launch for all (row, label) pairs of a step; it writes into the loss table
    log_prob_parts    one launch over (rows, vocabulary); logits are never stored

In plain torch the first takes a dozen small launches. The second widens the head to float32 (OPT-13B: 1 GB), and writes
and reads rows x vocabulary logits in float32 several times. Here a weight is read in 16 bits, once for ROWS rows.
Products of 16-bit numbers are exact in float32. Sums are in float32, in an order that does not depend on the batch.

Sizes of tiles are a first guess: nothing here has run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Inputs of a label's product that a program reads at a time."""
ROWS, COLUMNS, INPUTS = 32, 64, 64
"""Rows and vocabulary entries of a tile of logits, and inputs that a program reads at a time."""
SPAN = 1024
"""Vocabulary entries of a program: 50 programs for 32 rows and OPT's vocabulary."""


def label_logits(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    entries_E3: Tensor,
    cells: Tensor,
    *,
    soft_cap: float | None,
    scale: float,
) -> None:
    """For each entry, `cells[place] = finish(hidden[row] . weight[label] + bias[label])`, in place.

    Args:
        hidden_TD, weight_VD: of 16 or 32 bits; the last dimension is contiguous.
        bias_V: the head's bias, or None.
        entries_E3: (E, 3) int64: row, label, place.
        cells: float32, contiguous; `place` counts its elements.
        soft_cap, scale: see `Head`.
    """
    if not len(entries_E3):
        return
    assert hidden_TD.stride(1) == weight_VD.stride(1) == 1 and cells.is_contiguous()
    with torch.cuda.device_of(cells):
        _label_logits[(len(entries_E3),)](
            hidden_TD, weight_VD, bias_V, entries_E3, cells, hidden_TD.shape[1], hidden_TD.stride(0),
            weight_VD.stride(0), soft_cap or 1.0, scale, BIAS=bias_V is not None, CAP=bool(soft_cap), BLOCK=BLOCK,
        )  # fmt: skip


def log_prob_parts(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows_T: Tensor,
    label_T: Tensor,
    *,
    soft_cap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of log-probabilities over this rank's vocabulary, for `Head._normalised`.

    Args:
        hidden_TD, weight_VD, bias_V: see `label_logits`.
        rows_T: (T,) int64, rows of `hidden`.
        label_T: (T,) int64, entries of `weight`; out of its range if another rank holds the label.
        soft_cap, scale: see `Head`.

    Returns:
        (T,) float32 each: the logit of the label, or 0 if it is out of range; the log of the sum of exponentials; the
        largest logit.
    """
    assert hidden_TD.stride(1) == weight_VD.stride(1) == 1
    (tokens,), vocab = rows_T.shape, len(weight_VD)
    spans = triton.cdiv(vocab, SPAN)
    parts = torch.empty(3, spans, tokens, dtype=torch.float32, device=hidden_TD.device)
    if tokens:
        with torch.cuda.device_of(parts):
            _log_prob_parts[(triton.cdiv(tokens, ROWS), spans)](
                hidden_TD, weight_VD, bias_V, rows_T, label_T, parts, tokens, vocab, hidden_TD.shape[1],
                hidden_TD.stride(0), weight_VD.stride(0), soft_cap or 1.0, scale, BIAS=bias_V is not None,
                CAP=bool(soft_cap), ROWS=ROWS, COLUMNS=COLUMNS, INPUTS=INPUTS, SPAN=SPAN,
            )  # fmt: skip
    target, most, total = parts
    return target.sum(0), (most + total.log()).logsumexp(0), most.amax(0)


@triton.jit
def _finish(logits, soft_cap, scale, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    if CAP:
        logits = (2 * tl.sigmoid(2 * logits / soft_cap) - 1) * soft_cap  # tl has no tanh
    return logits * scale


@triton.jit
def _label_logits(  # type: ignore[no-untyped-def]
    hidden, weight, bias, entries, cells, width, hidden_stride, weight_stride, soft_cap, scale,
    BIAS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = entries + 3 * tl.program_id(0)
    row, label, place = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        x = tl.load(hidden + row * hidden_stride + column, mask=inside, other=0.0).to(tl.float32)
        total += x * tl.load(weight + label * weight_stride + column, mask=inside, other=0.0).to(tl.float32)
    logit = tl.sum(total, axis=0)
    if BIAS:
        logit += tl.load(bias + label).to(tl.float32)
    tl.store(cells + place, _finish(logit, soft_cap, scale, CAP))


@triton.jit(do_not_specialize=["tokens"])
def _log_prob_parts(  # type: ignore[no-untyped-def]
    hidden, weight, bias, rows, labels, parts, tokens, vocab, width, hidden_stride, weight_stride, soft_cap, scale,
    BIAS: tl.constexpr, CAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = position < tokens
    row = tl.load(rows + position, mask=there, other=0)
    label = tl.load(labels + position, mask=there, other=-1)
    begin = tl.program_id(1) * SPAN
    most = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    target = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(begin, tl.minimum(begin + SPAN, vocab), COLUMNS):
        entry = first + tl.arange(0, COLUMNS)
        known = entry < vocab
        logits = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, width, INPUTS):
            column = start + tl.arange(0, INPUTS)
            inside = column < width
            x = tl.load(
                hidden + row[:, None] * hidden_stride + column[None, :],
                mask=there[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            w = tl.load(
                weight + entry.to(tl.int64)[:, None] * weight_stride + column[None, :],
                mask=known[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            logits = tl.dot(x, tl.trans(w), logits, input_precision="ieee")
        if BIAS:
            logits += tl.load(bias + entry, mask=known, other=0.0).to(tl.float32)[None, :]
        logits = _finish(logits, soft_cap, scale, CAP)
        target += tl.sum(tl.where(entry[None, :] == label[:, None], logits, 0.0), axis=1)
        logits = tl.where(known[None, :], logits, -float("inf"))
        # A running log-sum-exp: what is summed so far is rescaled to the new maximum, so that no exp overflows.
        larger = tl.maximum(most, tl.max(logits, axis=1))
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(logits - larger[:, None]), axis=1)
        most = larger
    spans = tl.num_programs(1)
    place = parts + tl.program_id(1) * tokens + position
    tl.store(place, target, mask=there)
    tl.store(place + spans * tokens, most, mask=there)
    tl.store(place + 2 * spans * tokens, total, mask=there)
