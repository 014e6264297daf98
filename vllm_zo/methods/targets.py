"""Which modules a job perturbs, by their Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.expressions import compile_expression
from vllm_zo.methods.layers import layer_of, select_layers
from vllm_zo.methods.plan import ModuleShape
from vllm_zo.validation import reject

LINEAR, EMBEDDINGS, LM_HEAD = "linear", "embeddings", "lm_head"
_ATTENTION = r"(self_attn|self_attention|attention|attn)"
PRESETS = {
    "all-linear": r".*",
    "attention": rf".*\.{_ATTENTION}\..*",
    "mlp": rf"(?!.*\.{_ATTENTION}\.).*",
    EMBEDDINGS: r".*",
    LM_HEAD: r".*",
}
"""Patterns over module names. The first three select linear layers. `embeddings` and `lm_head` select the modules of
that kind, so their patterns match any name (`select_modules` compares the kind)."""
_KIND_OF_PRESET = {name: name if name in (EMBEDDINGS, LM_HEAD) else LINEAR for name in PRESETS}

_NO_ADAPTERS = {
    EMBEDDINGS: "its class lists none in `embedding_modules`",
    LM_HEAD: "the embeddings are its head as well, or the head is quantised",
}


def kind_of(name: str) -> str:
    """LINEAR for a module of a numbered layer, LM_HEAD for the head, EMBEDDINGS for any other module a job can train.

    Example:
        >>> kind_of("model.embed_tokens"), kind_of("lm_head"), kind_of("model.layers.0.mlp.up_proj")
        ('embeddings', 'lm_head', 'linear')
    """
    if layer_of(name) is not None:
        return LINEAR
    return LM_HEAD if name.rpartition(".")[2] == LM_HEAD else EMBEDDINGS


def target_pattern(target_modules: str) -> Any:
    """The pattern that a preset's name or a regular expression stands for. It has `fullmatch`.

    An expression may come from a client of a server, and the engine matches it. So it goes to RE2, which takes time
    linear in the text; `re` can take exponential time, and would stop the engine.

    Raises:
        ConfigError: it is no string, or no regular expression.
    """
    if not isinstance(target_modules, str) or not target_modules:
        reject("target_modules", target_modules, f"one of {', '.join(PRESETS)} or a regular expression")
    # Our own patterns are safe for `re`. RE2 has no look-ahead, which "mlp" needs.
    if target_modules in PRESETS:
        return re.compile(PRESETS[target_modules])
    try:
        return compile_expression("target_modules", target_modules)
    except ConfigError as error:
        raise ConfigError(
            f"{error} Expected one of {', '.join(PRESETS)} or an expression such as '.*\\.(q_proj|v_proj)'."
        ) from None


def select_modules(target_modules: str, names: Iterable[str], target_layers: str | None = None) -> list[str]:
    """The names that a job trains, in the order given. An expression must match the *whole* name, as in `peft`.

    Example:
        >>> select_modules("attention", ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "lm_head"])
        ['model.layers.0.self_attn.q_proj']

    Args:
        names: the modules that a job can train: linear ones of numbered layers, such as
            "model.decoder.layers.0.self_attn.q_proj", and embeddings and head where vLLM's LoRA carries them.
        target_layers: which of the numbered layers (methods/layers.py); None for all. It does not limit embeddings and
            LM head.

    Raises:
        ConfigError: nothing matches. The message shows names of the model.
    """
    names = list(names)
    pattern, kind = target_pattern(target_modules), _KIND_OF_PRESET.get(target_modules)
    selected = [name for name in names if pattern.fullmatch(name) and kind in (None, kind_of(name))]
    if selected:
        return selected if target_layers is None else _in_layers(selected, target_layers, names)
    if kind in _NO_ADAPTERS:
        raise ConfigError(
            f"target_modules={target_modules!r}: vLLM has no adapters for that module of this model "
            f"({_NO_ADAPTERS[kind]}, or `lora_target_modules` leaves it out); choose linear layers."
        )
    shown = ", ".join(names[:3]) or "none"
    raise ConfigError(f"target_modules={target_modules!r}: matches no module; expected whole names such as {shown}.")


def select_shapes(
    target_modules: str, shapes: Iterable[ModuleShape], target_layers: str | None = None
) -> list[ModuleShape]:
    """`select_modules` for modules with their sizes. Raises ConfigError: nothing matches."""
    shapes = list(shapes)
    chosen = set(select_modules(target_modules, [shape.name for shape in shapes], target_layers))
    return [shape for shape in shapes if shape.name in chosen]


def _in_layers(selected: list[str], target_layers: str, names: list[str]) -> list[str]:
    count = 1 + max((number for name in names if (number := layer_of(name)) is not None), default=-1)
    layers = select_layers(target_layers, count) | {None}
    kept = [name for name in selected if layer_of(name) in layers]
    if not any(kind_of(name) == LINEAR for name in kept):
        raise ConfigError(
            f"target_layers={target_layers!r}: the modules that target_modules names are not in these layers; choose "
            "other layers or modules."
        )
    return kept
