"""The options of a run that belong to no job: which model and data `vllm-zo train` takes, and where results go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_zo.config import RESULTS
from vllm_zo.entrypoints.llm.callbacks.report import TRACKERS
from vllm_zo.entrypoints.llm.content_formats import CONTENT_FORMATS
from vllm_zo.options import option
from vllm_zo.tasks import PRESETS as TASKS
from vllm_zo.tasks import TRAIN

DATA = "Data and objective"
"""Heading of `vllm-zo train --help`."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Each field is a flag of `vllm-zo train` and a key of a recipe. None: the user has not given it."""

    model: str | None = option(
        None, text="a directory or a name", panel=DATA, help="Model to train: a directory or a Hugging Face name."
    )
    train: str | None = option(
        None,
        text="a file or a data set",
        panel=DATA,
        help="Training data: .jsonl, .json, .csv (also .gz), .parquet, .arrow, or hf:<data set>[:<config>]:<split>.",
    )
    validation: str | None = option(
        None, text="a file or a data set", panel=DATA, help="Validation data, in the same forms."
    )
    task: str | None = option(
        None,
        choices=tuple(TASKS),
        panel=DATA,
        help=f"Ready-made data, prompt and loss: {', '.join(TASKS)}; in place of the flags that follow.",
    )
    data: str | None = option(
        None,
        text="a directory",
        panel=DATA,
        metavar="DIR",
        help="--task: directory with train.jsonl and validation.jsonl. Unset: the Hugging Face hub.",
    )
    data_seed: int | None = option(
        None, panel=DATA, help="--task: chooses the training, validation and test rows (default: 0)."
    )
    train_examples: int | None = option(
        None, minimum=1, panel=DATA, help=f"--task: how many training rows (default: {TRAIN}, as in the papers)."
    )
    chat_template: str | None = option(
        None,
        text="a file",
        panel=DATA,
        metavar="FILE",
        help="Template of the chats in the data, as of vllm serve. Unset: the model's.",
    )
    default_chat_template_kwargs: str | None = option(
        None,
        text="JSON",
        panel=DATA,
        metavar="JSON",
        help='Variables of the chat template, e.g. {"enable_thinking": false}; a record may have others.',
    )
    chat_template_content_format: str | None = option(
        None,
        choices=CONTENT_FORMATS,
        panel=DATA,
        help=f"How the template gets the content of messages: {', '.join(CONTENT_FORMATS)}.",
    )
    output: str | None = option(
        None,
        text="a directory",
        panel=RESULTS,
        metavar="DIR",
        help="Directory of the job and its results. Unset: runs/<time>.",
    )
    push_to_hub: str | None = option(
        None,
        text="the name of a repository",
        panel=RESULTS,
        metavar="NAME",
        help="Upload the result with its model card to this repository of the Hugging Face hub; a new one is private.",
    )
    report_to: str | Sequence[str] | None = option(
        None, panel=RESULTS, metavar="NAME,...", help=f"Send metrics to {', '.join(TRACKERS)}; several with commas."
    )
    wandb: bool | None = option(None, flag="--wandb", panel=RESULTS, help="As --report-to wandb.")
    quiet: bool | None = option(None, flag="--quiet", panel=RESULTS, help="Warnings and the result only.")
