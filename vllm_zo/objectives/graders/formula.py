"""Arithmetic over named rewards: the `calculate_output` of a `multi` grader. Python never evaluates it.

The formula may come from a client of a server. Python's parser makes the tree, and this module accepts only the nodes
that it knows and evaluates them itself.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.validation import suggestion

# `math.pow` instead of `operator.pow`: floor and ceil give integers, whose powers could fill the memory with digits.
OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min, "max": max, "abs": abs, "floor": math.floor, "ceil": math.ceil,
    "exp": math.exp, "sqrt": math.sqrt, "log": math.log,
}  # fmt: skip
MAX_LENGTH = 1000
"""Characters of a formula."""
MAX_DEPTH = 100
"""Operations within each other. The functions below recurse, and a deeper formula could exhaust Python's stack."""


@dataclass(frozen=True)
class Formula:
    """`0.5 * accuracy + min(length, 1) ^ 2`, over the operators and functions of OpenAI's multigrader.

    Example:
        >>> Formula.parse("calculate_output", "2 * a ^ 2", ["a"])({"a": 3.0})
        18.0

    Raises:
        ConfigError: on `parse`, if the text is no arithmetic, a name or function is unknown, or a function has a wrong
            number of arguments.
        ArithmeticError, ValueError: on call, e.g. for a division by zero or the root of a negative number.
    """

    source: str
    tree: ast.expr

    @classmethod
    def parse(cls, field: str, source: Any, names: Iterable[str]) -> Formula:
        if not isinstance(source, str) or not 0 < len(source) <= MAX_LENGTH:
            raise ConfigError(f"{field}={source!r:.60}: expected a formula of 1 to {MAX_LENGTH} characters.")
        try:
            # OpenAI's ^ is a power. Python's is an exclusive or, and binds less tightly than +.
            tree = ast.parse(source.replace("^", "**").strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(f"{field}={source!r:.200}: not a formula: {error}.") from None
        _check_depth(field, tree)
        _check(field, tree, frozenset(names))
        return cls(source, tree)

    def __call__(self, values: Mapping[str, float]) -> float:
        return float(_evaluate(self.tree, values))


def _check_depth(field: str, tree: ast.expr) -> None:
    # Level by level: the check of the depth must not recurse itself.
    level: list[ast.AST] = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return
    raise ConfigError(f"{field}: more than {MAX_DEPTH} operations within each other; write it with fewer.")


def _check(field: str, node: ast.expr, names: frozenset[str]) -> None:
    match node:
        # `True` is an `int` for the pattern, and no number of a formula.
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return
        case ast.Name():
            if node.id not in names:
                raise ConfigError(f"{field}: unknown grader {node.id!r}: {suggestion(node.id, names)}")
        case ast.BinOp() if type(node.op) in OPERATORS:
            _check(field, node.left, names)
            _check(field, node.right, names)
        case ast.UnaryOp() if type(node.op) in OPERATORS:
            _check(field, node.operand, names)
        case ast.Call(func=ast.Name(id=function), keywords=[]) if function in FUNCTIONS:
            many = function in ("min", "max")
            if len(node.args) < 1 or (not many and len(node.args) > 1) or (many and len(node.args) < 2):
                raise ConfigError(f"{field}: {function} takes {'two or more values' if many else 'one value'}.")
            for argument in node.args:
                _check(field, argument, names)
        case _:
            raise ConfigError(
                f"{field}: {ast.unparse(node)!r:.60} is refused: expected numbers, grader names, + - * / ^ and "
                f"{', '.join(FUNCTIONS)}."
            )


def _evaluate(node: ast.expr, values: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name):
            return values[name]
        case ast.BinOp():
            return OPERATORS[type(node.op)](_evaluate(node.left, values), _evaluate(node.right, values))
        case ast.UnaryOp():
            return OPERATORS[type(node.op)](_evaluate(node.operand, values))
        case ast.Call(func=ast.Name(id=function)):
            return FUNCTIONS[function](*(_evaluate(argument, values) for argument in node.args))
    raise AssertionError(f"unchecked node {ast.dump(node)}")
