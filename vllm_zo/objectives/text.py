"""Text in, token ids out: prompt templates, and where a continuation starts in the tokens of prompt + continuation."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.objectives.base import ScoringSequence

MAX_TEMPLATE = 65_536
"""Characters of a template. Every example repeats them."""


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split "{sentence} It was" into (literal, field) pairs: [("", "sentence"), (" It was", None)].

    A field is the exact name of a column. "{a.b}" is the column "a.b", which flattened data sets have, and never a
    field of a field. "{a[0]}" would reach into objects, and "{a!r}" and "{a:>9}" would reformat, so they are refused.

    Raises:
        ConfigError: the template is no string, has no field or a stray brace, or has a field that is no plain name.
    """
    if not isinstance(template, str):
        raise ConfigError(f"template={template!r:.200}: expected a string such as '{{sentence}} It was'.")
    if len(template) > MAX_TEMPLATE:
        raise ConfigError(f"template: at most {MAX_TEMPLATE} characters, not {len(template)}.")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template={template!r:.200}: {error}; write {{{{ or }}}} for a literal brace.") from None
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not _is_plain(name)):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ConfigError(
                f"template={template!r:.200}: {{{shown}}} is not a plain field name such as {{sentence}}."
            )
    if all(name is None for _, name, _, _ in parts):
        raise ConfigError(
            f"template={template!r:.200}: no field; name the record's text field, e.g. '{{sentence}} It was'."
        )
    return [(literal, name) for literal, name, _, _ in parts]


def _is_plain(name: str) -> bool:
    """Whether it is a column name: neither a number ("{0}") nor access to an object's items or inner attributes."""
    parts = name.split(".")
    return all(part.strip() for part in parts) and not (
        name.isdigit() or any(c in name for c in "[]{}") or any(part.startswith("__") for part in parts)
    )


def render(template: str, example: Mapping[str, Any], where: str, *, strip: bool = True) -> str:
    """Fill a template. With `strip`, values lose surrounding white space, as by MeZO's `sentence.strip()`.

    Braces in a value mean nothing: the function never formats a value, it only inserts it.

    Raises:
        ConfigError: the record lacks a field, or its value is neither text nor a number.
    """
    out = []
    for literal, name in parse_template(template):
        out.append(literal)
        if name is not None:
            value = text_of(example, name, where)
            out.append(value.strip() if strip else value)
    return "".join(out)


def field_of(example: Mapping[str, Any], name: str, where: str) -> Any:
    """`example[name]`.

    Raises:
        ConfigError: the record has no such field (the message lists those it has), or the field has no value: null, or
            the NaN that pandas writes for it.
    """
    if name in example:
        if is_missing(value := example[name]):
            raise ConfigError(f"{where}: field {name!r} has no value ({value}); fill it in, or leave the row out.")
        return value
    outer, dot, _ = name.partition(".")
    if dot and isinstance(example.get(outer), Mapping):
        raise ConfigError(
            f"{where}: no field {name!r}, and fields of fields are not read: write what {outer!r} holds into a column "
            f"of that name, {name!r}, or another."
        )
    raise ConfigError(f"{where}: no field {name!r}; the record has {', '.join(map(repr, example)) or 'no fields'}.")


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(example: Mapping[str, Any], name: str, where: str) -> str:
    """`example[name]` as text. The value may be text or a number.

    Raises:
        ConfigError: see `field_of` and `as_text`.
    """
    return as_text(field_of(example, name, where), f"{where}: field {name!r}")


def as_text(value: Any, what: str) -> str:
    """A text as it is, or a number as text.

    Raises:
        ConfigError: the value is something else. The message calls it `what`.
    """
    # `bool` is an `int` in Python, and "True" in a prompt is hardly what the data meant.
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{what} is {value!r:.60}, expected text or a number.")
    return str(value)


def tokenise(
    texts: Sequence[str], tokenizer: Any, bos_token_id: int | None = None, special_tokens: bool = True
) -> list[list[int]]:
    """The token ids of every text.

    With `special_tokens` a text starts as the tokenizer starts it; `bos_token_id` starts it with another token. Some
    tokenizers, such as T5's, also end every text with </s>. This function cuts that off, because the model has to
    continue a prompt, and the objective says how a completion ends.
    """
    if special_tokens and bos_token_id is None:
        ended = _tokens_at_end(tokenizer)
        return [list(ids[: len(ids) - ended]) for ids in tokenizer(list(texts))["input_ids"]]
    plain = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    start = [] if bos_token_id is None else [bos_token_id]
    return [[*start, *ids] for ids in plain]


@lru_cache(maxsize=8)
def _tokens_at_end(tokenizer: Any) -> int:
    """How many special tokens the tokenizer puts behind a text."""
    # Measured on a text, because tokenizers have no common attribute for it.
    whole, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(plain), -1, -1)
    at = next((start for start in starts if whole[start : start + len(plain)] == plain), len(whole) - len(plain))
    return len(whole) - at - len(plain)


def ended(ids: list[int], tokenizer: Any) -> list[int]:
    """The tokens with the tokenizer's EOS behind them, once.

    Raises:
        ConfigError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("append_eos=True, but the tokenizer has no EOS token; use append_eos=False.")
    # A text may bring its own EOS. A second one would teach the model to write two.
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def trim(text: str) -> str:
    """The text without white space in front and without spaces behind, as in MeZO. A line feed behind it stays."""
    return text.lstrip().rstrip(" ")


def join_prompt(stem: str, separator: str, continuation: str) -> str:
    """stem + separator + continuation, or stem + continuation if the stem already ends with white space."""
    return stem + continuation if stem[-1:].isspace() else stem + separator + continuation


def continuation_sequence(stem: Sequence[int], full: Sequence[int], text: str, where: str) -> ScoringSequence:
    """The sequence (kind "logprobs") that scores the tokens that `full` adds to `stem`.

    Raises:
        ConfigError: see `continuation_start`.
    """
    # The last token is scored but not fed: its own next-token scores are not needed. A token's score is read one
    # position before it.
    start = continuation_start(stem, full, text, where)
    return ScoringSequence(tuple(full[:-1]), tuple(range(start - 1, len(full) - 1)), tuple(full[start:]), "logprobs")


def continuation_start(stem: Sequence[int], full: Sequence[int], text: str, where: str) -> int:
    """The index of the continuation's first token in `full`, which holds the tokens of stem + continuation.

    That is the first token at which `stem` and `full` differ. If the tokenizer merges text across the boundary ("was" +
    "h" is the token "wash"), the merged token counts as continuation. If not, the index is `len(stem)`, as in MeZO.

    Raises:
        ConfigError: the continuation adds no token, or no token precedes it, from which the model could predict it.
    """
    start = next((i for i, (a, b) in enumerate(zip(stem, full, strict=False)) if a != b), min(len(stem), len(full)))
    if start == len(full):
        raise ConfigError(f"{where}: {text!r:.60} adds no token to the prompt; use a longer continuation.")
    if start == 0:
        raise ConfigError(
            f"{where}: no token precedes {text!r:.60}, and the tokenizer adds no BOS: the prompt must not be empty."
        )
    return start
