"""The reward of completions: a Python function by name, or a grader by its description.

A job crosses a process boundary as JSON, and so does its reward. A function is named `module:function` and imported on
the other side. One that cannot be imported (a lambda, something defined in the script that runs) is kept here under a
name of its own, and only an engine in the same process finds it.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from vllm_zo.errors import ConfigError, RewardError
from vllm_zo.objectives.graders import build_grader

Columns = Mapping[str, Sequence[Any]]
"""Column name -> one value per completion. "prompts" is among them."""
RewardFunction = Callable[..., Sequence[float]]
"""`reward(completions, **columns) -> one number per completion`, as in TRL."""

BUILT_IN = "vllm_zo.rewards"
LOCAL = "local:"
_local: dict[str, RewardFunction] = {}


def name_of(function: RewardFunction) -> str:
    """`module:function` where importing that gives `function` back; else a name that holds in this process."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module not in (None, "__main__") and name is not None:
        found: Any = sys.modules.get(str(module))
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is function:
            return f"{module}:{name}"
    local = f"{LOCAL}{name or type(function).__name__}-{len(_local)}"
    local = next((known for known, other in _local.items() if other is function), local)
    _local[local] = function
    return local


def is_foreign_code(reward: str | None, grader: Mapping[str, Any] | None) -> bool:
    """Whether the reward is code that does not come with this package: whoever runs the engine has to trust it."""
    if reward is not None:
        return reward.partition(":")[0] != BUILT_IN
    parts = (grader or {}).get("graders")
    inner = parts.values() if isinstance(parts, Mapping) else ()
    return any(isinstance(g, Mapping) and g.get("type") == "python" for g in (grader, *inner))


def check_name(reward: Any) -> None:
    """Refuse anything but `module:function` or a name of ours, without importing it."""
    module, colon, function = reward.partition(":") if isinstance(reward, str) else ("", "", "")
    if not (module and colon and function):
        raise ConfigError(f"reward={reward!r}: expected a function, or its name as 'module:function'.")


def load_function(reward: str) -> RewardFunction:
    """Import a reward by its name.

    Raises:
        ConfigError: it is not there, or is not a function.
    """
    if reward.startswith(LOCAL):
        if reward not in _local:
            raise ConfigError(
                f"reward={reward!r} is a function of another process: put it into a module that the engine can import "
                "(the script itself is none), or run the engine in process (VLLM_ENABLE_V1_MULTIPROCESSING=0)."
            )
        return _local[reward]
    module, _, path = reward.partition(":")
    try:
        found: Any = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward={reward!r} cannot be imported: {error}.") from None
    if not callable(found) or inspect.iscoroutinefunction(found):
        raise ConfigError(f"reward={reward!r} is {type(found).__name__}: expected a function that returns numbers.")
    function: RewardFunction = found
    return function


def build_reward(
    reward: str | None, grader: Mapping[str, Any] | None
) -> Callable[[Sequence[str], Columns], list[float]]:
    """What scores a group: (completions, columns) -> one finite number per completion.

    Raises:
        ConfigError: at once, the function or the grader is not usable.
        RewardError: on call, it raised, or answered something else; says which completion where it can.
    """
    if reward is not None:
        function, name = load_function(reward), reward
        return lambda completions, columns: _call(function, name, completions, columns)
    assert grader is not None
    built = build_grader(grader, allow_python=True)

    def grade(completions: Sequence[str], columns: Columns) -> list[float]:
        rewards = []
        for index, completion in enumerate(completions):
            result = built(completion, {name: values[index] for name, values in columns.items()})
            if result.errors.keys() - {"sample_parse_error"}:  # a sample that is not the JSON it should be is worth 0
                flag, detail = next(iter(result.errors.items()))
                raise RewardError(f"grader {built.name!r} failed on completion {completion!r:.80}: {flag}: {detail}")
            rewards.append(result.reward)
        return rewards

    return grade


def _call(function: RewardFunction, name: str, completions: Sequence[str], columns: Columns) -> list[float]:
    try:
        answer = function(completions=list(completions), **_accepted(function, columns))
    except Exception as error:  # the user's code: whatever it raises is the job's failure, not the engine's
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    return _check(answer, name, completions)


def _accepted(function: RewardFunction, columns: Columns) -> dict[str, list[Any]]:
    """The columns that the function has a parameter for: all, where it takes **columns."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return {name: list(values) for name, values in columns.items()}
    return {p.name: list(columns[p.name]) for p in parameters if p.name in columns}


def _check(answer: Any, name: str, completions: Sequence[str]) -> list[float]:
    try:
        values = [float(value) for value in answer]
    except (TypeError, ValueError):
        raise RewardError(
            f"reward {name!r} returned {answer!r:.80}: expected a list of {len(completions)} numbers"
        ) from None
    if len(values) != len(completions):
        raise RewardError(f"reward {name!r} returned {len(values)} numbers for {len(completions)} completions")
    for value, completion in zip(values, completions, strict=True):
        if not math.isfinite(value):
            raise RewardError(f"reward {name!r} is {value} for completion {completion!r:.80}: expected a finite number")
    return values
