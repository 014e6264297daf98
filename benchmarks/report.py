"""From timed windows to the printed table."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.shapes import title

FOREIGN_LOAD_LIMIT = 0.05
"""If other processes take a larger share of the cores than this during a window, the table has a warning."""


def window_figures(window: dict[str, Any], interval: int) -> dict[str, float]:
    """The figures of one window, in ms.

    plain       median of the steps that do not refresh
    refresh     mean of the steps that do: the fold, a new V, and the step itself
    amortised   plain + (refresh - plain) / interval: a step with its share of the refresh. For a window of whole
                intervals this is its mean with damped outliers among the plain steps. For the first steps of an
                interval it is the same estimate from fewer steps.
    mean        mean of all steps of the window (not comparable if the contender took only its first steps)
    """
    by_kind: dict[bool, list[float]] = {True: [], False: []}
    for step, ms in enumerate(window["ms"], start=window["start"]):
        by_kind[step % interval == 0].append(ms)
    plain, refresh = median(by_kind[False]), sum(by_kind[True]) / len(by_kind[True])
    return {
        "plain": plain,
        "refresh": refresh,
        "amortised": plain + (refresh - plain) / interval,
        "mean": sum(window["ms"]) / len(window["ms"]),
    }


def summarise(measured: dict[str, Any], interval: int, reference: str) -> dict[str, Any]:
    """Add figures over the rounds to the measured windows: medians, ranges and ratios.

    It takes a ratio within a round, between windows that are at most minutes apart, and then the median of the ratios.
    So a machine that slows down during the run changes both sides of a ratio. Where one of the two took only the first
    steps of a window, the other's first steps count too: batches differ in their tokens.
    """
    for contender in measured.values():
        contender["rounds"] = rounds = [window_figures(window, interval) for window in contender["windows"]]
        amortised = [figures["amortised"] for figures in rounds]
        pairs = zip(contender["windows"], measured[reference]["windows"], strict=True)
        ratios = [ratio_of(own, other, interval) for own, other in pairs]
        contender["summary"] = {
            **{f"{key}_ms": median(figures[key] for figures in rounds) for key in rounds[0]},
            "amortised_range_ms": (min(amortised), max(amortised)),
            f"ratio_to_{reference}": median(ratios),
            "ratio_range": (min(ratios), max(ratios)),
            "foreign_load": max(window["foreign_load"] for window in contender["windows"]),
            "gpu_bytes": max(window.get("gpu_bytes", 0) for window in contender["windows"]),
            "refreshes": sum(step % interval == 0 for w in contender["windows"] for step in steps_of(w)),
        }
    return measured


def ratio_of(own: dict[str, Any], other: dict[str, Any], interval: int) -> float:
    """The amortised time of one window over that of another, of the steps that both took."""
    count = min(len(own["ms"]), len(other["ms"]))
    figures = [window_figures({**window, "ms": window["ms"][:count]}, interval) for window in (own, other)]
    return figures[0]["amortised"] / figures[1]["amortised"]


def steps_of(window: dict[str, Any]) -> range:
    return range(window["start"], window["start"] + len(window["ms"]))


def show(document: dict[str, Any]) -> None:
    """Print the table, and a warning if other processes used the cores."""
    settings, machine, contenders = (document[key] for key in ("settings", "machine", "contenders"))
    console = Console(width=None if Console().is_terminal else 120)
    isa = ", ".join(flag for flag, present in machine["isa"].items() if present)
    console.print(f"{machine['cpu']}, {len(settings['cores'])} cores; {isa}; {machine['versions']}", highlight=False)
    console.print(
        f"{title(settings['shape'])} {settings['dtype']}, batch {settings['batch']}, rank {settings['rank']}, "
        f"interval {settings['interval']}, {settings['rounds']} windows of {settings['window']} steps; "
        f"ours: {settings['method']} in {settings['space']} space",
        highlight=False,
    )
    ratio = next(key for key in next(iter(contenders.values()))["summary"] if key.startswith("ratio_to_"))
    least = document.get("floor")
    if least is not None:
        show_card(console, document)
    table = Table(
        "contender", *("ms/step", "min-max", "plain", "refresh", ratio.replace("_", " "), "min-max", "others"),
        *(("of floor", "GiB") if least else ()),
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for name, contender in contenders.items():
        s = contender["summary"]
        low, high = s["amortised_range_ms"]
        low_ratio, high_ratio = s["ratio_range"]
        table.add_row(
            name, f"{s['amortised_ms']:.1f}", f"{low:.1f}-{high:.1f}", f"{s['plain_ms']:.1f}", f"{s['refresh_ms']:.1f}",
            f"{s[ratio]:.2f}", f"{low_ratio:.2f}-{high_ratio:.2f}", f"{s['foreign_load']:.0%}",
            *((f"{least['ms'] / s['amortised_ms']:.0%}", f"{s['gpu_bytes'] / 2**30:.1f}") if least else ()),
        )  # fmt: skip
    console.print(table)
    console.print(
        "ms/step: median over the windows, share of the refresh included. others: cores taken by others, worst window."
    )
    if max(c["summary"]["foreign_load"] for c in contenders.values()) > FOREIGN_LOAD_LIMIT:
        console.print(
            "[yellow]Other processes were busy: repeat on a quiet machine before quoting these figures.[/yellow]"
        )


def show_card(console: Console, document: dict[str, Any]) -> None:
    """The GPU, the floor of a step on it, and how the contenders shared it."""
    card, least, settings = document["machine"]["gpu"], document["floor"], document["settings"]
    rates = card["rates"]
    console.print(
        f"{card['name']}, driver {card['driver']}, CUDA {card['cuda']}; measured here: a product of 8192 "
        f"{rates['flops_per_s'] / 1e12:.0f} TFLOP/s, a copy {rates['bytes_per_s'] / 1e9:.0f} GB/s",
        highlight=False,
    )
    console.print(
        f"floor {least['ms']:.2f} ms: the linear layers' arithmetic for {least['tokens']:.0f} tokens "
        f"{least['arithmetic_ms']:.2f}, their weights read once {least['traffic_ms']:.2f}",
        highlight=False,
    )
    sharing = "they do not fit together: each was started for its window alone" if settings["apart"] else "all resident"
    console.print(f"contenders: {sharing}. GiB: most that torch had allocated, a KV cache included.", highlight=False)
