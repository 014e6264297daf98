"""Graders that compare texts: string_check, text_similarity and regex."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.expressions import compile_expression
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


@dataclass(frozen=True)
class TextGrader:
    """A grader that renders `input` and `reference` and scores the pair."""

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
        except ConfigError as error:
            return GraderResult.failed("other_error", str(error))


def string_check(where: str, spec: Mapping[str, Any]) -> TextGrader:
    """The reward is 1 if `operation` holds for input and reference: eq, ne, like (contains), ilike (in any case)."""
    operation = spec["operation"]
    check_known(f"{where}.operation", operation, OPERATIONS)
    return _text_grader(where, spec, OPERATIONS[operation])


def text_similarity(where: str, spec: Mapping[str, Any]) -> TextGrader:
    return _text_grader(where, spec, similarity(f"{where}.evaluation_metric", spec["evaluation_metric"]))


def regular_expression(where: str, spec: Mapping[str, Any]) -> TextGrader:
    """The reward is 1 if `pattern` occurs anywhere in the input (^ and $ anchor it). OpenAI's API has no such type."""
    pattern = compile_expression(f"{where}.pattern", spec["pattern"])

    def found(text: str, _: str) -> float:
        return float(pattern.search(text) is not None)

    return _text_grader(where, {**spec, "reference": ""}, found)


def _text_grader(where: str, spec: Mapping[str, Any], score: Callable[[str, str], float]) -> TextGrader:
    text, reference = (Template.parse(f"{where}.{name}", spec[name]) for name in ("input", "reference"))
    return TextGrader(spec["name"], text, reference, score)
