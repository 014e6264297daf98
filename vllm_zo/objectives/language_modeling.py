"""Language modelling on completions: how surprised the model is by the right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import EncodedExample, ScoringRow
from vllm_zo.objectives.cells import candidate_scores
from vllm_zo.objectives.text import continuation_start, parse_template, render, text_of, tokenise
from vllm_zo.validation import check_bool, reject


@dataclass(frozen=True)
class LanguageModeling:
    """Negative log-likelihood of the completion given the prompt; the prompt's own tokens are not scored.

        loss = - mean over completion tokens of log p(token | prompt, completion tokens before it)    nats per token

    Prompt and completion are tokenised together, so give one of them the space that separates them. The last completion
    token is scored but not fed. There is one candidate, hence predictions are 0 and accuracy means nothing.

    Example:
        >>> LanguageModeling(template="Q: {question}\\nA:", completion_field="answer").append_eos
        True

    Raises:
        ConfigError: on creation, a bad template or field name; on `encode`, a record without its fields, an empty
            completion, or a tokenizer without EOS where one is to be appended.
    """

    name = "language-modeling"

    prompt_field: str = "prompt"
    """Field with the prompt, used as it is. Ignored where there is a template."""
    completion_field: str = "completion"
    """Field with the text to learn, used as it is."""
    template: str | None = None
    """Prompt with {field} placeholders, filled with stripped values."""
    append_eos: bool = True
    """Learn to stop: the tokenizer's EOS ends the completion."""

    def __post_init__(self) -> None:
        for name in ("prompt_field", "completion_field"):
            if not isinstance(value := getattr(self, name), str) or not value:
                reject(name, value, "the name of a field")
        if self.template is not None:
            parse_template(self.template)
        check_bool("append_eos", self.append_eos)

    def encode(self, example: dict[str, Any], tokenizer: Any, where: str) -> EncodedExample:
        """One row of kind "logprobs"."""
        if self.template is None:
            prompt = text_of(example, self.prompt_field, where)
        else:
            prompt = render(self.template, example, where)
        completion = text_of(example, self.completion_field, where)
        if not completion:
            raise ConfigError(f"{where}: field {self.completion_field!r} is empty: there is nothing to learn.")
        stem, full = tokenise([prompt, prompt + completion], tokenizer)
        if self.append_eos:
            if tokenizer.eos_token_id is None:
                raise ConfigError("append_eos=True, but the tokenizer has no EOS token; use append_eos=False.")
            full = [*full, tokenizer.eos_token_id]
        start = continuation_start(stem, full, completion, where)
        row = ScoringRow(tuple(full[:-1]), tuple(range(start - 1, len(full) - 1)), tuple(full[start:]), "logprobs")
        return EncodedExample((row,))

    def loss(self, cells_PC: Tensor, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        """(P, E) float32 nats per completion token, and (P, E) int64 zeros; see `Objective.loss`."""
        scores_PE = candidate_scores(cells_PC, examples).squeeze(-1)
        return -scores_PE, torch.zeros_like(scores_PE, dtype=torch.int64)
