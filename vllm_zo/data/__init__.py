"""Makes tokenised examples and a deterministic batch order from records. Every error comes before any work starts."""

from __future__ import annotations

from vllm_zo.data.batches import BatchOrder, sample_split
from vllm_zo.data.encode import encode_examples
from vllm_zo.data.load import load_examples

__all__ = ["BatchOrder", "encode_examples", "load_examples", "sample_split"]
