"""Language modelling on completions: the loss says how unlikely the model finds the right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import EncodedExample
from vllm_zo.objectives.cells import candidate_scores, misses
from vllm_zo.objectives.metrics import completion_metrics
from vllm_zo.objectives.shared_options import PANEL, prompt_field_option, special_tokens_option, template_option
from vllm_zo.objectives.text import (
    as_text,
    continuation_sequence,
    ended,
    field_of,
    parse_template,
    render,
    text_of,
    tokenise,
)  # fmt: skip
from vllm_zo.options import check_options, option

TEXT = "text"
"""The field of a record that has a whole text in place of prompt and completion: TRL's name for it."""


@dataclass(frozen=True)
class LanguageModeling:
    """The negative log-likelihood of the completion given the prompt. The prompt's own tokens have no loss.

        loss = - mean over completion tokens of log p(token | prompt, completion tokens before it)    nats per token

    A record without these two fields may have a `text` instead, of which everything is learnt but its first token.

    The objective tokenises prompt and completion together, so one of them (or `prefix`) must have the space between
    them. The worker scores the last completion token without feeding it.

    A prediction is the number of tokens that are not the model's first choice. It is right (0) if greedy decoding would
    produce the whole completion. MeZO's code averages over all tokens of a mini-batch; here every example weighs the
    same.

    Example:
        >>> LanguageModeling(template="Q: {question}\\nA:", completion_field="answer", prefix=" ").append_eos
        True

    Raises:
        ConfigError: on creation, if the template or a field name is bad; on `encode`, if a record lacks a field, its
            completion is empty, or the tokenizer has no EOS while `append_eos` asks for one.
    """

    name = "language-modeling"

    prompt_field: str = prompt_field_option()
    """The text is used as it is. With a template the field is ignored."""
    completion_field: str = option(
        "completion", text="the name of a field", panel=PANEL, help="language-modeling: field with the text to learn."
    )
    """The text is used as it is. From a list of equally good answers the model learns the first."""
    template: str | None = template_option(None)
    append_eos: bool = option(True, help="Learn to stop: every completion ends with the tokenizer's EOS, once.")
    prefix: str = option("", help='Text in front of every completion, e.g. " " where prompts end without a space.')
    suffix: str = option("", help="Text behind every completion, e.g. a line feed at which generation stops.")
    special_tokens: bool = special_tokens_option()
    """Set it to False if the text has its BOS written out, as chat templates do."""

    def __post_init__(self) -> None:
        if self.template is not None:
            parse_template(self.template)
        check_options(self)

    @property
    def reads_prompts(self) -> bool:
        """Whether it reads the fields `prompt` and `completion`, in whose place a record may have `messages`."""
        return (self.template, self.prompt_field, self.completion_field) == (None, "prompt", "completion")

    def encode(self, example: dict[str, Any], tokenizer: Any, where: str) -> EncodedExample:
        """One sequence of kind "logprobs"."""
        if self.template is None and TEXT in example and not {self.prompt_field, self.completion_field} & {*example}:
            return self._whole_text(text_of(example, TEXT, where), tokenizer, where)
        if self.template is None:
            prompt = text_of(example, self.prompt_field, where)
        else:
            prompt = render(self.template, example, where)
        completion = self.prefix + self._answer(example, where) + self.suffix
        stem, full = tokenise([prompt, prompt + completion], tokenizer, special_tokens=self.special_tokens)
        return EncodedExample((continuation_sequence(stem, self._ended(full, tokenizer), completion, where),))

    def _whole_text(self, text: str, tokenizer: Any, where: str) -> EncodedExample:
        """A record with a text in place of prompt and completion: everything but its first token is learnt."""
        (full,) = tokenise([text], tokenizer, special_tokens=self.special_tokens)
        if not text.strip() or not full:
            raise ConfigError(f"{where}: field {TEXT!r} is empty: there is nothing to learn.")
        return EncodedExample((continuation_sequence(full[:1], self._ended(full, tokenizer), text, where),))

    def _ended(self, full: list[int], tokenizer: Any) -> list[int]:
        """The tokens with the EOS behind them that `append_eos` asks for."""
        return ended(full, tokenizer) if self.append_eos else full

    def _answer(self, example: dict[str, Any], where: str) -> str:
        answers = field_of(example, self.completion_field, where)
        several = isinstance(answers, list | tuple) and bool(answers)
        answer = as_text(answers[0] if several else answers, f"{where}: field {self.completion_field!r}")
        if not answer:
            raise ConfigError(f"{where}: field {self.completion_field!r} is empty: there is nothing to learn.")
        return answer

    def loss(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        """(P, E) float32 nats per completion token, and (P, E) int64 numbers of tokens that are not the model's first
        choice; see `Objective.loss`."""
        return -candidate_scores(cells_PC, examples).squeeze(-1), misses(cells_PC, examples)

    def metrics(
        self, losses: Sequence[float], predictions: Sequence[int], examples: Sequence[EncodedExample]
    ) -> dict[str, float]:
        return completion_metrics(losses, predictions, examples)
