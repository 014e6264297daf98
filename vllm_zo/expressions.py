"""Regular expressions of clients. RE2 matches them, in a time linear in the text for every expression."""

from __future__ import annotations

from typing import Any

import re2

from vllm_zo.errors import ConfigError

MAX_LENGTH = 1000
"""Characters that an expression may have."""


def compile_expression(field: str, expression: Any) -> Any:
    """Compile an expression. The result has `search` and `fullmatch`, as those of `re`.

    Args:
        field: name of the setting in messages, for example "target_modules".
        expression: as the client gave it.

    Raises:
        ConfigError: the expression is no text, is too long, or is not one of RE2, which has no look-around and no
            back-references.
    """
    if not isinstance(expression, str):
        raise ConfigError(f"{field}={expression!r:.60}: expected a regular expression, as a text.")
    if len(expression) > MAX_LENGTH:
        raise ConfigError(f"{field}: at most {MAX_LENGTH} characters, not {len(expression)}.")
    options = re2.Options()
    options.log_errors = False  # otherwise RE2 writes to the terminal by itself
    try:
        return re2.compile(expression, options)
    except re2.error as error:
        why = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        raise ConfigError(
            f"{field}={expression!r:.200}: not a regular expression of RE2 ({why}); it has no look-around and no "
            "back-references."
        ) from None
