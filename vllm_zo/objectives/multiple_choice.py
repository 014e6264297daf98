"""Multiple choice: every example brings its own options, of any number and length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import EncodedExample
from vllm_zo.objectives.cells import candidate_scores, choice_loss
from vllm_zo.objectives.labels import class_index
from vllm_zo.objectives.metrics import choice_metrics
from vllm_zo.objectives.text import (
    continuation_row,
    field_of,
    join_prompt,
    parse_template,
    render,
    text_of,
    tokenise,
    trim,
)  # fmt: skip
from vllm_zo.validation import check_known, check_optional_int, reject

Loss = Literal["choice", "likelihood"]


@dataclass(frozen=True)
class MultipleChoice:
    """A choice among texts that belong to the example; COPA, HellaSwag, ARC.

        score_n = mean over the tokens of choice n of log p(token | prompt, choice tokens before it)
        prediction = argmax score
        loss "choice"      -log softmax(score)[gold], as in Classification
        loss "likelihood"  -score_gold: the right choice is made likely, whatever the others are; MeZO's for COPA

    One row a choice, in training too, so that accuracy is known there. (MeZO feeds the right choice only where the loss
    is the likelihood: half the rows for COPA, and the same losses.) Examples of one mini-batch may differ in the number
    of their choices.

    Example:
        >>> MultipleChoice("{premise} What happened?", ["choice1", "choice2"]).choices
        ('choice1', 'choice2')

    Raises:
        ConfigError: on creation, a bad template, no field of choices; on `encode`, a record without its fields, fewer
            than two choices, equal ones, or a label outside them.

    Source: MeZO, arXiv:2305.17333; princeton-nlp/MeZO, large_models/run.py (`--train_as_classification False`).
    """

    name = "multiple-choice"

    template: str
    """Prompt with {field} placeholders; field values are stripped."""
    choices: str | Sequence[str] = "choices"
    """Field that holds the list of choices, or the fields that hold one each: ["choice1", "choice2"]."""
    _: KW_ONLY
    label_field: str = "label"
    """Field that holds the right choice: its index from 0, or its text."""
    separator: str = " "
    """Between prompt and choice."""
    loss_kind: Loss = "choice"
    """"choice" or "likelihood"."""
    bos_token_id: int | None = None
    """Token to start every prompt with, instead of the tokenizer's own special tokens."""

    def __post_init__(self) -> None:
        parse_template(self.template)
        if not isinstance(self.choices, str):
            if not isinstance(self.choices, list | tuple):
                reject("choices", self.choices, "the name of a field, or a list of names")
            object.__setattr__(self, "choices", tuple(self.choices))
        names = [self.choices] if isinstance(self.choices, str) else [*self.choices]
        if not names or not all(isinstance(name, str) and name for name in names):
            reject("choices", self.choices, "the name of a field, or a list of names")
        if not isinstance(self.choices, str) and len(names) < 2:
            reject("choices", self.choices, "at least two fields")
        for name in ("label_field", "separator"):
            if not isinstance(value := getattr(self, name), str):
                reject(name, value, "a text")
        check_known("loss_kind", self.loss_kind, get_args(Loss))
        check_optional_int("bos_token_id", self.bos_token_id, 0, fix="None keeps the tokenizer's own")

    def encode(self, example: dict[str, Any], tokenizer: Any, where: str) -> EncodedExample:
        """One row of kind "logprobs" per choice."""
        choices = self._choices(example, where)
        gold = class_index(field_of(example, self.label_field, where), choices, None, where)
        stem = render(self.template, example, where)
        texts = [trim(stem), *(trim(join_prompt(stem, self.separator, choice)) for choice in choices)]
        stem_ids, *full_ids = tokenise(texts, tokenizer, self.bos_token_id)
        if len(set(map(tuple, full_ids))) < len(full_ids):
            raise ConfigError(f"{where}: two of the choices {choices!r:.80} have equal token ids.")
        rows = tuple(continuation_row(stem_ids, ids, c, where) for c, ids in zip(choices, full_ids, strict=True))
        return EncodedExample(rows, gold)

    def _choices(self, example: dict[str, Any], where: str) -> list[str]:
        if not isinstance(self.choices, str):
            return [text_of(example, name, where).strip() for name in self.choices]
        choices = field_of(example, self.choices, where)
        if not isinstance(choices, list | tuple) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
            raise ConfigError(
                f"{where}: field {self.choices!r} is {choices!r:.60}, expected a list of at least two texts."
            )
        return [choice.strip() for choice in choices]

    def loss(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        """(P, E) float32 nats per example, and (P, E) int64 predicted choices; see `Objective.loss`."""
        scores_PEN = candidate_scores(cells_PC, examples)
        loss_PE, predictions_PE = choice_loss(scores_PEN, examples)
        if self.loss_kind == "likelihood":
            gold_E1 = torch.tensor([[example.gold] for example in examples]).to(scores_PEN.device, non_blocking=True)
            gold_PE = scores_PEN.gather(-1, gold_E1.expand(len(scores_PEN), -1, -1)).squeeze(-1)
            return -gold_PE, predictions_PE
        return loss_PE, predictions_PE

    def metrics(
        self, losses: Sequence[float], predictions: Sequence[int], examples: Sequence[EncodedExample]
    ) -> dict[str, float]:
        return choice_metrics(predictions, examples)
