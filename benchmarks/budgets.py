"""Images a second within a memory budget, and the least memory in which an image can be trained, from the rows that
`memory_and_speed.py --preset budget` measures.

The budget is for all that a training step holds: parameters, optimiser state, batch, gradients, activations. Of a few
batch sizes (rows of the axis "images") a line gives the largest micro-batch that fits. Where this machine takes it in
reasonable time it is then measured (rows of the axis "budget"): it has to fit, and its images a second count. Elsewhere
the micro-batch is *planned*, and its images a second are taken to be those of the largest batch that was measured,
which for a device that small batches leave idle is too little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np


MiB, GiB = 2**20, 2**30
Row = dict[str, Any]


@dataclass(frozen=True)
class Fit:
    """What fits a budget.

    Attributes:
        micro_batch: Images that go through the model at once, 0 where not even one fits.
        images_per_second: None where nothing fits.
        measured: Whether this micro-batch was run, or only planned.
    """

    budget_bytes: int
    micro_batch: int
    images_per_second: float | None
    measured: bool


def rows_of(rows: Iterable[Row], backbone: str, method: str) -> list[Row]:
    """Those that were measured, the smallest batch first."""
    found = [row for row in rows if (row["backbone"], row["method"]) == (backbone, method) and "skipped" not in row]
    return sorted((row for row in found if row["axis"] in ("images", "budget")), key=lambda row: row["batch_size"])


def line_of(rows: list[Row]) -> tuple[float, float]:
    """Bytes of a step without and for each image, fitted to the rows of the axis "images"."""
    points = [row for row in rows if row["axis"] == "images"]
    slope, intercept = np.polyfit(
        [row["batch_size"] for row in points], [row["total_bytes"] for row in points], min(1, len(points) - 1)
    )
    return float(intercept), float(slope)


def planned_batch(rows: list[Row], budget: int) -> int:
    """The largest batch that fits by the line, 0 for none."""
    intercept, slope = line_of(rows)
    return max(0, math.floor((budget - intercept) / slope + 1e-6))  # the fit's rounding must not cost an image


def rate(row: Row) -> float:
    """Images a second."""
    return row["batch_size"] / row["step_seconds"]


def fit(rows: list[Row], budget: int, micro_batch: int | None = None) -> Fit:
    """The largest micro-batch for a budget, of one method on one backbone.

    Args:
        rows: `rows_of` them.
        micro_batch: That of a method which adds up gradients of as many images; None: it is chosen.
    """
    if micro_batch is not None:  # the batch takes next to nothing then, and each of its images the same time
        fits = rows[0]["total_bytes"] <= budget
        return Fit(budget, micro_batch, rate(rows[-1]), True) if fits else Fit(budget, 0, None, True)
    measured = {row["batch_size"]: row for row in rows}
    size, slope = planned_batch(rows, budget), line_of(rows)[1]
    while size in measured and (excess := measured[size]["total_bytes"] - budget) > 0:
        size = max(0, size - max(1, math.ceil(excess / slope)))
    # what is known to fit does, whatever the line says
    size = max(size, max((row["batch_size"] for row in rows if row["total_bytes"] <= budget), default=0))
    if size == 0:
        return Fit(budget, 0, None, True)
    row = measured.get(size)
    return Fit(budget, size, rate(row or rows[-1]), row is not None)


def to_measure(rows: list[Row], budgets: Iterable[int], longest_step: float) -> Iterator[int]:
    """Micro-batches for the budgets that are only planned, and that a step of at most ``longest_step`` seconds is
    expected to take. One that turns out not to fit gives way to a smaller one: ask again after measuring."""
    for size in dict.fromkeys(found.micro_batch for budget in budgets if not (found := fit(rows, budget)).measured):
        if size / rate(rows[-1]) <= longest_step:
            yield size


def figures(rows: list[Row], budgets: Iterable[int], micro_batch_of: Callable[[str], int | None]) -> list[Row]:
    """One row a backbone and method: the least memory of an image, and what fits each budget."""
    found = []
    for backbone, method in dict.fromkeys((row["backbone"], row["method"]) for row in rows):
        mine = rows_of(rows, backbone, method)
        if len([row for row in mine if row["axis"] == "images"]) < 2 or mine[0]["batch_size"] != 1:
            continue
        intercept, slope = line_of(mine)
        fits = [asdict(fit(mine, budget, micro_batch_of(method))) for budget in budgets]
        found.append(
            {
                "backbone": backbone,
                "method": method,
                "smallest_bytes": mine[0]["total_bytes"],
                "fixed_bytes": intercept,
                "bytes_per_image": slope,
                "fits": fits,
            }
        )
    return found


def cell(fitted: Row) -> str:
    """``images a second (micro-batch)``, planned ones marked."""
    if not fitted["micro_batch"]:
        return "-"
    sign = "" if fitted["measured"] else "~"
    return f"{sign}{fitted['images_per_second']:.2f} ({fitted['micro_batch']:,})"


def gib(budget: int) -> str:
    return f"{budget / GiB:g} GiB"


def plot(found: list[Row], path: Path) -> None:
    """Images a second over the budget, a panel a backbone; hollow markers are planned."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    backbones = list(dict.fromkeys(row["backbone"] for row in found))
    methods = list(dict.fromkeys(row["method"] for row in found))
    figure = Figure(figsize=(3.4 * len(backbones) + 0.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    colors = ["#7570b3", "#d95f02", "#e7298a", "#a6761d", "#666666", "#1b9e77", "#66a61e"]
    for axes, backbone in zip(figure.subplots(1, len(backbones), squeeze=False)[0], backbones):
        for row in (row for row in found if row["backbone"] == backbone):
            fits = [each for each in row["fits"] if each["micro_batch"]]
            color = colors[methods.index(row["method"]) % len(colors)]
            budgets = [each["budget_bytes"] / GiB for each in fits]
            rates = [each["images_per_second"] for each in fits]
            axes.plot(budgets, rates, color=color, linewidth=2.5 if row["method"] == "S2A" else 1.2)
            for at, per_second, each in zip(budgets, rates, fits):
                face = color if each["measured"] else "white"
                axes.plot(at, per_second, "o", color=color, markerfacecolor=face, markersize=5)
        sizes = [each["budget_bytes"] / GiB for each in found[0]["fits"]]
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.minorticks_off()
        axes.set(title=backbone, xlabel="budget, GiB", xlim=(sizes[0] / 1.3, sizes[-1] * 1.3), ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("images a second (hollow: planned)")
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colors[i % len(colors)], label=name) for i, name in enumerate(methods)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
