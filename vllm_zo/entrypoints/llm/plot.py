"""Draws the picture of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_zo.errors import ConfigError

SMOOTHING = 20
"""The curve over the raw training loss is a moving average over this many steps."""


def plot_run(
    history: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], path: str | Path, title: str = ""
) -> None:
    """Draw loss or reward (left) and accuracy (right) over steps: batches raw and smoothed, validation as points.

    Raises:
        ConfigError: matplotlib is not installed.
        OSError: `path` cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plot: matplotlib is not installed; pip install 'vllm-zo[plot]'.") from error
    # Not pyplot: it picks a window toolkit, and keeps every figure alive until it is closed.
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    steps = [r["step"] for r in history]
    rewarded = bool(history) and "reward" in history[0]
    left = ("reward", "reward") if rewarded else ("loss", "loss (nats)")
    for axis, (key, label) in zip(axes, (left, ("accuracy", "accuracy")), strict=True):
        values = [r[key] for r in history]
        axis.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8, label="training batch")
        axis.plot(steps, _smooth(values), color="tab:blue", label=f"mean of {SMOOTHING} steps")
        if evaluations:
            axis.plot(
                [e["step"] for e in evaluations],
                [e[f"eval_{key}"] for e in evaluations],
                "o-",
                color="tab:orange",
                label="validation",
            )
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _smooth(values: Sequence[float]) -> list[float]:
    out = []
    for i in range(len(values)):
        window = values[max(0, i - SMOOTHING + 1) : i + 1]
        out.append(sum(window) / len(window))
    return out
