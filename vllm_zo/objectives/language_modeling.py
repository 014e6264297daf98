"""Language modelling on completions: how surprised the model is by the right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import EncodedExample
from vllm_zo.objectives.cells import candidate_scores, misses
from vllm_zo.objectives.metrics import completion_metrics
from vllm_zo.objectives.text import continuation_row, field_of, parse_template, render, text_of, tokenise
from vllm_zo.validation import check_bool, reject


@dataclass(frozen=True)
class LanguageModeling:
    """Negative log-likelihood of the completion given the prompt; the prompt's own tokens are not scored.

        loss = - mean over completion tokens of log p(token | prompt, completion tokens before it)    nats per token

    Prompt and completion are tokenised together, so give one of them (or `prefix`) the space that separates them. The
    last completion token is scored but not fed.

    Its predictions count the tokens that are not the model's first choice: an example is right (0) where greedy
    decoding would produce the whole completion. MeZO's code averages over all tokens of a mini-batch; here every
    example weighs the same.

    Example:
        >>> LanguageModeling(template="Q: {question}\\nA:", completion_field="answer", prefix=" ").append_eos
        True

    Raises:
        ConfigError: on creation, a bad template or field name; on `encode`, a record without its fields, an empty
            completion, or a tokenizer without EOS where one is to be appended.
    """

    name = "language-modeling"

    prompt_field: str = "prompt"
    """Field with the prompt, used as it is. Ignored where there is a template."""
    completion_field: str = "completion"
    """Field with the text to learn, used as it is; of a list of equally good answers the first is learnt."""
    template: str | None = None
    """Prompt with {field} placeholders, filled with stripped values."""
    append_eos: bool = True
    """Learn to stop: the tokenizer's EOS ends the completion."""
    prefix: str = ""
    """Put in front of the completion: " " where the prompt does not end with a space."""
    suffix: str = ""
    """Put behind the completion, e.g. a line feed at which generation stops."""
    special_tokens: bool = True
    """Start prompts as the tokenizer starts them. False: the text has its BOS written out, as chat templates do."""

    def __post_init__(self) -> None:
        for name in ("prompt_field", "completion_field"):
            if not isinstance(value := getattr(self, name), str) or not value:
                reject(name, value, "the name of a field")
        for name in ("prefix", "suffix"):
            if not isinstance(value := getattr(self, name), str):
                reject(name, value, "a text")
        if self.template is not None:
            parse_template(self.template)
        check_bool("append_eos", self.append_eos)
        check_bool("special_tokens", self.special_tokens)

    def encode(self, example: dict[str, Any], tokenizer: Any, where: str) -> EncodedExample:
        """One row of kind "logprobs"."""
        if self.template is None:
            prompt = text_of(example, self.prompt_field, where)
        else:
            prompt = render(self.template, example, where)
        completion = self.prefix + self._answer(example, where) + self.suffix
        stem, full = tokenise([prompt, prompt + completion], tokenizer, special_tokens=self.special_tokens)
        if self.append_eos:
            if tokenizer.eos_token_id is None:
                raise ConfigError("append_eos=True, but the tokenizer has no EOS token; use append_eos=False.")
            full = [*full, tokenizer.eos_token_id]
        return EncodedExample((continuation_row(stem, full, completion, where),))

    def _answer(self, example: dict[str, Any], where: str) -> str:
        answers = field_of(example, self.completion_field, where)
        if isinstance(answers, list | tuple) and answers:
            example = {self.completion_field: answers[0]}
        answer = text_of(example, self.completion_field, where)
        if not answer:
            raise ConfigError(f"{where}: field {self.completion_field!r} is empty: there is nothing to learn.")
        return answer

    def loss(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        """(P, E) float32 nats per completion token, and (P, E) int64 tokens that are not the model's first choice; see
        `Objective.loss`."""
        return -candidate_scores(cells_PC, examples).squeeze(-1), misses(cells_PC, examples)

    def metrics(
        self, losses: Sequence[float], predictions: Sequence[int], examples: Sequence[EncodedExample]
    ) -> dict[str, float]:
        return completion_metrics(losses, predictions, examples)
