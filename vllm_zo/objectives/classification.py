"""Classification by prompting: each class is an option, a piece of text that may follow the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import EncodedExample, ScoringRow
from vllm_zo.objectives.cells import candidate_scores, choice_loss
from vllm_zo.objectives.labels import class_index
from vllm_zo.objectives.metrics import choice_metrics
from vllm_zo.objectives.text import (
    continuation_row,
    continuation_start,
    field_of,
    parse_template,
    render,
    tokenise,
    trim,
)  # fmt: skip
from vllm_zo.validation import check_known, check_optional_int, reject

Mode = Literal["auto", "single-token", "full"]


@dataclass(frozen=True)
class Classification:
    """Cross-entropy over the options of a prompt; MeZO's classification loss.

        score_n = mean over the tokens of option n of log p(token | prompt, option tokens before it)
        loss    = -log softmax(score)[gold],    prediction = argmax score

    Two roads, equal to rounding where both apply:
        single-token  every option is one token after this prompt. The vocabulary's normaliser cancels in the softmax,
                      so the raw logits of the options at the prompt's last token are enough: one row an example, half
                      the tokens. With two options the loss is softplus(-(logit_gold - logit_other)).
        full          one row an option, over prompt and option. The option's last token is scored but not fed.

    As in MeZO, white space in front of the prompt and spaces after it (or after prompt + option) are dropped before
    tokenising.

    BOS: prompts start as the tokenizer starts them. OPT's own tokenizer puts </s> (id 2) in front, whereas MeZO's code
    forced id 0 (<s>); set `bos_token_id` to pin it (0 for MeZO's published figures).

    Example:
        >>> Classification("{sentence} It was", [" terrible", " great"]).options
        (' terrible', ' great')

    Raises:
        ConfigError: on creation, a template without plain {fields}, fewer than two or equal options, labels that do not
            match the options; on `encode`, a record that lacks a field or whose label is not among the options.

    Source: MeZO, arXiv:2305.17333; princeton-nlp/MeZO, large_models/utils.py (`forward_wrap_with_option_len`,
    `encode_prompt`).
    """

    name = "classification"

    template: str
    """Prompt with {field} placeholders; field values are stripped."""
    options: Sequence[str]
    """Text of each class, with the space that separates it from the prompt: [" terrible", " great"]."""
    _: KW_ONLY
    label_field: str = "label"
    """Field of a record that holds its class."""
    labels: Sequence[str | int] | None = None
    """What records call the classes, in the order of `options`. None: the options themselves, or their indices."""
    mode: Mode = "auto"
    """"single-token" or "full" force a road; "auto" takes the single-token one for every prompt that allows it."""
    bos_token_id: int | None = None
    """Token to start every prompt with, instead of the tokenizer's own special tokens."""

    def __post_init__(self) -> None:
        parse_template(self.template)
        object.__setattr__(self, "options", _as_tuple("options", self.options))
        if len(self.options) < 2 or not all(isinstance(o, str) and o.strip() for o in self.options):
            reject("options", self.options, "at least two non-empty texts, e.g. [' terrible', ' great']")
        if len({o.strip() for o in self.options}) < len(self.options):
            reject("options", self.options, "texts that differ")
        if self.labels is not None:
            self._check_labels()
        if not isinstance(self.label_field, str):
            reject("label_field", self.label_field, "the name of a field")
        check_known("mode", self.mode, get_args(Mode))
        check_optional_int("bos_token_id", self.bos_token_id, 0, fix="None keeps the tokenizer's own")

    def _check_labels(self) -> None:
        labels = _as_tuple("labels", self.labels)
        object.__setattr__(self, "labels", labels)
        if len(labels) != len(self.options):
            raise ConfigError(
                f"labels={labels!r}: {len(labels)} labels for {len(self.options)} options; give one each."
            )
        if not all(isinstance(label, str | int) for label in labels):
            reject("labels", labels, "texts or integers")
        if len(set(map(str, labels))) < len(labels):
            reject("labels", labels, "values that differ")

    def encode(self, example: dict[str, Any], tokenizer: Any, where: str) -> EncodedExample:
        """Rows of one record: one of kind "labels", or one of kind "logprobs" per option."""
        stem = render(self.template, example, where)
        gold = class_index(field_of(example, self.label_field, where), self.options, self.labels, where)
        texts = [trim(stem), *(trim(stem + option) for option in self.options)]
        stem_ids, *full_ids = tokenise(texts, tokenizer, self.bos_token_id)
        if len(set(map(tuple, full_ids))) < len(full_ids):
            raise ConfigError(f"{where}: two of the options {self.options!r} have equal token ids; choose other words.")
        starts = [continuation_start(stem_ids, ids, o, where) for o, ids in zip(self.options, full_ids, strict=True)]
        if self.mode != "full" and self._all_single(stem_ids, full_ids, starts, where):
            row = ScoringRow(tuple(stem_ids), (len(stem_ids) - 1,), tuple(ids[-1] for ids in full_ids), "labels")
            return EncodedExample((row,), gold)
        rows = tuple(continuation_row(stem_ids, ids, o, where) for o, ids in zip(self.options, full_ids, strict=True))
        return EncodedExample(rows, gold)

    def _all_single(self, stem: list[int], full: list[list[int]], starts: list[int], where: str) -> bool:
        """Whether every option is the prompt's tokens and one more: a boundary that merges is not."""
        single = [len(ids) == len(stem) + 1 and start == len(stem) for ids, start in zip(full, starts, strict=True)]
        if self.mode == "single-token" and not all(single):
            i = single.index(False)
            raise ConfigError(
                f"{where}: option {self.options[i]!r} is not a single token after this prompt "
                f"(token ids {full[i][starts[i] :]}); use mode='auto' or another option."
            )
        return all(single)

    def loss(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        """(P, E) float32 nats per example, and (P, E) int64 predicted options; see `Objective.loss`.

        A score that is not finite makes the loss of its example nan.
        """
        return choice_loss(candidate_scores(cells_PC, examples), examples)

    def metrics(
        self, losses: Sequence[float], predictions: Sequence[int], examples: Sequence[EncodedExample]
    ) -> dict[str, float]:
        return choice_metrics(predictions, examples)


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """JSON has no tuples, and frozen dataclasses should hold no lists. A lone string is a mistake, not its letters."""
    if not isinstance(value, list | tuple):
        reject(name, value, "a list")
    return tuple(value)
