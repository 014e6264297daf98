"""Exceptions that users of `vllm_zo` may want to catch.

All are picklable (plain `str` arguments): they cross from the engine process to the front end.
"""


class ZOError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(ZOError, ValueError):
    """A setting, a data row or a combination of both that cannot work. Raised before any work starts."""


class JobError(ZOError, RuntimeError):
    """A fine-tuning job that started and could not go on. The last good state was saved; the message says where."""


class RewardError(ZOError, RuntimeError):
    """A reward that raised, or answered something else than a finite number per completion. It fails its job."""


class SlotError(ZOError, RuntimeError):
    """An adapter slot was used in a way that would have scored wrong weights (never silently zeros)."""


class CorruptLogError(ZOError, ValueError):
    """A seed log that cannot be read. The message names the last step that is intact."""
