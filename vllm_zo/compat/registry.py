"""How this package changes vLLM at run time: a few recorded, guarded patches, one file a seam.

Every patch says what, why, how and when it can go, is applied once per process, and refuses an attribute that somebody
else has already replaced.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("vllm.zo.compat")

_MARK = "_vllm_zo_patch"


class PatchConflictError(RuntimeError):
    """The attribute to patch is not vLLM's own any more."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One change to one attribute of vLLM.

    Attributes:
        target: "module:Class.attribute".
        why: the symptom without it.
        how: what the replacement does.
        upstream: related upstream issue or pull request.
        remove_when: when this file can be deleted.
        checked_on: vLLM versions it was tried on.
    """

    target: str
    why: str
    how: str
    upstream: str
    remove_when: str
    checked_on: str = "0.32.0"

    def apply(self, owner: Any, name: str, replacement: Any, *, adds: bool = False) -> None:
        """Set `owner.name` to `replacement`. `adds` is for a new attribute; it must not exist.

        Raises:
            PatchConflictError: the attribute is missing, already there, or came from outside vLLM.
        """
        current = owner.__dict__.get(name)
        plain = getattr(current, "__func__", current)
        if getattr(plain, _MARK, None) == self.target:
            return
        if adds and current is not None:
            raise PatchConflictError(f"{self.target}: {owner.__name__}.{name} exists already ({current!r})")
        if not adds and current is None:
            raise PatchConflictError(f"{self.target}: not found in the installed vLLM; run `vllm-zo doctor`")
        if not adds and not str(getattr(plain, "__module__", "vllm")).startswith("vllm"):
            raise PatchConflictError(
                f"{self.target}: already replaced by {plain.__module__}. Two plugins cannot both replace it: disable "
                f"that "
                "one with VLLM_PLUGINS."
            )
        setattr(getattr(replacement, "__func__", replacement), _MARK, self.target)
        setattr(owner, name, replacement)
        logger.debug("patched %s: %s", self.target, self.why)
