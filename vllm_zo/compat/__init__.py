"""How this package changes vLLM at run time: recorded, guarded patches (registry.py).

Each part of the package declares its patches in its own `patches.py`, beside the code that the patches put in; those of
EngineCore are here (engine_core.py). seams.py lists everything in vLLM that the package relies on, and moved.py finds
names that vLLM has moved.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_zo.compat.registry import PatchConflictError


def require(*installs: Callable[[], None]) -> None:
    """Apply patches that training cannot do without.

    The scheduler and the worker each apply the ones they need, and do not rely on our plugin: `VLLM_PLUGINS` is a list
    of the plugins that vLLM loads, and may leave ours out. Applying a patch twice does no harm.

    Raises:
        PatchConflictError: the installed vLLM lacks an attribute, or another plugin has replaced it.
    """
    try:
        for install in installs:
            install()
    except (ImportError, AttributeError) as error:
        raise PatchConflictError(f"it lacks what is to be patched ({error}); run `vllm-zo doctor`") from error
