"""The curves of convergence.py as Markdown tables and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Curve = dict[str, Any]
SMOOTHING = 50
"""Steps in the moving average of the training loss: one interval of V."""
COMPARED = (("ours", "plain"), ("plain", "plain-float64"))
"""The second pair is a control: the same program and trajectory with other rounding."""


def markdown(curves: dict[str, Curve]) -> str:
    """The settings, the table of results, and the table of differences."""
    return "\n\n".join([_settings(curves), _results(curves), _differences(curves)])


def _settings(curves: dict[str, Curve]) -> str:
    s = next(iter(curves.values()))["settings"]
    bases = "default" if s["bases"] is None else s["bases"]
    return (
        f"{s['steps']} steps, batch {s['batch']}, learning rate {s['learning_rate']:g}, eps {s['eps']:g}, rank "
        f"{s['rank']}, interval {s['interval']}, bases {bases}, seed {s['seed']}; {s['train_rows']} training and "
        f"{s['validation_rows']} validation rows, data seed {s['data_seed']}."
    )


def _results(curves: dict[str, Curve]) -> str:
    lines = [
        "| space | trainer | validation loss | accuracy | best loss (step) | test loss | accuracy | zero-shot test "
        "accuracy | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in curves.values():
        last, best = c["evaluations"][-1], min(c["evaluations"], key=lambda e: e["loss"])
        lines.append(
            f"| {c['space']} | {c['trainer']} | {last['loss']:.4f} | {last['accuracy']:.3f} | {best['loss']:.4f} "
            f"({best['step']}) | {c['test']['loss']:.4f} | {c['test']['accuracy']:.4f} | "
            f"{c['zero_shot']['accuracy']:.4f} | {c['seconds']:.0f} |"
        )
    return "\n".join(lines)


def difference(one: Curve, other: Curve) -> dict[str, float]:
    """The largest gaps between two curves of equal settings. Losses are in nats, accuracies are shares."""
    train = [abs(a[0] - b[0]) for a, b in zip(one["train"], other["train"], strict=True)]
    pairs = list(zip(one["evaluations"], other["evaluations"], strict=True))
    assert all(a["step"] == b["step"] for a, b in pairs)
    return {
        "train_loss_first_100": max(train[:100]),
        "train_loss": max(train),
        "validation_loss": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
        "validation_accuracy": max(abs(a["accuracy"] - b["accuracy"]) for a, b in pairs),
        "test_loss": abs(one["test"]["loss"] - other["test"]["loss"]),
        "test_accuracy": abs(one["test"]["accuracy"] - other["test"]["accuracy"]),
    }


def _differences(curves: dict[str, Curve]) -> str:
    lines = [
        "| largest difference | train loss, first 100 steps | train loss | validation loss | validation accuracy | "
        "test loss | test accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for space in dict.fromkeys(c["space"] for c in curves.values()):
        for names in COMPARED:
            pair = [curves.get(f"{space}-{name}") for name in names]
            if pair[0] is not None and pair[1] is not None:
                d = difference(pair[0], pair[1])
                lines.append(
                    f"| {space}: {names[0]}, {names[1]} | {d['train_loss_first_100']:.1e} | {d['train_loss']:.1e} | "
                    f"{d['validation_loss']:.1e} | {d['validation_accuracy']:.4f} | {d['test_loss']:.1e} | "
                    f"{d['test_accuracy']:.4f} |"
                )
    if (bank := curves.get("bank-ours")) and (fold := curves.get("fold-ours")):
        d = difference(bank, fold)
        lines.append(
            f"| bank against fold, ours | {d['train_loss_first_100']:.1e} | {d['train_loss']:.1e} | "
            f"{d['validation_loss']:.1e} | {d['validation_accuracy']:.4f} | {d['test_loss']:.1e} | "
            f"{d['test_accuracy']:.4f} |"
        )
    return "\n".join(lines)


def plot(curves: dict[str, Curve], path: Path) -> None:
    """Draw training loss (moving average), validation loss and validation accuracy, one line of panels per space."""
    from matplotlib.figure import Figure

    spaces = list(dict.fromkeys(c["space"] for c in curves.values()))
    figure = Figure(figsize=(13, 3.6 * len(spaces)), layout="constrained")
    grid = figure.subplots(len(spaces), 3, squeeze=False, sharex=True, sharey="col")
    styles = {"ours": ("tab:blue", "-", 3.0), "plain": ("tab:orange", "--", 1.5), "plain-float64": ("k", ":", 1.2)}
    for axes, space in zip(grid, spaces, strict=True):
        for curve in (c for c in curves.values() if c["space"] == space):
            color, line, width = styles[curve["trainer"]]
            style = {"color": color, "linestyle": line, "linewidth": width, "label": curve["trainer"]}
            losses = [loss for loss, _ in curve["train"]]
            axes[0].plot(range(1, len(losses) + 1), _smooth(losses), **style)
            steps = [e["step"] for e in curve["evaluations"]]
            for axis, key in ((axes[1], "loss"), (axes[2], "accuracy")):
                axis.plot(steps, [e[key] for e in curve["evaluations"]], **style)
        labels = (f"training loss, mean of {SMOOTHING} steps", "validation loss", "validation accuracy")
        for axis, label in zip(axes, labels, strict=True):
            axis.set_title(f"{space}: {label}", fontsize=10)
            axis.grid(alpha=0.3)
            axis.legend()
    for axis in grid[-1]:
        axis.set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _smooth(values: list[float]) -> list[float]:
    windows = (values[max(0, i - SMOOTHING + 1) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
