"""Which modules a job perturbs, by Hugging Face module name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vllm_zo.errors import ConfigError
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
"""Of the linear layers; the last two of the one module that is called so."""
_KIND_OF_PRESET = {name: name if name in (EMBEDDINGS, LM_HEAD) else LINEAR for name in PRESETS}
_IN_A_LAYER = re.compile(r"\.\d+\.")


def kind_of(name: str) -> str:
    """LINEAR for a module of a numbered layer; LM_HEAD; EMBEDDINGS for what else a job can train.

    Example:
        >>> kind_of("model.embed_tokens"), kind_of("lm_head"), kind_of("model.layers.0.mlp.up_proj")
        ('embeddings', 'lm_head', 'linear')
    """
    if _IN_A_LAYER.search(name):
        return LINEAR
    return LM_HEAD if name.rpartition(".")[2] == LM_HEAD else EMBEDDINGS


def target_pattern(target_modules: str) -> re.Pattern[str]:
    """The pattern behind a preset's name or a regular expression.

    Raises:
        ConfigError: not a string, or not a regular expression.
    """
    if not isinstance(target_modules, str) or not target_modules:
        reject("target_modules", target_modules, f"one of {', '.join(PRESETS)} or a regular expression")
    try:
        return re.compile(PRESETS.get(target_modules, target_modules))
    except re.error as error:
        raise ConfigError(
            f"target_modules={target_modules!r}: not a regular expression ({error}); "
            f"expected one of {', '.join(PRESETS)} or an expression such as '.*\\.(q_proj|v_proj)'."
        ) from error


def select_modules(target_modules: str, names: Iterable[str]) -> list[str]:
    """The names in scope, in the order given. An expression must match the *whole* name, as `peft` has it.

    Example:
        >>> select_modules("attention", ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "lm_head"])
        ['model.layers.0.self_attn.q_proj']

    Args:
        names: what can be trained: linear modules of numbered layers such as "model.decoder.layers.0.self_attn.q_proj",
            and embeddings and head where vLLM's LoRA carries them.

    Raises:
        ConfigError: nothing matches; the message shows names of the model.
    """
    names = list(names)
    pattern, kind = target_pattern(target_modules), _KIND_OF_PRESET.get(target_modules)
    selected = [name for name in names if pattern.fullmatch(name) and kind in (None, kind_of(name))]
    if selected:
        return selected
    if kind in (EMBEDDINGS, LM_HEAD):
        raise ConfigError(
            f"target_modules={target_modules!r}: vLLM's LoRA does not carry that module of this model (its class has "
            "no `embedding_modules`, or adapters are limited to other modules); choose linear layers."
        )
    shown = ", ".join(names[:3]) or "none"
    raise ConfigError(f"target_modules={target_modules!r}: matches no module; expected whole names such as {shown}.")
