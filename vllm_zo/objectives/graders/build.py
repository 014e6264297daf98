"""How a grader is built from its description, in the JSON of OpenAI's fine-tuning API."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.graders.base import Grader
from vllm_zo.objectives.graders.formula import Formula
from vllm_zo.objectives.graders.multi import MultiGrader
from vllm_zo.objectives.graders.python_grader import python_grader
from vllm_zo.objectives.graders.texts import regular_expression, string_check, text_similarity
from vllm_zo.registry import Registry
from vllm_zo.validation import check_keys, check_known, reject


@dataclass(frozen=True, kw_only=True)
class GraderType:
    """One type of grader: what its JSON may hold, and the function that makes a grader of it.

    Attributes:
        build: (where the grader stands in the request, its JSON) -> the grader; it raises ConfigError.
        fields: what the JSON needs in addition to `type` and `name`.
        optional: what else the JSON may hold.
        runs_source: whether the JSON brings source text that runs on this machine.
    """

    name: str
    build: Callable[[str, Mapping[str, Any]], Grader]
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()
    runs_source: bool = False


GRADERS: Registry[GraderType] = Registry(
    "grader",
    lambda part: isinstance(part, GraderType),
    "a vllm_zo.objectives.graders.GraderType",
    (
        GraderType(name="string_check", build=string_check, fields=("input", "reference", "operation")),
        GraderType(name="text_similarity", build=text_similarity, fields=("input", "reference", "evaluation_metric")),
        GraderType(name="regex", build=regular_expression, fields=("input", "pattern")),
        GraderType(name="python", build=python_grader, fields=("source",), optional=("image_tag",), runs_source=True),
    ),
)
"""The types of graders by name. "multi" is not among them, because it consists of others."""
MULTI, MULTI_FIELDS = "multi", ("graders", "calculate_output")
MODEL_GRADERS = ("score_model", "label_model")
MAX_GRADERS = 32
"""The most graders in a multi grader."""


def build_grader(spec: Mapping[str, Any], allow_python: bool = False) -> Grader:
    """The grader that `spec` describes.

    Args:
        spec: e.g. {"type": "string_check", "name": "exact", "operation": "eq", "input": "{{sample.output_text}}",
            "reference": "{{item.answer}}"}. Types: those of GRADERS, and multi.
        allow_python: whether source text from the spec may run on this machine.

    Raises:
        ConfigError: `spec` is no description of a grader. The message names the field, its value and what is accepted.
            Nothing has run yet.

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
    check_known(f"{where}.type", kind, [*GRADERS, MULTI])
    if kind == MULTI:
        _check_fields(where, MULTI, spec, MULTI_FIELDS)
        return _multi(where, spec, allow_python)
    grader = GRADERS.find(kind)
    _check_fields(where, grader.name, spec, grader.fields, grader.optional)
    if grader.runs_source and not allow_python:
        raise ConfigError(
            f"{where}.type={kind!r} is not allowed here: it runs code from the request on this machine. The server's "
            "flag --allow-python-graders allows it."
        )
    return grader.build(where, spec)


def runs_source(spec: Mapping[str, Any]) -> bool:
    """Whether a grader, or one inside it, brings source text that runs on this machine."""
    # A multi grader cannot hold another one (`_multi`), so one level is enough.
    parts = spec.get("graders")
    specs = [spec, *(parts.values() if isinstance(parts, Mapping) else ())]
    kinds = [part.get("type") for part in specs if isinstance(part, Mapping)]
    return any(GRADERS.find(kind).runs_source for kind in kinds if kind != MULTI)


def _check_fields(
    where: str, kind: str, spec: Mapping[str, Any], needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    check_keys(f"field of {where} ({kind})", spec, ["type", "name", *needed, *optional])
    for name in ("name", *needed):
        if name not in spec:
            raise ConfigError(f"{where}.{name} is missing: a {kind} grader needs it.")
    if not isinstance(spec["name"], str) or not spec["name"]:
        reject(f"{where}.name", spec["name"], "a non-empty text")


def _multi(where: str, spec: Mapping[str, Any], allow_python: bool) -> MultiGrader:
    parts = spec["graders"]
    if not isinstance(parts, Mapping) or not parts:
        reject(f"{where}.graders", parts, 'graders by name, e.g. {"exact": {"type": "string_check", ...}}')
    if len(parts) > MAX_GRADERS:
        raise ConfigError(f"{where}.graders: at most {MAX_GRADERS} graders, not {len(parts)}.")
    for key, part in parts.items():
        if not isinstance(key, str) or not key.isidentifier():
            reject(f"{where}.graders", key, "names that calculate_output can use (letters, digits, _)")
        if isinstance(part, Mapping) and part.get("type") == "multi":
            raise ConfigError(f"{where}.graders.{key}.type='multi': a multi grader cannot hold another; flatten it.")
    graders = {key: _build(f"{where}.graders.{key}", part, allow_python) for key, part in parts.items()}
    return MultiGrader(
        spec["name"], graders, Formula.parse(f"{where}.calculate_output", spec["calculate_output"], graders)
    )
