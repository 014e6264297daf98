"""Exceptions that users of `vllm_zo` may want to catch.

All take a plain `str`, so that they can be pickled: they cross from the engine process to the front end.
"""


class ZOError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(ZOError, ValueError):
    """A setting, a data row or a combination of both cannot work. It is raised before any work starts."""


class JobError(ZOError, RuntimeError):
    """A fine-tuning job has started and cannot go on. Its last good state was saved; the message says where."""


class RewardError(ZOError, RuntimeError):
    """A reward raised, or did not return one finite number for each completion. Its job fails."""


class SlotError(ZOError, RuntimeError):
    """A slot or a published version does not hold the weights that are asked for: scores from it would be wrong."""


class CorruptLogError(ZOError, ValueError):
    """A seed log cannot be read. The message names the last intact step."""
