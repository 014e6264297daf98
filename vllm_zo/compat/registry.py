"""How this package changes vLLM at run time: a few recorded, guarded patches, one file a seam.

Every patch says what, why, how and when it can go. It is applied once per process, steps aside where vLLM does the same
by itself (with the series of `patches/` applied, or one day in a release), and refuses an attribute that somebody else
has already replaced.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import logging
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

from vllm_zo.errors import ZOError

logger = logging.getLogger("vllm.zo.compat")

_MARK = "_vllm_zo_patch"


class PatchConflictError(ZOError, RuntimeError):
    """The attribute to patch is not vLLM's own any more."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One change to one attribute of vLLM.

    Attributes:
        target: "module:Class.attribute"; a last part with a star stands for new attributes.
        why: the symptom without it.
        how: what the replacement does.
        upstream: related upstream issue or pull request.
        remove_when: when this file can be deleted.
        series: the file of `patches/` that makes the change in vLLM's own tree, or why there is none ("none: ...").
        built_in: a feature, named like a target, by which to know that vLLM needs the patch no more.
        optional: a vLLM that lacks the target has no need of the patch.
        checked_on: vLLM versions it was tried on.
    """

    target: str
    why: str
    how: str
    upstream: str
    remove_when: str
    series: str
    built_in: str | None = None
    optional: bool = False
    checked_on: str = "0.30.0, 0.31.0, 0.32.0"

    def unneeded(self) -> bool:
        """Whether the installed vLLM does this by itself. Looks for the feature, not at the version."""
        return (self.built_in is not None and exists(self.built_in)) or (self.optional and not exists(self.target))

    def apply(self, owner: Any, name: str, replacement: Any, *, adds: bool = False) -> None:
        """Set `owner.name` to `replacement`; nothing where vLLM needs it no more, or a second time. `adds` is for a new
        attribute; it must not exist.

        Raises:
            PatchConflictError: the attribute is missing, already there, or came from outside vLLM.
        """
        current = owner.__dict__.get(name)
        function = getattr(current, "__func__", current)
        mark = getattr(function, _MARK, None)
        if mark == self.target:
            return
        if self.unneeded():
            logger.debug("%s is not patched: this vLLM has %s", self.target, self.built_in)
            return
        where = f"{owner.__name__}.{name}"
        if mark is not None:
            raise PatchConflictError(f"{self.target}: vllm_zo itself has replaced {where} already, for {mark}")
        if adds and current is not None:
            raise PatchConflictError(f"{self.target}: {where} exists already ({_origin(current)}); {_advice(current)}")
        if not adds and current is None:
            raise PatchConflictError(f"{self.target}: not found in the installed vLLM; run `vllm-zo doctor`")
        if not adds and not _is_vllms(function):
            raise PatchConflictError(f"{self.target}: {_origin(function)} has replaced {where}; {_advice(function)}")
        setattr(getattr(replacement, "__func__", replacement), _MARK, self.target)
        setattr(owner, name, replacement)
        logger.debug("patched %s: %s", self.target, self.why)


def patches_in(package: ModuleType) -> Iterator[Patch]:
    """Every patch that a module of the package `compat` declares."""
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(found.name)
        yield from (value for value in vars(module).values() if isinstance(value, Patch))


def resolve(target: str) -> tuple[Any, str]:
    """The owner and the attribute's name of "module:Class.attribute".

    Raises:
        ImportError, AttributeError: the module or the class is not there.
    """
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    return owner, name


def exists(target: str) -> bool:
    """Whether the installed vLLM has the attribute; a module's function finds builtins by name too."""
    try:
        owner, name = resolve(target)
    except (ImportError, AttributeError):
        return False
    return "*" in name or hasattr(owner, name) or (inspect.ismodule(owner) and hasattr(builtins, name))


def _code_module(value: Any) -> str:
    """Where a function was written: `functools.wraps` copies `__module__`, but not the globals."""
    namespace = getattr(value, "__globals__", None) or {}
    return str(namespace.get("__name__") or getattr(value, "__module__", "vllm"))


def _is_vllms(value: Any) -> bool:
    return _code_module(value).partition(".")[0] in ("vllm", "torch")  # torch: its decorators


def _origin(value: Any) -> str:
    module = _code_module(value)
    package = module.partition(".")[0]
    distributions = metadata.packages_distributions().get(package, [])
    return f"{module} (package {', '.join(distributions)})" if distributions else module


def _advice(value: Any) -> str:
    return (
        f"two plugins cannot both replace it. Start without one of them: list the plugins you want, and not "
        f"{_code_module(value).partition('.')[0]}'s, in VLLM_PLUGINS, or uninstall it."
    )
