"""Ready-made tasks: rows, prompts, losses and splits as in the MeZO and LoZO papers.

task = load_task("sst2", data="data/sst2")          # or data=None: from the Hugging Face hub
run = llm.finetune(task.train, task.validation, objective=task.objective, ...)
llm.evaluate(task.test, task.final_objective, run=run)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_zo.data import load_examples, sample_split
from vllm_zo.errors import ConfigError
from vllm_zo.objectives import Objective
from vllm_zo.tasks.presets import PRESETS
from vllm_zo.validation import check_int, check_known, check_optional_int

TRAIN, TEST = 1000, 1000
"""Rows the papers train on, and report on."""


@dataclass(frozen=True)
class Task:
    """Rows and objective of one experiment.

    Attributes:
        train, validation: disjoint samples of the data set's training split; validation chooses the checkpoint.
        test: a sample of its validation split, for the final figure.
        final_objective: what measures the papers' figure on `test`: `objective` and its accuracy, or of SQuAD the F1 of
            generated answers, as a reward.
    """

    name: str
    objective: Objective
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]
    final_objective: Objective


def load_task(
    name: str,
    data: str | Path | None = None,
    seed: int = 0,
    train: int = TRAIN,
    dev: int | None = None,
    test: int | None = TEST,
) -> Task:
    """The task called `name`: sst2, rte, cb, boolq, wic, copa, trec or squad.

    Args:
        data: a directory with train.jsonl and validation.jsonl in the data set's own fields; None: the hub.
        seed: chooses the rows. With the data in its published order they are the very rows of the papers for it.
        train: training rows. A set too small for train + dev gives up training rows, as in the official code.
        dev: validation rows; None: 500, of CB and COPA 100.
        test: rows of the final figure; None: all.

    Raises:
        ConfigError: unknown task, a size that the data cannot give, missing files, or a row without its fields.

    Source: princeton-nlp/MeZO, large_models/run.py and tasks.py (`sample_train_sets`, `sample_subset`).
    """
    check_known("task", name, PRESETS)
    preset = PRESETS[name]
    dev = preset.dev if dev is None else dev
    check_int("train", train, 1)
    check_int("dev", dev, 1)
    check_optional_int("test", test, 1, fix="None takes all")
    training = _load(name, data, "train")
    taken = min(train + dev, len(training))
    if taken <= dev:
        raise ConfigError(f"dev={dev}: {name} has {len(training)} training rows, which leaves none to train on.")
    train_rows, dev_rows = sample_split(training, (taken - dev, dev), seed)
    held_out = _load(name, data, "validation")
    count = len(held_out) if test is None else min(test, len(held_out))
    (test_rows,) = sample_split(held_out, (count,), seed)
    return Task(name, preset.objective, train_rows, dev_rows, test_rows, preset.final or preset.objective)


def _load(name: str, data: str | Path | None, split: str) -> list[dict[str, Any]]:
    preset = PRESETS[name]
    if data is None:
        source: str | Path = preset.hub[split == "validation"]
    else:
        if not Path(data).is_dir():
            raise ConfigError(
                f"data={str(data)!r}: no such directory; {name} needs one with train and validation.jsonl."
            )
        source = Path(data) / f"{split}.jsonl"
    records = load_examples(source, split)
    return [preset.prepare(record, f"{source}, row {row}") for row, record in enumerate(records, start=1)]


__all__ = ["PRESETS", "Task", "load_task"]
