"""Text in, token ids out: prompt templates, and where a continuation starts in the tokens of prompt + continuation."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import ScoringRow


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split "{sentence} It was" into (literal, field) pairs: [("", "sentence"), (" It was", None)].

    Only plain field names are accepted: "{a.b}" and "{a[0]}" would reach into objects, "{a!r}" and "{a:>9}" reformat.

    Raises:
        ConfigError: not a string, no field at all, a stray brace, or a field that is not a plain name.
    """
    if not isinstance(template, str):
        raise ConfigError(f"template={template!r}: expected a string such as '{{sentence}} It was'.")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template={template!r}: {error}; write {{{{ or }}}} for a literal brace.") from None
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not _is_plain(name)):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ConfigError(f"template={template!r}: {{{shown}}} is not a plain field name such as {{sentence}}.")
    if all(name is None for _, name, _, _ in parts):
        raise ConfigError(f"template={template!r}: no field; name the record's text field, e.g. '{{sentence}} It was'.")
    return [(literal, name) for literal, name, _, _ in parts]


def _is_plain(name: str) -> bool:
    """Any column name but numbers ("{0}") and what `str.format` would take for attribute or index access."""
    return bool(name.strip()) and not name.isdigit() and not any(c in name for c in ".[]{}")


def render(template: str, example: Mapping[str, Any], where: str, *, strip: bool = True) -> str:
    """Fill a template. String values lose surrounding white space, as MeZO's `sentence.strip()` does, with `strip`.

    Values are inserted as they are: braces in them mean nothing.

    Raises:
        ConfigError: a field that the record lacks, or whose value is neither text nor a number.
    """
    out = []
    for literal, name in parse_template(template):
        out.append(literal)
        if name is not None:
            value = field_of(example, name, where)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ConfigError(f"{where}: field {name!r} is {value!r:.60}, expected text or a number.")
            out.append(str(value).strip() if strip else str(value))
    return "".join(out)


def field_of(example: Mapping[str, Any], name: str, where: str) -> Any:
    """`example[name]`.

    Raises:
        ConfigError: the record has no such field; the message lists those it has.
    """
    if name not in example:
        raise ConfigError(f"{where}: no field {name!r}; the record has {', '.join(map(repr, example)) or 'no fields'}.")
    return example[name]


def text_of(example: Mapping[str, Any], name: str, where: str) -> str:
    """`example[name]`, which must be a string."""
    value = field_of(example, name, where)
    if not isinstance(value, str):
        raise ConfigError(f"{where}: field {name!r} is {value!r:.60}, expected text.")
    return value


def tokenise(
    texts: Sequence[str], tokenizer: Any, bos_token_id: int | None = None, special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of every text, with the tokenizer's own special tokens (or without), or `bos_token_id` in their
    place."""
    if special_tokens and bos_token_id is None:
        return [list(ids) for ids in tokenizer(list(texts))["input_ids"]]
    plain = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    start = [] if bos_token_id is None else [bos_token_id]
    return [[*start, *ids] for ids in plain]


def trim(text: str) -> str:
    """As MeZO: no white space in front, no spaces behind."""
    return text.lstrip().rstrip(" ")


def join_prompt(stem: str, separator: str, continuation: str) -> str:
    """stem + separator + continuation, where the stem does not already end with white space."""
    return stem + continuation if stem[-1:].isspace() else stem + separator + continuation


def continuation_row(stem: Sequence[int], full: Sequence[int], text: str, where: str) -> ScoringRow:
    """The row that scores what `full` adds to `stem`; its last token is scored but not fed. Raises as below."""
    start = continuation_start(stem, full, text, where)
    return ScoringRow(tuple(full[:-1]), tuple(range(start - 1, len(full) - 1)), tuple(full[start:]), "logprobs")


def continuation_start(stem: Sequence[int], full: Sequence[int], text: str, where: str) -> int:
    """Index in `full` of the first token of the continuation, `full` being the tokens of stem + continuation.

    That is the first token at which the two differ. Where the boundary merges ("was" + "h" is the token "wash") the
    merged token counts as continuation; where it does not, this is `len(stem)`, as in MeZO.

    Raises:
        ConfigError: the continuation adds no token, or there is nothing in front of it to predict it from.
    """
    start = next((i for i, (a, b) in enumerate(zip(stem, full, strict=False)) if a != b), min(len(stem), len(full)))
    if start == len(full):
        raise ConfigError(f"{where}: {text!r:.60} adds no token to the prompt; use a longer continuation.")
    if start == 0:
        raise ConfigError(
            f"{where}: no token precedes {text!r:.60}, and the tokenizer adds no BOS: the prompt must not be empty."
        )
    return start
