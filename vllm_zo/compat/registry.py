"""Patches of vLLM at run time: a few recorded and guarded changes of classes, modules and objects.

Every patch states what it changes, why, how, and when it can be deleted. It is applied once. It does nothing if vLLM
has the feature already, because the series of `patches/` is applied or the release is a later one. It refuses an
attribute that another package has replaced.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from vllm_zo.errors import ZOError

logger = logging.getLogger("vllm.zo.compat")

DECLARED_IN = (
    "vllm_zo.compat.engine_core",
    "vllm_zo.engine.patches",
    "vllm_zo.worker.patches",
    "vllm_zo.worker.cpu.patches",
    "vllm_zo.worker.cuda.patches",
    "vllm_zo.entrypoints.llm.patches",
    "vllm_zo.entrypoints.server.patches",
)
"""Modules that declare patches. They are named, not imported, because they import this module."""
_MARK = "_vllm_zo_patch"
"""Attribute that marks our replacements; its value is the patch's target."""


class PatchConflictError(ZOError, RuntimeError):
    """The attribute to patch is missing, or another package has replaced it."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One change to one attribute of vLLM.

    Attributes:
        target: "module:Class.attribute"; a star in the last part stands for new attributes.
        why: the symptom without the patch.
        how: what the replacement does.
        upstream: related upstream issue or pull request.
        remove_when: when the patch can be deleted.
        series: the file of `patches/` that makes the change in vLLM's own tree, or why there is none ("none: ...").
        built_in: if vLLM has this (see `exists`), it does not need the patch.
        optional: whether a vLLM that lacks the target does not need the patch.
    """

    target: str
    why: str
    how: str
    upstream: str
    remove_when: str
    series: str
    built_in: str | None = None
    optional: bool = False

    def unneeded(self) -> bool:
        """Whether the installed vLLM does not need the patch. The feature decides, not the version."""
        return (self.built_in is not None and exists(self.built_in)) or (self.optional and not exists(self.target))

    def apply(self, owner: Any, name: str, replacement: Any, *, adds: bool = False) -> None:
        """Set `name` of a class or module to `replacement`. Do nothing if vLLM does not need the patch, or if it is
        applied already.

        Args:
            adds: whether the attribute is new, and must not exist yet.

        Raises:
            PatchConflictError: the attribute is missing, already there, or came from outside vLLM.
        """
        # Not `getattr`: it would find an attribute of a base class too, and unwrap class methods.
        current = owner.__dict__.get(name)
        if getattr(_function(current), _MARK, None) == self.target or self._steps_aside():
            return
        where = f"{owner.__name__}.{name}"
        self._refuse_conflict(current, where, adds=adds, package="vllm")
        self._replace(owner, name, current, replacement)

    def on(self, instance: Any, name: str, replacement: Any) -> None:
        """Set `name` of one object to `replacement`; other objects of its class keep theirs. Do nothing if vLLM does
        not need the patch. A second call is a conflict, because a replacement belongs to the state that it uses.

        Raises:
            PatchConflictError: the attribute is missing, or a third package or this one has replaced it.
        """
        if self._steps_aside():
            return
        current, where = getattr(instance, name, None), f"{type(instance).__name__}.{name}"
        # A model or a coordinator may come from another package. Its method may come from that package or from vLLM.
        # If it comes from a third package, that package has replaced it.
        owner = next((cls for cls in type(instance).__mro__ if name in vars(cls)), object)
        self._refuse_conflict(current, where, adds=False, package=owner.__module__.partition(".")[0])
        self._replace(instance, name, current, replacement)

    def _steps_aside(self) -> bool:
        if unneeded := self.unneeded():
            logger.debug("%s is not patched: this vLLM has %s", self.target, self.built_in)
        return unneeded

    def _refuse_conflict(self, current: Any, where: str, *, adds: bool, package: str) -> None:
        function = _function(current)
        if (mark := getattr(function, _MARK, None)) is not None:
            raise PatchConflictError(f"{self.target}: vllm_zo itself has replaced {where} already, for {mark}")
        if adds and current is not None:
            raise PatchConflictError(f"{self.target}: {where} exists already ({_origin(current)}); {_advice(current)}")
        if not adds and current is None:
            raise PatchConflictError(f"{self.target}: not found in the installed vLLM; run `vllm-zo doctor`")
        if not adds and _package(function) not in ("vllm", "torch", package):  # torch: its decorators
            raise PatchConflictError(f"{self.target}: {_origin(function)} has replaced {where}; {_advice(function)}")

    def _replace(self, owner: Any, name: str, current: Any, replacement: Any) -> None:
        function = _function(replacement)
        setattr(function, _MARK, self.target)
        if current is not None:
            function.__wrapped__ = _function(current)  # for `names_in`, which looks into vLLM's own code
        setattr(owner, name, replacement)
        logger.debug("patched %s: %s", self.target, self.why)


def declared_patches() -> Iterator[Patch]:
    """Every patch of this package. This imports vLLM, because some modules that declare patches do."""
    for name in DECLARED_IN:
        yield from (value for value in vars(importlib.import_module(name)).values() if isinstance(value, Patch))


def resolve(target: str) -> tuple[Any, str]:
    """The owner and the name of the attribute "module:Class.attribute".

    Raises:
        ImportError, AttributeError: there is no such module or class.
    """
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    return owner, name


def exists(target: str) -> bool:
    """Whether the installed vLLM has "module:Class.attribute", or, for "module:Class.attribute(name)", a parameter
    `name` of it."""
    target, _, parameter = target.removesuffix(")").partition("(")
    try:
        owner, name = resolve(target)
    except (ImportError, AttributeError):
        return False
    if parameter:
        return parameter in inspect.signature(getattr(owner, name)).parameters
    # The functions of a module find builtins by name too: see SAFE_VARS.
    return "*" in name or hasattr(owner, name) or (inspect.ismodule(owner) and hasattr(builtins, name))


def names_in(target: str) -> set[str]:
    """All names that vLLM's own code of a function or class uses: attributes and variables, also of inner functions.

    Raises:
        ImportError, AttributeError: vLLM has no such function or class.
    """
    owner, name = resolve(target)
    found = inspect.unwrap(_function(inspect.getattr_static(owner, name)))
    members = vars(found) if inspect.isclass(found) else {name: found}
    codes = [inspect.unwrap(_function(f)).__code__ for f in members.values() if inspect.isfunction(_function(f))]
    names = {*members, *members.get("__annotations__", ())}
    while codes:
        code = codes.pop()
        names.update(code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        codes += [const for const in code.co_consts if inspect.iscode(const)]
    return names


def _function(value: Any) -> Any:
    """The function inside a method, class method or property; any other value as it is."""
    return getattr(value, "__func__", None) or getattr(value, "fget", None) or value


def _code_module(value: Any) -> str:
    """The module in which a function was written."""
    # Its globals tell, and not `__module__`, because `functools.wraps` copies that from the wrapped function.
    namespace = getattr(value, "__globals__", None) or {}
    return str(namespace.get("__name__") or getattr(value, "__module__", "vllm"))


def _package(value: Any) -> str:
    return _code_module(value).partition(".")[0]


def _origin(value: Any) -> str:
    module = _code_module(value)
    package = module.partition(".")[0]
    distributions = metadata.packages_distributions().get(package, [])
    return f"{module} (package {', '.join(distributions)})" if distributions else module


def _advice(value: Any) -> str:
    return (
        f"two plugins cannot both replace it. Start without one of them: list the plugins you want, and not "
        f"{_package(value)}'s, in VLLM_PLUGINS, or uninstall it."
    )
