"""Options that several objectives share."""

from __future__ import annotations

from dataclasses import MISSING
from typing import Any

from vllm_zo.options import option

PANEL = "Data and objective"
"""The heading of an objective's flags in `vllm-zo train --help`."""


def template_option(default: Any = MISSING) -> Any:
    """The option `template`. The values of its fields lose surrounding white space (`text.render`)."""
    return option(default, panel=PANEL, help='Prompt with {field} placeholders: "{sentence} It was".')


def prompt_field_option() -> Any:
    return option(
        "prompt", text="the name of a field", panel=PANEL, help="language-modeling, preference: field with the prompt."
    )


def label_field_option() -> Any:
    return option("label", text="the name of a field", panel=PANEL, help="Field that holds the class.")


def bos_option() -> Any:
    fix = "None keeps the tokenizer's own"
    return option(None, minimum=0, fix=fix, help="Token that starts every prompt, instead of the tokenizer's own.")


def special_tokens_option() -> Any:
    return option(True, help="Start prompts as the tokenizer starts them.")
