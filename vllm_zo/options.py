"""An option of a job. Its dataclass field declares everything once: type, default, range, help text and heading.

    steps: int = option(1000, minimum=0, panel="Optimisation", help="Optimiser steps; 0 evaluates only.")

The field gives the check when an object is made (`check_options`), the flag of `vllm-zo train`
(entrypoints/cli/flags.py) and the hyperparameter in the server's schema (entrypoints/server/jobs/request.py). A
subclass that gives the field another default keeps the rest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vllm_zo.validation import check_bool, check_int, check_known, read_float, read_int, reject

_KEY = "option"


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a field declares besides its type and default.

    Attributes:
        help: one sentence for the command line and the server's schema.
        panel: heading of the flag in `vllm-zo train --help`. An empty panel means that there is no flag.
        minimum, maximum: the accepted range, ends included.
        above, below: the accepted range, ends not included.
        choices: accepted texts or integers.
        word: a text that is accepted in place of a number ("auto").
        text: describes what a text names ("a directory"); such a text must not be empty.
        fix: the advice in error messages.
        flag: name of the flag if it is not the field's ("option" for `options`, "keep-best/--keep-last").
        metavar: name of the flag's value in the help text; for a value with a syntax, also the syntax.
        unsaid: a description leaves it out where it has its default (`registry.settings`): for an option that files of
            older versions lack, so that they still agree with what is made now.
    """

    help: str
    panel: str = ""
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Collection[Any] = ()
    word: str = ""
    text: str = ""
    fix: str = ""
    flag: str = ""
    metavar: str = ""
    unsaid: bool = False


def option(default: Any = MISSING, *, factory: Any = MISSING, hash: bool | None = None, **of_option: Any) -> Any:
    """Make a dataclass field that is an option.

    Args:
        default, factory, hash: as for `dataclasses.field`.
        of_option: the arguments of `Option`.
    """
    given = {"default": default} if factory is MISSING else {"default_factory": factory}
    return field(**given, hash=hash, metadata={_KEY: Option(**of_option)})


def is_unsaid(of: Field[Any]) -> bool:
    """Whether a field is an option that a description leaves out where it has its default."""
    found: Option | None = of.metadata.get(_KEY)
    return found is not None and found.unsaid


@dataclass(frozen=True)
class Setting:
    """A field that is an option.

    Attributes:
        name: of the field.
        types: `int`, `float`, `str`, `bool`, or classes that check their own values.
        optional: whether None is accepted.
        default: the default, or None if there is none or a factory makes it.
        option: what the field declares.
    """

    name: str
    types: tuple[Any, ...]
    optional: bool
    default: Any
    option: Option

    def checked(self, called: str, value: Any) -> Any:
        """The value in the field's type: a text that holds a number becomes the number.

        Args:
            called: name of the field in messages, for example "lozo.eps".

        Raises:
            ConfigError: the value has another type, or is out of range. The message names the field, the value, what is
                accepted and the fix.
        """
        option = self.option
        if (value is None and self.optional) or (option.word and value == option.word):
            return value
        if option.choices and int in self.types:
            value = read_int(called, value)
            if isinstance(value, bool) or value not in option.choices:  # True equals 1
                reject(called, value, f"one of {', '.join(map(str, option.choices))}", option.fix)
        elif option.choices:
            check_known(called, value, option.choices)
        elif bool in self.types:
            check_bool(called, value)
        elif float in self.types:
            ends = {"at_least": option.minimum, "above": option.above, "below": option.below, "at_most": option.maximum}
            return read_float(called, value, **{k: v for k, v in ends.items() if v is not None}, fix=option.fix)
        elif int in self.types:
            value = read_int(called, value)
            at_least = -math.inf if option.minimum is None else option.minimum
            check_int(called, value, at_least, option.maximum, option.fix)
        elif self.types == (str,):
            self._check_text(called, value)
        return value

    def _check_text(self, called: str, value: Any) -> None:
        what = self.option.text
        if not isinstance(value, str) or (what and not value):
            expected = f"{what} as a non-empty string" if what else "a text"
            reject(called, value, expected + (", or None" if self.optional else ""), self.option.fix)

    def json_schema(self) -> dict[str, Any]:
        """The accepted values, as a JSON schema."""
        option = self.option
        kind = next((json for type, json in _JSON_TYPES.items() if type in self.types), None)
        value: dict[str, Any] = {} if kind is None else {"type": kind}
        ends = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
        given = (option.minimum, option.maximum, option.above, option.below)
        value |= {end: bound for end, bound in zip(ends, given, strict=True) if bound is not None}
        if option.choices:
            value["enum"] = list(option.choices)
        return {**value, "description": option.help}


_JSON_TYPES = {bool: "boolean", float: "number", int: "integer", str: "string"}
"""In this order: a field that accepts both float and int is a number."""


@functools.cache
def options_of(owner: type) -> dict[str, Setting]:
    """The options of a dataclass by name, in the order of its fields."""
    hints = get_type_hints(owner)
    found = {}
    for f in fields(owner):
        declared = next(_declarations(owner, f.name), None)
        if declared is not None:
            types = _types(hints[f.name])
            default = None if f.default is MISSING else f.default
            optional = type(None) in types
            found[f.name] = Setting(f.name, tuple(t for t in types if t is not type(None)), optional, default, declared)
    return found


def _declarations(owner: type, name: str) -> Iterator[Option]:
    """The options that a class and its bases declare for a field, nearest first. `rank: int = 8` in a subclass declares
    a new default and no option."""
    for base in owner.__mro__:
        f = base.__dict__.get("__dataclass_fields__", {}).get(name)
        if f is not None and _KEY in f.metadata:
            yield f.metadata[_KEY]


def _types(hint: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation. A Literal counts as text."""
    # `int | None` and `Optional[int]` are of different types, and both are unions.
    parts = get_args(hint) if get_origin(hint) in (Union, type(int | None)) else (hint,)
    return tuple(str if get_origin(part) is Literal else part for part in parts)


def check_options(owner: Any, prefix: str = "") -> None:
    """Check every option of a dataclass object, and replace texts that hold a number by the number.

    Args:
        owner: the object; its `__post_init__` calls this.
        prefix: comes before the fields' names in messages, for example "lozo.".

    Raises:
        ConfigError: an option is not acceptable; the message is about the first one.
    """
    for name, setting in options_of(owner.__class__).items():
        value = getattr(owner, name)
        checked = setting.checked(f"{prefix}{name}", value)
        if checked is not value:
            object.__setattr__(owner, name, checked)  # the dataclass may be frozen
