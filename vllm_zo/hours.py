"""The hours of the day at which jobs may run: "22:00-06:00"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import time

from vllm_zo.validation import reject

_CLOCK = r"([01]?\d|2[0-3]):([0-5]\d)"
_HOURS = re.compile(rf"\s*{_CLOCK}\s*-\s*{_CLOCK}\s*", re.ASCII)


@dataclass(frozen=True)
class Hours:
    """A stretch of every day, in local time. It may go over midnight; its end does not belong to it.

    >>> Hours.read("window", "22:00-06:00").contain(time(23, 30))
    True
    """

    begin: time
    end: time

    @classmethod
    def read(cls, name: str, text: str) -> Hours:
        """The hours in a text like "22:00-06:00".

        Args:
            name: of the setting, for messages.

        Raises:
            ConfigError: the text is no such thing, or begins when it ends.
        """
        if (found := _HOURS.fullmatch(text)) is None:
            reject(name, text, 'two times of day like "22:00-06:00"')
        begin_hour, begin_minute, end_hour, end_minute = map(int, found.groups())
        hours = cls(time(begin_hour, begin_minute), time(end_hour, end_minute))
        if hours.begin == hours.end:
            reject(name, text, "an end that differs from the beginning", "for the whole day, leave it out")
        return hours

    def contain(self, now: time) -> bool:
        if self.begin < self.end:
            return self.begin <= now < self.end
        return now >= self.begin or now < self.end
