"""Functions of a user by name, because a job crosses processes as JSON.

A function has the name `module:function`, and the other side imports it. A function that cannot be imported (a lambda,
or a function of the running script) gets a name that holds in this process only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.validation import reject

LOCAL = "local:"
"""Start of the name of a function that only this process knows."""
_local: dict[str, Callable[..., Any]] = {}


def name_of(function: Callable[..., Any]) -> str:
    """`module:function` if an import gives this very function, or else a name that holds in this process only."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module not in (None, "__main__") and getattr(sys.modules.get(str(module)), str(name), None) is function:
        return f"{module}:{name}"
    local = f"{LOCAL}{name or type(function).__name__}-{len(_local)}"
    local = next((known for known, other in _local.items() if other is function), local)
    _local[local] = function
    return local


def check_name(what: str, name: str, other: str = "") -> None:
    """Refuse anything but `module:function`, without importing the module.

    Args:
        what: the field that holds the name.
        other: what the field accepts besides, for the message.

    Raises:
        ConfigError: the name leads into a module's attributes, or is no name.
    """
    module, _, function = name.partition(":")
    if not name.startswith(LOCAL) and not (module and function.isidentifier()):
        reject(what, name, f"'module:function', with a function that the module defines{other}")


def find(what: str, name: str) -> Any:
    """What is behind a name.

    Raises:
        ConfigError: there is no such object, or the module does not define it itself.
    """
    if name.startswith(LOCAL):
        if name not in _local:
            raise ConfigError(
                f"{what}={name!r} is a function of another process: put it into a module that the engine can import "
                "(the script itself is not one), or run the engine in process (VLLM_ENABLE_V1_MULTIPROCESSING=0)."
            )
        return _local[name]
    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{what}={name!r} cannot be imported: {error}.") from None
    # A module's imports are not its functions. The name in a job must say in which module the code is.
    defined = getattr(found, "__module__", module)
    if callable(found) and defined != module:
        raise ConfigError(f"{what}={name!r} is defined in {defined}: name it by that module.")
    return found
