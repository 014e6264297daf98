"""64-bit numbers that name a stream of noise: keys of draws, and ids of the modules that the draws are for."""

from __future__ import annotations

import hashlib
import operator


def derive_key(*parts: int | str) -> int:
    """64-bit key of a path such as `(job_seed, "U", step)`.

    The type and the length of each part go into the hash, so that (1, 2), (12,) and ("1", "2") have different keys.

    Raises:
        TypeError: a part is neither an integer nor a string.
    """
    encoded = b""
    for part in parts:
        body = (part if isinstance(part, str) else str(operator.index(part))).encode()
        encoded += b"%c%d:%b" % (b"s" if isinstance(part, str) else b"i", len(body), body)
    return _hash64(encoded)


def derive_seed(*parts: int | str) -> int:
    """The upper 63 bits of `derive_key`, for a request that samples: vLLM's seeds are signed."""
    return derive_key(*parts) >> 1


def module_id(name: str) -> int:
    """64-bit id of a module, the high half of its counters."""
    return _hash64(name.encode())


def _hash64(data: bytes) -> int:
    # BLAKE2b, because Python's own `hash` changes from process to process.
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
