"""What middleware calls a path."""

from __future__ import annotations

from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """The path as the routes know it: without the prefix (`--root-path`) of a proxy; "" of a lifespan."""
    path: str = scope.get("path", "")
    return path.removeprefix(scope.get("root_path", ""))
