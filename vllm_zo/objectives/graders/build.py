"""A grader from its description, in the JSON that OpenAI's fine-tuning API uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.graders.base import Grader
from vllm_zo.objectives.graders.formula import Formula
from vllm_zo.objectives.graders.multi import MultiGrader
from vllm_zo.objectives.graders.python_grader import python_grader
from vllm_zo.objectives.graders.texts import regular_expression, string_check, text_similarity
from vllm_zo.validation import check_keys, check_known, reject

BUILDERS: dict[str, Callable[[str, Mapping[str, Any]], Grader]] = {
    "string_check": string_check,
    "text_similarity": text_similarity,
    "regex": regular_expression,
    "python": python_grader,
}
FIELDS: dict[str, tuple[str, ...]] = {
    "string_check": ("input", "reference", "operation"),
    "text_similarity": ("input", "reference", "evaluation_metric"),
    "regex": ("input", "pattern"),
    "python": ("source",),
    "multi": ("graders", "calculate_output"),
}
"""What each type needs beside `type` and `name`."""
OPTIONAL = {"python": ("image_tag",)}
MODEL_GRADERS = ("score_model", "label_model")


def build_grader(spec: Mapping[str, Any], allow_python: bool = False) -> Grader:
    """The grader that `spec` describes.

    Args:
        spec: e.g. {"type": "string_check", "name": "exact", "operation": "eq", "input": "{{sample.output_text}}",
            "reference": "{{item.answer}}"}. Types: string_check, text_similarity, regex, python, multi.
        allow_python: whether source text from the spec may run on this machine.

    Raises:
        ConfigError: names the field, what was given and what is accepted; nothing has run yet.

    Source: OpenAI API reference, fine-tuning graders. `regex` is ours.
    """
    return _build("grader", spec, allow_python)


def _build(where: str, spec: Any, allow_python: bool) -> Grader:
    if not isinstance(spec, Mapping):
        reject(where, spec, 'a grader such as {"type": "string_check", ...}')
    kind = spec.get("type")
    if kind in MODEL_GRADERS:
        raise ConfigError(
            f"{where}.type={kind!r} is not available: it asks a second model to judge, and this engine serves the one "
            "that is being trained. Use string_check, text_similarity, regex, or python where it is allowed."
        )
    check_known(f"{where}.type", kind, FIELDS)
    assert isinstance(kind, str)
    _check_fields(where, kind, spec)
    if kind == "multi":
        return _multi(where, spec, allow_python)
    if kind == "python" and not allow_python:
        raise ConfigError(
            f"{where}.type='python' is not allowed here: it runs code from the request on this machine. Whoever starts "
            "the engine can allow it."
        )
    return BUILDERS[kind](where, spec)


def _check_fields(where: str, kind: str, spec: Mapping[str, Any]) -> None:
    check_keys(f"field of {where} ({kind})", spec, ["type", "name", *FIELDS[kind], *OPTIONAL.get(kind, ())])
    for name in ("name", *FIELDS[kind]):
        if name not in spec:
            raise ConfigError(f"{where}.{name} is missing: a {kind} grader needs it.")
    if not isinstance(spec["name"], str) or not spec["name"]:
        reject(f"{where}.name", spec["name"], "a non-empty text")


def _multi(where: str, spec: Mapping[str, Any], allow_python: bool) -> MultiGrader:
    parts = spec["graders"]
    if not isinstance(parts, Mapping) or not parts:
        reject(f"{where}.graders", parts, 'graders by name, e.g. {"exact": {"type": "string_check", ...}}')
    for key, part in parts.items():
        if not isinstance(key, str) or not key.isidentifier():
            reject(f"{where}.graders", key, "names that calculate_output can use (letters, digits, _)")
        if isinstance(part, Mapping) and part.get("type") == "multi":
            raise ConfigError(f"{where}.graders.{key}.type='multi': a multi grader cannot hold another; flatten it.")
    graders = {key: _build(f"{where}.graders.{key}", part, allow_python) for key, part in parts.items()}
    return MultiGrader(
        spec["name"], graders, Formula.parse(f"{where}.calculate_output", spec["calculate_output"], graders)
    )
