"""The reward of completions: a Python function by name, or a grader by its description.

A job crosses a process boundary as JSON, and so does its reward. A function in the registry REWARDS has its name there.
Another function has the name `module:function`, and the other side imports it. A function that cannot be imported (a
lambda, or a function of the running script) gets a name of its own in this module. Only an engine in the same process
finds it.

A client of a server may name registered rewards only: with `module:function` the engine would import, and so run, a
module that the client chose.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_zo.errors import ConfigError, RewardError
from vllm_zo.objectives import functions
from vllm_zo.objectives.base import Trust
from vllm_zo.objectives.graders import build_grader, runs_source
from vllm_zo.objectives.rewards import REWARDS, RewardFunction
from vllm_zo.validation import reject, suggestion

Columns = Mapping[str, Sequence[Any]]
"""Column name -> one value per completion. "prompts" is among them."""


def name_of(function: RewardFunction) -> str:
    """The name of a function: that in REWARDS, or else that of `functions.name_of`."""
    name = getattr(function, "__qualname__", None)
    if name is not None and REWARDS.get(name) is function:
        return str(name)
    return functions.name_of(function)


def trust_for(reward: str | None, grader: Mapping[str, Any] | None) -> Trust:
    """What the owner of the engine must allow for this reward."""
    if reward is not None:
        return Trust.IMPORTS if ":" in reward else Trust.NAMES
    return Trust.SOURCE if runs_source(grader or {}) else Trust.NAMES


def check_name(reward: Any) -> None:
    """Refuse anything but a name in REWARDS or `module:function`, without importing the module.

    Raises:
        ConfigError: the name is unknown (the message has the nearest one), or leads into a module's attributes.
    """
    known = f"one of {', '.join(REWARDS)}"
    if not isinstance(reward, str) or not reward:
        reject("reward", reward, f"a function, its name as 'module:function', or {known}")
    if ":" not in reward and reward not in REWARDS:
        raise ConfigError(f"unknown reward {reward!r}: {suggestion(reward, REWARDS)} Or 'module:function'.")
    if ":" in reward:
        functions.check_name("reward", reward, f", or {known}")


def load_function(reward: str) -> RewardFunction:
    """The function behind a name.

    Raises:
        ConfigError: there is no such function, or the module does not define it itself.
    """
    if ":" not in reward:
        return REWARDS.find(reward)
    found = functions.find("reward", reward)
    # A function of this process is taken as it is: whoever gave it has it at hand.
    if not reward.startswith(functions.LOCAL) and (not inspect.isfunction(found) or inspect.iscoroutinefunction(found)):
        raise ConfigError(f"reward={reward!r} is {type(found).__name__}: expected a function that returns numbers.")
    function: RewardFunction = found
    return function


def build_reward(
    reward: str | None, grader: Mapping[str, Any] | None
) -> Callable[[Sequence[str], Columns], list[float]]:
    """The function that scores a group: (completions, columns) -> one finite number per completion.

    Raises:
        ConfigError: at once, if the function or the grader is not usable.
        RewardError: when the engine calls it, if the reward raises or returns something else. The message says for
            which completion, if that is known.
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
            # A completion that is not the JSON it should be has a reward of 0: the model can learn from that. Any other
            # error is a mistake of the grader or the data, and would train on zeros that mean nothing.
            if result.errors.keys() - {"sample_parse_error"}:
                flag, detail = next(iter(result.errors.items()))
                raise RewardError(f"grader {built.name!r} failed on completion {completion!r:.80}: {flag}: {detail}")
            rewards.append(result.reward)
        return rewards

    return grade


def _call(function: RewardFunction, name: str, completions: Sequence[str], columns: Columns) -> list[float]:
    try:
        answer = function(completions=list(completions), **_accepted(function, columns))
    except Exception as error:  # The user's code may raise anything, which fails the job and not the engine.
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    return _check(answer, name, completions)


def _accepted(function: RewardFunction, columns: Columns) -> dict[str, list[Any]]:
    """The columns for which the function has a parameter. A function with **columns gets all."""
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
