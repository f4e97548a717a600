"""PNG plots of benchmark results; needs matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BAR = 0.3  # inches of height a bar


def _pyplot() -> Any:
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: install the extra [bench]") from error
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def draw_head(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Time over the GEMM floor and peak memory, a bar for each provider and case.

    Args:
        rows: as in the JSON of `bench head`; rows without numbers are left out.
        path: the PNG to write.
    """
    plt = _pyplot()
    shown = [row for row in rows if row["ratio"] is not None]
    labels = [f"{row['case']['name']}   {row['provider']}" for row in shown]
    colours = _colours([row["provider"] for row in shown])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14, 1.5 + _BAR * max(len(shown), 1)), sharey=True
    )
    places = range(len(shown))
    medians = [row["ratio"]["median"] for row in shown]
    spans = [
        [row["ratio"]["median"] - row["ratio"]["low"] for row in shown],
        [row["ratio"]["high"] - row["ratio"]["median"] for row in shown],
    ]
    left.barh(places, medians, xerr=spans, color=colours)
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_yticks(places, labels, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("time over the bare GEMMs (forward and backward)")
    peaks = [row["peak"]["allocated"] / 2**20 if row["peak"] else 0.0 for row in shown]
    right.barh(places, peaks, color=colours)
    right.set_xlabel("peak memory above inputs and gradients, MiB")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_loop(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Held-out accuracy over CPU seconds, a line for each trainer.

    Args:
        runs: trainer -> points with `cpu_seconds` and `accuracy`.
        path: the PNG to write.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, points in runs.items():
        seconds = [point["cpu_seconds"] for point in points]
        axes.plot(seconds, [point["accuracy"] for point in points], marker="o", label=name)
    axes.set_xlabel("CPU seconds of training")
    axes.set_ylabel("held-out exact match")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _colours(providers: Sequence[str]) -> list[str]:
    """One colour a provider, in order of first appearance."""
    order = list(dict.fromkeys(providers))
    return [f"C{order.index(provider) % 10}" for provider in providers]
