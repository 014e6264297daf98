"""Ready-made tasks: data, prompts, losses and splits as in the MeZO and LoZO papers.

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
"""How many records the papers train on, and how many they report on."""


@dataclass(frozen=True)
class Task:
    """The data and the objective of one experiment.

    Attributes:
        train, validation: disjoint samples of the data set's training split. `validation` chooses the checkpoint.
        test: a sample of its validation split, for the final figure.
        final_objective: the objective that measures the papers' figure on `test`. It is `objective`, whose accuracy
            counts, or for SQuAD a reward, the F1 of generated answers.
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
        data: a directory with train.jsonl and validation.jsonl in the data set's own fields. None stands for the
            Hugging Face hub.
        seed: chooses the records. If the data is in its published order, they are those of the papers for this seed.
        train: number of training records. If the set has fewer than train + dev, training gets fewer, as in the
            official code.
        dev: number of validation records. None stands for 500, for CB and COPA 100.
        test: number of records of the final figure. None stands for all.

    Raises:
        ConfigError: the task is unknown, the data has too few records, a file is missing, or a record lacks a field.

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
