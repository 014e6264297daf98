"""The reviews of the demo as prompts, for benchmarks on a real model: what `shapes.Prompts` is for random weights."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parents[1] / "examples" / "demo" / "reviews" / "train.jsonl"
TEMPLATE, OPTIONS = "{sentence} It was", (" terrible", " great")


class Reviews:
    """Args: model_dir: whose tokenizer makes the token ids; batch_size, seed: as those of a job."""

    template, options = TEMPLATE, OPTIONS

    def __init__(self, model_dir: str, batch_size: int, seed: int = 0) -> None:
        from transformers import AutoTokenizer

        self.batch_size, self.seed = batch_size, seed
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in ROWS.read_text().splitlines()]

    @cached_property
    def rows(self) -> list[tuple[list[int], int]]:
        texts = [TEMPLATE.format(sentence=row["sentence"]) for row in self.records()]
        labels = [row["label"] for row in self.records()]
        return list(zip(self._tokenizer(texts)["input_ids"], labels, strict=True))

    def batch(self, step: int) -> tuple[list[list[int]], list[int]]:
        """The token ids of the prompts of a step, and the indices of their right options; the order of a job."""
        from vllm_zo.data.batches import BatchOrder

        chosen = [self.rows[index] for index in BatchOrder(len(self.rows), self.batch_size, self.seed).batch(step)]
        return [ids for ids, _ in chosen], [label for _, label in chosen]

    @property
    def option_ids(self) -> tuple[int, ...]:
        return tuple(self._tokenizer(option, add_special_tokens=False)["input_ids"][0] for option in OPTIONS)
