"""Which linear modules a job perturbs, by Hugging Face module name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vllm_zo.errors import ConfigError
from vllm_zo.validation import reject

_ATTENTION = r"(self_attn|self_attention|attention|attn)"
PRESETS = {
    "all-linear": r".*",
    "attention": rf".*\.{_ATTENTION}\..*",
    "mlp": rf"(?!.*\.{_ATTENTION}\.).*",
}
_SLOT = "a ZO slot holds linear layers: vLLM 0.32 would need a factor of vocabulary x rank for every probe"
_HEAD = "members are scored by the head's own rows of their labels, which an adapter on the head does not reach"
REFUSED = {"embeddings": _SLOT, "embed_tokens": _SLOT, "lm_head": _HEAD, "lm-head": _HEAD}
"""Scopes people ask for that cannot be trained, with the reason."""
_IN_A_LAYER = re.compile(r"\.\d+\.")


def target_pattern(target_modules: str) -> re.Pattern[str]:
    """The pattern behind a preset's name or a regular expression.

    Raises:
        ConfigError: not a string, or not a regular expression.
    """
    if not isinstance(target_modules, str) or not target_modules:
        reject("target_modules", target_modules, f"one of {', '.join(PRESETS)} or a regular expression")
    if target_modules in REFUSED:
        raise ConfigError(
            f"target_modules={target_modules!r}: cannot be trained ({REFUSED[target_modules]}); "
            f"expected one of {', '.join(PRESETS)} or a regular expression."
        )
    try:
        return re.compile(PRESETS.get(target_modules, target_modules))
    except re.error as error:
        raise ConfigError(
            f"target_modules={target_modules!r}: not a regular expression ({error}); "
            f"expected one of {', '.join(PRESETS)} or an expression such as '.*\\.(q_proj|v_proj)'."
        ) from error


def select_modules(target_modules: str, names: Iterable[str]) -> list[str]:
    """The names in scope, in the order given. An expression must match the *whole* name, as `peft` has it.

    Only modules of the numbered layers come into question: embeddings, their projections and heads are left alone.

    Example:
        >>> select_modules("attention", ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "lm_head"])
        ['model.layers.0.self_attn.q_proj']

    Args:
        names: linear modules of the model, e.g. "model.decoder.layers.0.self_attn.q_proj".

    Raises:
        ConfigError: nothing matches; the message shows names of the model.
    """
    candidates = [name for name in names if _IN_A_LAYER.search(name)]
    pattern = target_pattern(target_modules)
    selected = [name for name in candidates if pattern.fullmatch(name)]
    if not selected:
        shown = ", ".join(candidates[:3]) or "none"
        raise ConfigError(
            f"target_modules={target_modules!r}: matches no linear module; expected whole names such as {shown}."
        )
    return selected
