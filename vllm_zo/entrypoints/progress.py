"""What a terminal shows while a job runs: loss, accuracy, steps a second, time left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from vllm_zo.entrypoints.run import JobResult

WINDOW = 20
"""Steps averaged for the loss and accuracy shown: single batches jump too much to read."""
PLAIN_LINES = 20
"""Lines of a whole run where the output is a file or a pipe."""
REFRESH_PER_SECOND = 4
"""Of the bar; drawing it takes time from the engine where both share a core."""


class ProgressBar:
    """A callback of `finetune`: a live bar in a terminal, a plain line now and then elsewhere.

    Evaluations print a line of their own. `close` may be called at any time and more than once; the run does it however
    it ends, so that a failure or Ctrl-C leaves the terminal as it was.
    """

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self._steps = steps
        self._console = console or Console(stderr=True)
        self._bar = _make_bar(self._console) if self._console.is_terminal else None
        self._task = self._bar.add_task("train", total=steps, numbers="") if self._bar else None
        self._every = max(1, -(-steps // PLAIN_LINES))
        self._started: tuple[float, int] | None = None
        """Time and step at which the first record came: the rate counts from there."""

    def __call__(self, run: JobResult, record: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.start()
        if "eval_loss" in record:
            shown = "reward" if "eval_reward" in record else "loss"
            text = f"validation {shown} {record[f'eval_{shown}']:.4f}, accuracy {record['eval_accuracy']:.4f}"
            self._print(f"step {record['step']}: {text}")
        else:
            self._on_step(run, record["step"])

    def _on_step(self, run: JobResult, step: int) -> None:
        now = time.monotonic()
        if self._started is None:
            self._started = (now, step)
        elapsed, done = now - self._started[0], step - self._started[1]
        rate = done / elapsed if done and elapsed else None
        numbers = _describe(run.history[-WINDOW:], rate)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step % self._every == 0 or step == self._steps:
            left = f", {_clock((self._steps - step) / rate)} left" if rate else ""
            self._print(f"step {step}/{self._steps}: {numbers}{left}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop drawing and give the cursor back."""
        if self._bar is not None:
            self._bar.stop()


def _make_bar(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=REFRESH_PER_SECOND,
    )


def _describe(recent: list[dict[str, Any]], rate: float | None) -> str:
    shown = "reward" if "reward" in recent[0] else "loss"
    value = sum(record[shown] for record in recent) / len(recent)
    accuracy = sum(record["accuracy"] for record in recent) / len(recent)
    speed = "-" if rate is None else f"{rate:.1f}"
    return f"{shown} {value:.4f}, accuracy {accuracy:.3f}, {speed} steps/s"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
