"""Graders that compare texts: string_check, text_similarity and regex."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import regex

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.graders.base import GraderResult
from vllm_zo.objectives.graders.similarity import similarity
from vllm_zo.objectives.graders.template import Template, VariableError
from vllm_zo.validation import check_known

OPERATIONS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}
REGEX_TIMEOUT_S = 1.0
"""A pattern that backtracks without end must not hold a training step."""


@dataclass(frozen=True)
class TextGrader:
    """Renders `input` and `reference` and scores the pair."""

    name: str
    input: Template
    reference: Template
    score: Callable[[str, str], float]

    @property
    def item_fields(self) -> frozenset[str]:
        return self.input.item_fields | self.reference.item_fields

    def __call__(self, sample_text: str, item: Mapping[str, Any]) -> GraderResult:
        try:
            text, reference = (t.render(sample_text, item) for t in (self.input, self.reference))
        except VariableError as error:
            flag = "sample_parse_error" if "sample.output_json" in str(error) else "invalid_variable_error"
            return GraderResult.failed(flag, str(error))
        try:
            return GraderResult(float(self.score(text, reference)))
        except TimeoutError:
            return GraderResult.failed("unresponsive_reward_error", f"the pattern took over {REGEX_TIMEOUT_S:g} s")


def string_check(where: str, spec: Mapping[str, Any]) -> TextGrader:
    """1 where `operation` holds between input and reference: eq, ne, like (contains), ilike (the same, any case)."""
    operation = spec["operation"]
    check_known(f"{where}.operation", operation, OPERATIONS)
    return _text_grader(where, spec, OPERATIONS[operation])


def text_similarity(where: str, spec: Mapping[str, Any]) -> TextGrader:
    return _text_grader(where, spec, similarity(f"{where}.evaluation_metric", spec["evaluation_metric"]))


def regular_expression(where: str, spec: Mapping[str, Any]) -> TextGrader:
    """1 where `pattern` is found anywhere in the input (anchor it with ^ and $). Ours, not OpenAI's."""
    try:
        pattern = regex.compile(spec["pattern"])
    except (regex.error, TypeError) as error:
        raise ConfigError(f"{where}.pattern={spec['pattern']!r}: not a regular expression: {error}.") from None

    def found(text: str, _: str) -> float:
        return float(pattern.search(text, timeout=REGEX_TIMEOUT_S) is not None)

    return _text_grader(where, {**spec, "reference": ""}, found)


def _text_grader(where: str, spec: Mapping[str, Any], score: Callable[[str, str], float]) -> TextGrader:
    text, reference = (Template.parse(f"{where}.{name}", spec[name]) for name in ("input", "reference"))
    return TextGrader(spec["name"], text, reference, score)
