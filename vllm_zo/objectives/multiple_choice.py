"""Multiple choice: every example brings its own choices, of any number and length."""

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
from vllm_zo.objectives.shared_options import PANEL, bos_option, label_field_option, template_option
from vllm_zo.objectives.text import (
    as_text,
    continuation_sequence,
    field_of,
    join_prompt,
    parse_template,
    render,
    text_of,
    tokenise,
    trim,
)  # fmt: skip
from vllm_zo.options import check_options, option
from vllm_zo.validation import reject

Loss = Literal["choice", "likelihood"]
LabelIs = Literal["auto", "index", "text"]


@dataclass(frozen=True)
class MultipleChoice:
    """A choice among texts that belong to the example, as in COPA, HellaSwag and ARC.

        score_n = mean over the tokens of choice n of log p(token | prompt, choice tokens before it)
        prediction = argmax score
        loss "choice"      -log softmax(score)[gold], as in Classification
        loss "likelihood"  -score_gold: it makes the right choice likely, whatever the others are; MeZO's for COPA

    Every choice is one sequence, in training too, so that training has an accuracy. (With the likelihood MeZO feeds the
    right choice alone. That is half the sequences for COPA, and the same losses.) Examples of one mini-batch may differ
    in the number of their choices.

    Example:
        >>> MultipleChoice("{premise} What happened?", ["choice1", "choice2"]).choices
        ('choice1', 'choice2')

    Raises:
        ConfigError: on creation, if the template is bad or no field of choices is given; on `encode`, if a record lacks
            a field, has fewer than two choices or equal ones, or its label is none of them.

    Source: MeZO, arXiv:2305.17333; princeton-nlp/MeZO, large_models/run.py (`--train_as_classification False`).
    """

    name = "multiple-choice"

    template: str = template_option()
    choices: str | Sequence[str] = option(
        "choices",
        panel=PANEL,
        help="multiple-choice: field that holds the list of choices, or (repeated) the fields that hold one each.",
    )
    _: KW_ONLY
    label_field: str = label_field_option()
    """The field holds the right choice: its index from 0, or its text."""
    label_is: LabelIs = option(
        "auto", choices=get_args(LabelIs), help="What a label is where the choices are numbers: auto, index or text."
    )
    """"auto" takes a number for an index. It takes a text such as "2" for the index or for the choice "2", and refuses
    a text that could mean two different choices."""
    separator: str = option(" ", help="Text between prompt and choice.")
    loss_kind: Loss = option("choice", choices=get_args(Loss), help="Loss: choice or likelihood.")
    bos_token_id: int | None = bos_option()

    def __post_init__(self) -> None:
        parse_template(self.template)
        check_options(self)
        if not isinstance(self.choices, str):
            if not isinstance(self.choices, list | tuple):
                reject("choices", self.choices, "the name of a field, or a list of names")
            object.__setattr__(self, "choices", tuple(self.choices))
        names = [self.choices] if isinstance(self.choices, str) else [*self.choices]
        if not names or not all(isinstance(name, str) and name for name in names):
            reject("choices", self.choices, "the name of a field, or a list of names")
        if not isinstance(self.choices, str) and len(names) < 2:
            reject("choices", self.choices, "at least two fields")

    def encode(self, example: dict[str, Any], tokenizer: Any, where: str) -> EncodedExample:
        """One sequence of kind "logprobs" per choice."""
        choices = self._choices(example, where)
        gold = self._gold(field_of(example, self.label_field, where), choices, where)
        stem = render(self.template, example, where)
        texts = [trim(stem), *(trim(join_prompt(stem, self.separator, choice)) for choice in choices)]
        stem_ids, *full_ids = tokenise(texts, tokenizer, self.bos_token_id)
        if len(set(map(tuple, full_ids))) < len(full_ids):
            raise ConfigError(f"{where}: two of the choices {choices!r:.80} have equal token ids.")
        sequences = tuple(
            continuation_sequence(stem_ids, ids, c, where) for c, ids in zip(choices, full_ids, strict=True)
        )
        return EncodedExample(sequences, gold)

    def _gold(self, label: Any, choices: list[str], where: str) -> int:
        numbers_are = {"auto": "either" if isinstance(label, str) else "index"}.get(self.label_is, self.label_is)
        way_out = "set label_is='index' or label_is='text'"
        return class_index(label, choices, None, where, numbers_are=numbers_are, way_out=way_out)

    def _choices(self, example: dict[str, Any], where: str) -> list[str]:
        if not isinstance(self.choices, str):
            return [text_of(example, name, where).strip() for name in self.choices]
        choices = field_of(example, self.choices, where)
        if not isinstance(choices, list | tuple) or len(choices) < 2:
            raise ConfigError(
                f"{where}: field {self.choices!r} is {choices!r:.60}, expected a list of at least two texts."
            )
        return [as_text(c, f"{where}: field {self.choices!r}[{i}]").strip() for i, c in enumerate(choices)]

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
