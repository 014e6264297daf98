"""Which process of `pytest -n` runs a test: files that share something costly are in one, so that it is made once.

A server or an engine in a process of its own takes the better part of a minute to start.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from xdist.scheduler import LoadFileScheduling

SHARED = ("servers", "engine_apart")
"""Fixtures of the whole session. A file that names one as a parameter goes with the others that do."""
ROOT = Path(__file__).parents[1]


class TogetherByFixture(LoadFileScheduling):
    """`--dist loadfile`, but that files which share a fixture of SHARED count as one."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return shared_by(file) or file


@functools.cache
def shared_by(file: str) -> str | None:
    """The fixture of SHARED that a test file uses, the first of several."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return next((name for name in SHARED if re.search(rf"[(,] ?{name}: |\n    {name}: ", text)), None)
