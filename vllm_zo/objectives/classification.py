"""Classification by prompting: each class is an option, which is a piece of text that may follow the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import EncodedExample, ScoringSequence
from vllm_zo.objectives.cells import candidate_scores, choice_loss
from vllm_zo.objectives.labels import class_index
from vllm_zo.objectives.metrics import choice_metrics
from vllm_zo.objectives.shared_options import PANEL, bos_option, label_field_option, template_option
from vllm_zo.objectives.text import (
    continuation_sequence,
    continuation_start,
    field_of,
    is_missing,
    parse_template,
    render,
    tokenise,
    trim,
)  # fmt: skip
from vllm_zo.options import check_options, option
from vllm_zo.validation import reject

MAX_OPTIONS = 1000
"""A limit, because each option may be a sequence of every example."""
Mode = Literal["auto", "single-token", "full"]


@dataclass(frozen=True)
class Classification:
    """Cross-entropy over the options of a prompt, which is MeZO's classification loss.

        score_n = mean over the tokens of option n of log p(token | prompt, option tokens before it)
        loss    = -log softmax(score)[gold],    prediction = argmax score

    There are two modes. Where both apply, they are equal up to rounding:
        single-token  Every option is one token after this prompt. The vocabulary's normaliser cancels in the softmax,
                      so the raw logits of the options at the prompt's last token are enough. An example is one
                      sequence; with two options, that is half the tokens, and the loss is
                      softplus(-(logit_gold - logit_other)).
        full          Every option is one sequence, over prompt and option. The worker scores the option's last token
                      without feeding it.

    As in MeZO, the objective drops white space in front of the prompt and spaces after it (or after prompt + option)
    before it tokenises.

    A prompt starts as the tokenizer starts it. OPT's own tokenizer puts </s> (id 2) in front, whereas MeZO's code
    forced id 0 (<s>). `bos_token_id` fixes the first token (0 for MeZO's published figures).

    Example:
        >>> Classification("{sentence} It was", [" terrible", " great"]).options
        (' terrible', ' great')

    Raises:
        ConfigError: on creation, if the template has no plain {fields}, there are fewer than two options or equal ones,
            or the labels do not match the options; on `encode`, if a record lacks a field or has another label.

    Source: MeZO, arXiv:2305.17333; princeton-nlp/MeZO, large_models/utils.py (`forward_wrap_with_option_len`,
    `encode_prompt`).
    """

    name = "classification"

    template: str = template_option()
    options: Sequence[str] = option(
        flag="option",
        panel=PANEL,
        help='Text of a class, with its leading space: --option " terrible" --option " great".',
    )
    _: KW_ONLY
    labels: Sequence[str | int | float] | None = option(
        None,
        flag="label",
        panel=PANEL,
        help="What the data calls each class, in the order of --option. Unset: index or text.",
    )
    label_field: str = label_field_option()
    mode: Mode = option("auto", choices=get_args(Mode), help="How options are scored: auto, single-token or full.")
    """"auto" takes the single-token mode for every prompt that allows it. The two others force their mode."""
    bos_token_id: int | None = bos_option()

    def __post_init__(self) -> None:
        parse_template(self.template)
        check_options(self)
        object.__setattr__(self, "options", _as_tuple("options", self.options))
        if len(self.options) > MAX_OPTIONS:
            raise ConfigError(f"options: at most {MAX_OPTIONS}, not {len(self.options)}.")
        if len(self.options) < 2 or not all(isinstance(o, str) and o.strip() for o in self.options):
            reject("options", self.options, "at least two non-empty texts, e.g. [' terrible', ' great']")
        if len({o.strip() for o in self.options}) < len(self.options):
            reject("options", self.options, "texts that differ")
        if self.labels is not None:
            self._check_labels()

    def _check_labels(self) -> None:
        labels = _as_tuple("labels", self.labels)
        object.__setattr__(self, "labels", labels)
        if len(labels) != len(self.options):
            raise ConfigError(
                f"labels={labels!r}: {len(labels)} labels for {len(self.options)} options; give one each."
            )
        if not all(isinstance(label, str | int | float) and not is_missing(label) for label in labels):
            reject("labels", labels, "texts or numbers")
        if len(set(map(str, labels))) < len(labels):
            reject("labels", labels, "values that differ")

    def encode(self, example: dict[str, Any], tokenizer: Any, where: str) -> EncodedExample:
        """The sequences of one record: one of kind "labels", or one of kind "logprobs" per option."""
        stem = render(self.template, example, where)
        gold = class_index(field_of(example, self.label_field, where), self.options, self.labels, where)
        texts = [trim(stem), *(trim(stem + option) for option in self.options)]
        stem_ids, *full_ids = tokenise(texts, tokenizer, self.bos_token_id)
        # Options with different texts may have equal tokens (an unknown word): no probe could tell them apart.
        if len(set(map(tuple, full_ids))) < len(full_ids):
            raise ConfigError(f"{where}: two of the options {self.options!r} have equal token ids; choose other words.")
        starts = [continuation_start(stem_ids, ids, o, where) for o, ids in zip(self.options, full_ids, strict=True)]
        if self.mode != "full" and self._all_single(stem_ids, full_ids, starts, where):
            sequence = ScoringSequence(
                tuple(stem_ids), (len(stem_ids) - 1,), tuple(ids[-1] for ids in full_ids), "labels"
            )
            return EncodedExample((sequence,), gold)
        sequences = tuple(
            continuation_sequence(stem_ids, ids, o, where) for o, ids in zip(self.options, full_ids, strict=True)
        )
        return EncodedExample(sequences, gold)

    def _all_single(self, stem: list[int], full: list[list[int]], starts: list[int], where: str) -> bool:
        """Whether every option is the prompt's tokens and one more. An option that merges with the prompt is not."""
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

        A score that is not finite makes the loss of its example NaN.
        """
        return choice_loss(candidate_scores(cells_PC, examples), examples)

    def metrics(
        self, losses: Sequence[float], predictions: Sequence[int], examples: Sequence[EncodedExample]
    ) -> dict[str, float]:
        return choice_metrics(predictions, examples)


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """A list or tuple as a tuple: JSON has no tuples, and a frozen dataclass should hold no lists.

    Raises:
        ConfigError: it is something else. A single string is a mistake, and must not become its letters.
    """
    if not isinstance(value, list | tuple):
        reject(name, value, "a list")
    return tuple(value)
