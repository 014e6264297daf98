"""What a project may still use. Everything here is about the current project; for the operator there are no limits.

A project that is at a limit gets a 429 as OpenAI writes it: the client waits (`rate_limit_exceeded`), or it has to free
something (`insufficient_quota`).
"""

from __future__ import annotations

import math
import threading
import time

from vllm_zo.entrypoints.server.http.errors import APIError
from vllm_zo.entrypoints.server.keys.current import OPERATOR, current_project
from vllm_zo.entrypoints.server.keys.key_file import Limits
from vllm_zo.entrypoints.server.keys.key_ring import KeyRing
from vllm_zo.entrypoints.server.state.store import Store
from vllm_zo.jobs.status import UNFINISHED

MINUTE_S, DAY_S = 60, 24 * 60 * 60


class Quotas:
    """The limits of projects and what they have used. Files, jobs and tokens are counted in the store; requests in
    memory, by minutes of the clock."""

    def __init__(self, keys: KeyRing | None, store: Store) -> None:
        self._keys, self._store = keys, store
        self._lock = threading.Lock()
        self._minute = 0
        self._requests: dict[str, int] = {}

    def _limits(self) -> Limits:
        project = current_project()
        return Limits() if project is None or self._keys is None else self._keys.limits(project)

    def take_job(self) -> None:
        """Call it in the transaction that writes a job.

        Raises:
            APIError: 429, the project has as many unfinished jobs as it may have, or no tokens left today.
        """
        limit = self._limits().jobs
        if limit is not None and len(self._store.jobs(UNFINISHED)) >= limit:
            raise APIError(
                429,
                f"Your project has {limit} fine-tuning jobs that have not ended, and may not have more. Wait for one "
                "to end, or cancel one.",
                code="rate_limit_exceeded",
                type="requests",
            )
        self.check_tokens()

    def take_bytes(self, size: int) -> None:
        """Call it in the transaction that writes a file.

        Raises:
            APIError: 429, the file would take the project over its limit.
        """
        limit = self._limits().bytes
        if limit is not None and (used := self._store.bytes_of_files()) + size > limit:
            raise APIError(
                429,
                f"This file has {size} bytes, and {max(limit - used, 0)} of your project's {limit} are left. Delete "
                "files that you do not need.",
                "file",
                "insufficient_quota",
                "insufficient_quota",
            )

    def check_tokens(self) -> None:
        """Raises APIError: 429, the project has no training tokens left today."""
        limit = self._limits().tokens_a_day
        if limit is not None and self.tokens_left() == 0:
            raise APIError(
                429,
                f"Rate limit reached for training tokens: your project's jobs have used their {limit} of today. Please "
                f"try again in {duration(day_left_s())}.",
                code="rate_limit_exceeded",
                type="tokens",
            )

    def tokens_left(self) -> int:
        """Training tokens that the current project has left today, where there is a limit."""
        limit, project = self._limits().tokens_a_day, current_project()
        assert limit is not None and project is not None
        return max(0, limit - self._store.tokens_of(project, today()))

    def spent_by(self, owner: str) -> int | None:
        """The day's limit of a job's owner if the owner has used it up, else None."""
        if owner == OPERATOR or self._keys is None:
            return None
        limit = self._keys.limits(owner).tokens_a_day
        return limit if limit is not None and self._store.tokens_of(owner, today()) >= limit else None

    def take_request(self) -> tuple[dict[str, str], APIError | None]:
        """Count a request of the current project; returns the headers of its answer, and the 429 if it is one too many.

        The headers are OpenAI's; those of a kind without a limit are missing.
        """
        limits, refused = self._limits(), None
        headers: dict[str, str] = {}
        if (limit := limits.requests_a_minute) is not None:
            used, reset_s = self._count_request(), MINUTE_S - time.time() % MINUTE_S
            headers |= _headers("requests", limit, max(0, limit - used), reset_s)
            if used > limit:
                headers["retry-after"] = str(math.ceil(reset_s))
                refused = APIError(
                    429,
                    f"Rate limit reached for requests: limit {limit} a minute. Please try again in "
                    f"{duration(reset_s)}.",
                    code="rate_limit_exceeded",
                    type="requests",
                )
        if (limit := limits.tokens_a_day) is not None:
            headers |= _headers("tokens", limit, self.tokens_left(), day_left_s())
        return headers, refused

    def _count_request(self) -> int:
        with self._lock:
            if (minute := int(time.time()) // MINUTE_S) != self._minute:
                self._minute, self._requests = minute, {}
            project = current_project() or OPERATOR
            self._requests[project] = self._requests.get(project, 0) + 1
            return self._requests[project]


def _headers(kind: str, limit: int, left: int, reset_s: float) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{kind}": str(limit),
        f"x-ratelimit-remaining-{kind}": str(left),
        f"x-ratelimit-reset-{kind}": duration(reset_s),
    }


def duration(seconds: float) -> str:
    """As OpenAI's headers have it.

    Example:
        >>> duration(3725), duration(0.25)
        ('1h2m5s', '1s')
    """
    whole = math.ceil(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return "".join(f"{n}{unit}" for n, unit in ((hours, "h"), (minutes, "m")) if n) + f"{whole % 60}s"


def today() -> int:
    """Days since 1970, in UTC."""
    return int(time.time()) // DAY_S


def day_left_s() -> float:
    return DAY_S - time.time() % DAY_S
