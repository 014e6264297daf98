"""Arithmetic over named rewards: the `calculate_output` of a `multi` grader. Parsed, never evaluated as Python."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_zo.errors import ConfigError
from vllm_zo.validation import suggestion

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
"""Characters; keeps a hostile formula from nesting past the parser's stack."""


@dataclass(frozen=True)
class Formula:
    """`0.5 * accuracy + min(length, 1) ^ 2`, over the operators and functions of OpenAI's multigrader.

    Example:
        >>> Formula.parse("calculate_output", "2 * a ^ 2", ["a"])({"a": 3.0})
        18.0

    Raises:
        ConfigError: on `parse`, not arithmetic, an unknown name or function, a wrong number of arguments.
        ArithmeticError, ValueError: on call, e.g. a division by zero or the root of a negative number.
    """

    source: str
    tree: ast.expr

    @classmethod
    def parse(cls, field: str, source: Any, names: Iterable[str]) -> Formula:
        if not isinstance(source, str) or not 0 < len(source) <= MAX_LENGTH:
            raise ConfigError(f"{field}={source!r:.60}: expected a formula of 1 to {MAX_LENGTH} characters.")
        try:
            tree = ast.parse(source.replace("^", "**").strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(f"{field}={source!r}: not a formula: {error}.") from None
        _check(field, tree, frozenset(names))
        return cls(source, tree)

    def __call__(self, values: Mapping[str, float]) -> float:
        return float(_evaluate(self.tree, values))


def _check(field: str, node: ast.expr, names: frozenset[str]) -> None:
    match node:
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
