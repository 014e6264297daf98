"""A JSON schema of recipes, from which editors complete and check: `# yaml-language-server: $schema=FILE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, get_origin

from vllm_zo.config import ZOTrainingConfig
from vllm_zo.entrypoints.cli.recipes.document import VARIABLE
from vllm_zo.entrypoints.cli.recipes.recipe import ENGINE, JOB, PARTS, RUN
from vllm_zo.options import Setting, options_of
from vllm_zo.registry import Registry

_VARIABLE = {"type": "string", "pattern": VARIABLE.pattern.replace("(?P<escape>", "(").replace("(?P<name>", "(")}


def recipe_schema() -> dict[str, Any]:
    """The schema (draft 2020-12), made from the fields of all options that a recipe may hold."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of vllm-zo train",
        "type": "object",
        "properties": {
            **{name: _value(setting) for name, setting in RUN.items()},
            **{kind: _part(kind, parts) for kind, parts in PARTS.items()},
            **{name: _value(setting) for name, setting in JOB.items()},
            ENGINE: {
                "type": "object",
                "description": "What training reserves in the engine, and any option of vLLM's LLM.",
                "properties": {name: _value(setting) for name, setting in options_of(ZOTrainingConfig).items()},
            },
        },
        "additionalProperties": False,
    }


def _value(setting: Setting) -> dict[str, Any]:
    """An option's values. A recipe may write a number as a text (YAML 1.1 tools do with 1e-3), or take a variable."""
    accepted = setting.json_schema()
    described = {"description": accepted.pop("description")}
    containers = _containers(setting)
    if not accepted and not containers:  # a part, which checks itself
        return described
    also: list[dict[str, Any]] = [accepted] if accepted else []
    also += [*containers, _VARIABLE]
    also += [{"const": setting.option.word}] if setting.option.word else []
    also += [{"type": "null"}] if setting.optional else []
    if setting.default is not None:
        described["default"] = setting.default if not isinstance(setting.default, tuple) else list(setting.default)
    return {**described, "anyOf": also}


def _containers(setting: Setting) -> list[dict[str, Any]]:
    """Lists and mappings. A mapping may also be a file that holds it, as for the flag."""
    origins = [get_origin(kind) for kind in setting.types]
    return [{"type": "array"}] * (Sequence in origins) + [{"type": ["object", "string"]}] * (Mapping in origins)


def _part(kind: str, parts: Registry[Any]) -> dict[str, Any]:
    names = list(parts)
    return {
        "description": f"The {kind}: its name, and its fields.",
        "anyOf": [
            {"enum": names},
            {"type": "object", "required": ["name"], "properties": {"name": {"enum": names}}},
        ],
        "allOf": [
            {
                "if": {"type": "object", "properties": {"name": {"const": name}}, "required": ["name"]},
                "then": _fields(name, parts[name]),
            }
            for name in names
        ],
    }


def _fields(name: str, part: Any) -> dict[str, Any]:
    known = options_of(part)
    return {
        "properties": {
            "name": {"const": name},
            **{f.name: _value(known[f.name]) if f.name in known else {} for f in fields(part)},
        },
        "required": ["name", *(f.name for f in fields(part) if _needed(f))],
        "additionalProperties": False,
    }


def _needed(f: Field[Any]) -> bool:
    return f.default is MISSING and f.default_factory is MISSING
