"""Parts by name, as a job file, a seed log, a command line or a client names them: "lozo", "adam", "token_f1".

    registry      defined in                     its parts                    entry point group
    METHODS       vllm_zo.methods                subclasses of Method         vllm_zo.methods
    ESTIMATORS    vllm_zo.methods.estimators     subclasses of Estimator      vllm_zo.estimators
    OPTIMIZERS    vllm_zo.methods.optimizers     subclasses of Optimizer      vllm_zo.optimizers
    OBJECTIVES    vllm_zo.objectives             dataclasses like Objective   vllm_zo.objectives
    GRADERS       vllm_zo.objectives.graders     GraderType                   vllm_zo.graders
    REWARDS       vllm_zo.objectives.rewards     functions, TRL's signature   vllm_zo.rewards

Another package declares its part in the entry point group, under the part's name; every process of the engine finds it
there. A script or a notebook makes its part known in its own process with `METHODS.register`, also as a decorator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from vllm_zo.errors import ConfigError
from vllm_zo.options import is_unsaid
from vllm_zo.validation import check_keys, check_known, reject

Part = TypeVar("Part")
Registered = TypeVar("Registered")


class Registry(Mapping[str, Part], Generic[Part]):
    """Parts of one kind by name: the package's own, those of installed packages, and those of `register`.

    As a mapping it raises KeyError for an unknown name; `find` and `build` raise ConfigError with the nearest name. An
    entry point is loaded when its part is asked for, so a broken package fails only what uses it.

    Args:
        kind: for example "method"; messages use it, and with an "s" the name of the entry point group.
        accepts: tells whether an object can be a part of this kind.
        expected: describes in words what `accepts` accepts.
        parts: this package's own.
    """

    def __init__(self, kind: str, accepts: Callable[[Any], bool], expected: str, parts: Iterable[Part]) -> None:
        self.kind = kind
        self.group = f"vllm_zo.{kind}s"
        self._accepts, self._expected = accepts, expected
        self._registered = {name_of(part): part for part in parts}

    def register(self, part: Registered) -> Registered:
        """Make `part` known by its name in this process, and return it.

        A second part of the same module and class name replaces the first, as when a notebook cell runs twice.

        Raises:
            ConfigError: `part` is of another kind, or its name is taken.
        """
        self._check_kind(part, f"{self.kind}s")
        name = name_of(part)
        if name in self and _definition(self[name]) != _definition(part):
            raise ConfigError(f"{_definition(part)}: the name {name!r} is taken by {_definition(self[name])}.")
        self._registered[name] = part  # type: ignore[assignment]  # `accepts` has accepted it
        return part

    def find(self, name: object) -> Part:
        """The part called `name`.

        Raises:
            ConfigError: the name is unknown; the message has the nearest known one.
        """
        check_known(self.kind, name, self)
        return self[str(name)]

    def build(self, part: Any, /, **settings: Any) -> Any:
        """Make the object that "adam" or {"name": "adam", "beta1": 0.8} describes. An object of a known class is
        returned as it is.

        Example:
            >>> OPTIMIZERS.build("adam", beta1=0.8) == OPTIMIZERS.build({"name": "adam", "beta1": 0.8})
            True

        Raises:
            ConfigError: a name or setting is unknown (the message has the nearest known one), a setting is missing, a
                value is out of range, or an object is no part of this kind.
        """
        if isinstance(part, str | Mapping):
            return self._construct({"name": part} if isinstance(part, str) else dict(part), settings)
        self.check(part)
        return part

    def check(self, part: object) -> None:
        """Refuse an object that the engine could not build again: it gets the object's name and settings only.

        Raises:
            ConfigError: the object is no part of this kind, or another class has its name.
        """
        if isinstance(part, type) or not self._accepts(type(part)):
            reject(self.kind, part, f"one of {', '.join(self)}, or {{'name': ..., settings}}")
        if self.get(name_of(part)) is not type(part):
            raise ConfigError(
                f"{self.kind}={part!r}: the engine knows {self.kind}s by name, and {name_of(part)!r} is not "
                f"{_definition(type(part))}. Declare the class in the entry point group {self.group!r} of an installed "
                "package; or register it, where the engine runs in this process (docs/adding-a-method.md)."
            )

    def _construct(self, description: dict[str, Any], settings: Mapping[str, Any]) -> Any:
        name = description.pop("name", None)
        if not isinstance(name, str):
            reject(f"{self.kind}.name", name, f"one of {', '.join(self)}")
        part: Any = self.find(name)
        given = {str(key): value for key, value in (description | dict(settings)).items()}
        check_keys(f"setting of {self.kind} {name}", given, [f.name for f in fields(part)])
        # Checked here, because the constructor would raise a TypeError, which callers do not report as a user error.
        for f in fields(part):
            if f.name not in given and f.default is MISSING and f.default_factory is MISSING:
                raise ConfigError(f"{self.kind}.{f.name} is missing: {self.kind} {name!r} needs it.")
        return part(**given)

    def __getitem__(self, name: str) -> Part:
        declared = self._declared()
        return self._registered[name] if name in self._registered else self._load(declared[name])

    def __contains__(self, name: object) -> bool:
        # Mapping's own would load the entry point: a broken package would then fail a mere listing.
        return name in self._registered or name in self._declared()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._registered, *self._declared()]))

    def __len__(self) -> int:
        return len(self._registered.keys() | self._declared().keys())

    def _declared(self) -> Mapping[str, EntryPoint]:
        """Entry points of other packages by the names of their parts. None of them is loaded.

        Raises:
            ConfigError: an entry point has the name of a registered part that is not its own.
        """
        declared = _installed(self.group)
        for name in declared.keys() & self._registered.keys():
            taken = _definition(self._registered[name])
            if taken != declared[name].value:  # equal if a package declares its part and registers it too
                raise ConfigError(f"{_where(declared[name])}: the name {name!r} is taken by {taken}.")
        return declared

    def _load(self, point: EntryPoint) -> Part:
        try:
            part: Part = point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{_where(point)} cannot be loaded: {error}; repair or remove its package.") from error
        self._check_kind(part, _where(point))
        if name_of(part) != point.name:
            raise ConfigError(f"{_where(point)}: the part calls itself {name_of(part)!r}; use one name for both.")
        return part

    def _check_kind(self, part: Any, where: str) -> None:
        if not self._accepts(part):
            raise ConfigError(f"{where}: expected {self._expected}, got {part!r}.")


def dataclass_of(base: type) -> Callable[[Any], bool]:
    """An `accepts` for dataclasses that are derived from `base`."""
    return lambda part: isinstance(part, type) and issubclass(part, base) and is_dataclass(part)


def name_of(part: Any) -> str:
    """The `name` of a class or an object, or the name of a function."""
    name = getattr(part, "name", None) or getattr(part, "__name__", None)
    return str(name)


def describe(part: Any) -> dict[str, Any]:
    """`{"name": ..., settings}`, from which `Registry.build` makes an equal object."""
    return {"name": part.name, **settings(part)}


def settings(part: Any) -> dict[str, Any]:
    """Fields of a part by name. A part inside it is described, or left out if it is the field's default, as an option
    is that says so (`Option.unsaid`).

    Because defaults are left out, a job file names what was chosen, and a later version can add a part with a default.
    """
    described: dict[str, Any] = {}
    for f in fields(part):
        value = getattr(part, f.name)
        if not is_dataclass(value):
            if not (is_unsaid(f) and value == _default(f)):
                described[f.name] = value
        elif value != _default(f):
            described[f.name] = describe(value)
    return described


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


@functools.cache
def _installed(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group by name, as they were when the process first asked.

    Raises:
        ConfigError: two packages declare the same name.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise ConfigError(f"{_where(point)}: the name {point.name!r} is taken by {other.value}.")
    return found


def _where(point: EntryPoint) -> str:
    return f"entry point {point.name!r} ({point.value}) of group {point.group!r}"


def _definition(part: Any) -> str:
    """The place of a class or function, in the form of an entry point: "vllm_zo.methods.lozo:LoZO"."""
    of = part if hasattr(part, "__qualname__") else type(part)
    return f"{of.__module__}:{of.__qualname__}"
