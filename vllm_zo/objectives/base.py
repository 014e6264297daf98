"""What a loss is: examples become rows to score, and scored rows become one loss per example. Pure.

An example is encoded into one or more *rows* (token sequences). Each row names positions and, for every position, the
token ids whose score is wanted there. Scoring a row yields one float32 *cell* per (position, token id), in order:

    kind "labels"    one position; cells are the raw logits of `label_ids` at that position. Valid only because softmax
                     over the candidates of one position does not see the vocabulary's normaliser.
    kind "logprobs"  cell i of the first n is log p(label_ids[i] | tokens up to positions[i]), normalised over the whole
                     vocabulary; cell n + i is the largest log p of any token there, so that equal cells mean: the model
                     would have chosen this one.
    kind "generate"  the row is a prompt that is continued under the probe; its only cell is that completion's reward.

The cells of all rows of a mini-batch lie one after another in a table; `Objective.loss` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Generation:
    """How a row of kind "generate" is continued: until `max_tokens`, or one of `stop_token_ids` (the last token then).

    Training samples with `temperature` and `top_p`; an evaluation takes the likeliest token (temperature 0).
    """

    max_tokens: int
    temperature: float
    top_p: float
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class ScoringRow:
    """One sequence to run through the model.

    Attributes:
        token_ids: the sequence, including a leading BOS where the tokenizer wants one.
        positions: indices into `token_ids` of the tokens whose *next-token* scores are read.
        label_ids: token ids scored there: all at the single position (kind "labels"), or one per position ("logprobs").
        generation: of kind "generate", whose positions and labels are empty.
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    label_ids: tuple[int, ...]
    kind: Literal["labels", "logprobs", "generate"]
    generation: Generation | None = None

    @property
    def num_cells(self) -> int:
        return {"labels": len(self.label_ids), "logprobs": 2 * len(self.label_ids), "generate": 1}[self.kind]

    @property
    def max_new_tokens(self) -> int:
        """Tokens vLLM adds to the row: of a row that is only scored it samples one, which nobody reads."""
        return 1 if self.generation is None else self.generation.max_tokens

    def __post_init__(self) -> None:
        assert (self.generation is None) == (self.kind != "generate")
        if self.generation is not None:
            return
        assert self.positions and self.label_ids, "a row without anything to score"
        assert self.kind == "labels" or len(self.positions) == len(self.label_ids)
        assert self.kind == "logprobs" or len(self.positions) == 1


@dataclass(frozen=True)
class EncodedExample:
    """An example ready to score: its rows, and which candidate is right (`gold` is 0 where there is only one).

    Attributes:
        columns: of an example with rows of kind "generate": what its reward may read, by name.
    """

    rows: tuple[ScoringRow, ...]
    gold: int = 0
    columns: dict[str, Any] | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)

    @property
    def num_candidates(self) -> int:
        """A row of kind "labels" holds one candidate per label, a row of kind "logprobs" is one."""
        return sum(len(row.label_ids) if row.kind == "labels" else 1 for row in self.rows)


@runtime_checkable
class Objective(Protocol):
    """Implementations are frozen dataclasses, picklable, JSON-describable through `dataclasses.asdict`."""

    name: str

    def encode(self, example: dict[str, Any], tokenizer: Any, where: str) -> EncodedExample:
        """Tokenise one record. `where` ("train.jsonl, row 17") goes into the ConfigError for a bad record."""
        ...

    def loss(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        """Losses and predictions of a mini-batch.

        Args:
            cells_PC: (probes, cells) float32 on the scoring device: rows of `examples` in order, cells of a row too.

        Returns:
            (probes, examples) float32 nats; and (probes, examples) int64 predictions, right where they equal
            `EncodedExample.gold`.
        """
        ...

    def metrics(
        self, losses: Sequence[float], predictions: Sequence[int], examples: Sequence[EncodedExample]
    ) -> dict[str, float]:
        """What an evaluation reports beside the mean loss; "accuracy" is always among it.

        Args:
            losses, predictions: one per example, as `loss` gave them for the state that is evaluated.
        """
        ...
