"""The only list of job statuses. The engine and every front end use these words, most of them from OpenAI's API."""

from __future__ import annotations

from enum import StrEnum


class JobStatus(StrEnum):
    """The status of a job. It compares and serialises as its word: `JobStatus.QUEUED == "queued"`."""

    VALIDATING = "validating_files"
    """The server reads and tokenises its files. The engine does not know it yet."""
    QUEUED = "queued"
    """It can start, and waits for a lane."""
    RUNNING = "running"
    """It has a lane: its groups are scheduled."""
    PAUSING = "pausing"
    """It was asked to rest, and some of its groups are still open or in flight."""
    PAUSED = "paused"
    """It rests: it keeps its state, and has given its lane away."""
    SUCCEEDED = "succeeded"
    """It took all its steps, or was asked to finish early and did."""
    FAILED = "failed"
    """It ended with an error; the state until then is kept."""
    CANCELLED = "cancelled"
    """It was stopped; the state until then is kept."""

    @property
    def ended(self) -> bool:
        """Whether nothing can happen to the job any more."""
        return self in FINAL


FINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})
UNFINISHED = frozenset(JobStatus) - FINAL
