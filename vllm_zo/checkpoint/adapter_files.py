"""Checks that the files of a PEFT adapter are whole, before an engine loads them."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vllm_zo.errors import ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def refuse_adapter(directory: Path, named: str) -> None:
    """Refuse a PEFT adapter where a model or a run is wanted.

    Args:
        named: the option and its value as the user wrote them.

    Raises:
        ConfigError: the directory holds an adapter and no model.
    """
    if (directory / CONFIG).is_file() and not (directory / "config.json").is_file():
        raise ConfigError(
            f"{named}: a PEFT adapter alone. Merge it into its base (in peft: merge_and_unload().save_pretrained(DIR)) "
            "and give that directory as --model."
        )


def check_adapter(directory: Path) -> None:
    """Refuse an adapter that cannot be loaded: vLLM's worker would raise, and that ends the engine for all its users.

    The check of files that were whole before costs one `stat`. It leaves weights in other formats than safetensors to
    vLLM.

    Raises:
        ConfigError: the configuration is missing, or the weights are cut off or not safetensors; names the file.
    """
    if not (directory / CONFIG).is_file():
        raise ConfigError(f"adapter {directory}: no {CONFIG} there; export it again, or unload it.")
    weights = directory / WEIGHTS
    if weights.exists():
        status = weights.stat()
        _check_weights(weights, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _check_weights(path: Path, size: int, mtime_ns: int) -> None:
    """Check the header of the weights, and the length that it implies.

    `size` and `mtime_ns` are part of the cache's key, so that a file that has changed is read again.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"adapter {path.parent}: {path.name} ({size} bytes) is damaged: {error}; export it again, or unload it."
        ) from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
