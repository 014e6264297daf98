"""vLLM's table of adapters, as the current project may see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_zo.entrypoints.server.keys.current import current_project


class ProjectAdapters(dict[str, Any]):
    """A dictionary of name -> LoRARequest that has only the adapters of the current project, and those without an
    owner: the operator's `--lora-modules`.

    vLLM looks an adapter up here for every kind of request, and answers 404 for a name that it does not find. So a
    foreign name is answered as one that does not exist, whichever route it comes by.

    Args:
        owners: name -> project. It may change.
    """

    def __init__(self, adapters: Mapping[str, Any], owners: Mapping[str, str]) -> None:
        super().__init__(adapters)
        self._owners = owners

    def _seen(self, name: object) -> bool:
        project = current_project()
        return project is None or self._owners.get(name, project) == project  # type: ignore[call-overload]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) and self._seen(name)

    def __getitem__(self, name: str) -> Any:
        if not self._seen(name):
            raise KeyError(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name, default) if self._seen(name) else default

    def __iter__(self) -> Iterator[str]:
        # A copy in one step: `/v1/models` reads it in a thread, while the event loop may change it.
        return iter([name for name in list(super().keys()) if self._seen(name)])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def keys(self) -> Any:
        return list(self)

    def values(self) -> Any:
        return [self[name] for name in self]

    def items(self) -> Any:
        return [(name, self[name]) for name in self]
