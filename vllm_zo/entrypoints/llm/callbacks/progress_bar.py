"""The progress bar of a job: loss, accuracy, steps a second, time left."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vllm_zo.jobs.records import is_evaluation

if TYPE_CHECKING:
    from vllm_zo.config import JobConfig
    from vllm_zo.entrypoints.llm.handle import Callback, JobResult

WINDOW = 20
"""The loss and accuracy shown are means over this many steps: those of single batches jump too much to read."""
PLAIN_LINES = 20
"""A whole run prints about this many lines where the output is a file or a pipe."""
EVERY_WITHOUT_END = 100
"""Steps between the lines of a run without end."""
REFRESH_PER_SECOND = 4
"""How often the bar is drawn. Drawing takes time from the engine where both share a core."""


class ProgressBar:
    """A callback of `finetune`: a live bar in a terminal, a plain line now and then elsewhere.

    Each evaluation prints a line of its own. `close` may be called at any time and more than once. The run calls it
    whether it succeeds, fails or is interrupted by Ctrl-C, so the terminal is left as it was.
    """

    def __init__(self, steps: int | None, console: Console | None = None) -> None:
        self._steps = steps
        # Standard output stays free for results: a program's output may be piped into another.
        self._console = console or Console(stderr=True)
        self._bar = _make_bar(self._console) if self._console.is_terminal else None
        self._task = self._bar.add_task("train", total=steps, numbers="") if self._bar else None
        self._every = EVERY_WITHOUT_END if steps is None else max(1, -(-steps // PLAIN_LINES))
        self._started: tuple[float, int] | None = None
        """Time and step of the first record. The rate counts from there, because a resumed job does not begin at 0."""

    def __call__(self, run: JobResult, record: Mapping[str, Any]) -> None:
        if self._bar is not None:
            # At the first record, not before: an error before it leaves the terminal alone. Later calls do nothing.
            self._bar.start()
        if is_evaluation(record):
            scores: Mapping[str, Any] = record
            shown = "reward" if "eval_reward" in scores else "loss"
            text = f"validation {shown} {scores[f'eval_{shown}']:.4f}, accuracy {scores['eval_accuracy']:.4f}"
            self._print(f"step {record['step']}: {text}")
        else:
            self._on_step(run, record["step"])

    def _on_step(self, run: JobResult, step: int) -> None:
        now = time.monotonic()
        if self._started is None:
            self._started = (now, step)
        elapsed, done = now - self._started[0], step - self._started[1]
        rate = done / elapsed if done and elapsed else None
        numbers = _describe(run.history[-WINDOW:], rate) + _engines(run)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step % self._every == 0 or step == self._steps:
            if self._steps is None:
                self._print(f"step {step}: {numbers}")
                return
            left = f", {_clock((self._steps - step) / rate)} left" if rate else ""
            self._print(f"step {step}/{self._steps}: {numbers}{left}")

    def _print(self, line: str) -> None:
        # rich would break the line at 80 columns where the output is a file, and one line must stay one line to grep.
        self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop drawing and show the cursor again."""
        if self._bar is not None:
            self._bar.stop()


def with_progress(callbacks: Iterable[Callback], config: JobConfig) -> list[Callback]:
    """The callbacks with a progress bar behind them."""
    return [*callbacks, ProgressBar(None if config.continual else config.steps)]


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


def _describe(recent: Sequence[Mapping[str, Any]], rate: float | None) -> str:
    shown = "reward" if "reward" in recent[0] else "loss"
    value = sum(record[shown] for record in recent) / len(recent)
    accuracy = sum(record["accuracy"] for record in recent) / len(recent)
    speed = "-" if rate is None else f"{rate:.1f}"
    return f"{shown} {value:.4f}, accuracy {accuracy:.3f}, {speed} steps/s"


def _engines(run: JobResult) -> str:
    """How many of a cluster's engines work now; nothing where one engine runs the job."""
    ready = sum(engine["ready"] for engine in run.engines.values())
    return f", {ready} engine{'s' * (ready != 1)}" if run.engines else ""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
