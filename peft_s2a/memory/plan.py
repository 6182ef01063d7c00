"""What each way of fine-tuning a model would cost in memory, from shapes alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .estimate import estimate_memory, extrapolate_memory, image_batch, largest_batch_size
from .methods import Method
from .models import VisionModel
from .report import ENGINE_PART, PARTS, MemoryReport, MiB, engine_title, in_each, mib
from .sharding import Sharding, find_sharding


if TYPE_CHECKING:
    from rich.table import Table


# Models that run in tiles have more operators the larger the batch: beyond this size they are extrapolated.
_LARGEST_EXACT = 16


@dataclass(frozen=True)
class PlannedMethod:
    """A row of a plan.

    Attributes:
        method: The way of fine-tuning.
        report: Its estimated memory at the plan's batch size, None where the model does not support it.
        largest_batch_size: The largest batch that fits the budget (0: not even one), None without a budget.
        problem: Why there is no report.
    """

    method: Method
    report: MemoryReport | None = None
    largest_batch_size: int | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method.name,
            "report": self.report.to_dict() if self.report is not None else None,
            "largest_batch_size": self.largest_batch_size,
            "problem": self.problem,
        }


@dataclass(frozen=True)
class Plan:
    """A comparison of ways of fine-tuning one model.

    Attributes:
        model: The model.
        batch_size: Batch size of the reports.
        budget: Bytes that a training step may take, None for no limit.
        rows: One for each method.
        sharding: How several processes share the work; None for one process. The batch, the budget and the reports are
            those of one of them.
    """

    model: VisionModel
    batch_size: int
    budget: int | None
    rows: tuple[PlannedMethod, ...]
    sharding: Sharding | None = None

    @property
    def title(self) -> str:
        """What the plan is about."""
        shared = in_each(self.sharding.processes, self.sharding.engine) if self.sharding is not None else ""
        return f"{self.model.name}, batch of {self.batch_size}{shared}"

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain data, in bytes, fit for JSON."""
        return {
            "model": self.model.name,
            "batch_size": self.batch_size,
            "budget_bytes": self.budget,
            "processes": self.sharding.processes if self.sharding is not None else 1,
            "sharding": self.sharding.engine if self.sharding is not None else None,
            "methods": [row.to_dict() for row in self.rows],
        }

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.title}: estimated memory of a training step", title_justify="left")
        table.add_column("method")
        table.add_column("trains", overflow="fold")
        headings = ["trainable", "%", "saved\nMiB/image", "peak\nMiB", "of it\nthe step"]
        if self.sharding is not None:
            headings.append(f"of that\n{engine_title(self.sharding.engine)}")
        if self.budget is not None:
            headings.append(f"largest batch\nin {self.budget / 2**30:.4g} GiB")
        for heading in headings:
            table.add_column(heading, justify="right")
        for row in self.rows:
            if row.report is None:
                table.add_row(row.method.name, Text(row.problem or "", style="dim"))
                continue
            report = row.report
            cells = [
                f"{report.trainable_parameters:,}",
                f"{report.trainable_parameters / report.total_parameters:.2%}",
                mib(report.saved_bytes / self.batch_size),
                mib(report.peak_bytes),
                mib(report.step_peak_bytes),
                *([mib(report.peak.engine)] if self.sharding is not None else []),
            ]
            if row.largest_batch_size is not None:
                cells.append(str(row.largest_batch_size) if row.largest_batch_size else "none fits")
            table.add_row(row.method.name, row.method.description, *cells)
        return table

    def plot(self, path: str | Path) -> None:
        """Draws the peak of each method, split by what it holds.

        Args:
            path: Where to write; the suffix picks the format (.png, .svg, .pdf).

        Raises:
            ImportError: Without matplotlib.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Plan.plot needs matplotlib: pip install 'peft-s2a[plot]'") from error

        rows = [(row.method.name, row.report.peak) for row in self.rows if row.report is not None][::-1]
        figure = Figure(figsize=(9, 2 + 0.4 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        left = [0.0] * len(rows)
        for label, attributes, color in PARTS if self.sharding is None else (*PARTS, ENGINE_PART):
            widths = [sum(getattr(peak, name) for name in attributes) / MiB for _, peak in rows]
            bars = axes.barh([name for name, _ in rows], widths, left=left, label=label, color=color)
            left = [start + width for start, width in zip(left, widths)]
        axes.bar_label(bars, [f" {total:,.0f}" for total in left], fontsize="small")
        if self.budget is not None and self.budget / MiB < 1.2 * max(left, default=0):
            axes.axvline(self.budget / MiB, color="black", linewidth=0.8, linestyle=":")
        axes.margins(x=0.1)
        axes.set(xlabel="peak of a training step, MiB", title=self.title)
        figure.legend(loc="outside lower center", ncols=3, fontsize="small")
        figure.savefig(path, dpi=150)


def plan_memory(
    model: VisionModel,
    methods: Mapping[str, Method],
    *,
    batch_size: int = 8,
    budget: int | None = None,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    device: str | None = None,
    processes: int = 1,
    sharding: str | None = None,
    reduce_bucket_size: int | None = None,
    track: Callable[[Iterable[Method]], Iterable[Method]] = iter,
) -> Plan:
    """Estimates the memory of fine-tuning a model by several methods, without allocating it.

    Batches of over 16 samples are extrapolated for methods that run the model in tiles (`extrapolate_memory`), whose
    estimates would take ever longer.

    Args:
        model: What to train, see `find_model`.
        methods: The methods compared, such as `METHODS`.
        batch_size: Images in a batch.
        budget: Bytes that a training step may take: adds the largest batch that fits.
        image_size: Pixels of the square images, None for the model's own.
        dtype: Of parameters and images.
        autocast: Low-precision dtype of the forward pass, None for none.
        device: As for `estimate_memory`.
        processes, sharding, reduce_bucket_size: As for `estimate_memory`; then the batch, the budget and all figures are
            those of one process.
        track: Wraps the iteration over the methods, to show progress.

    Raises:
        ValueError: If the model cannot be made or estimated, or the arguments for several processes do not go together.
    """
    shared = find_sharding(processes, sharding, reduce_bucket_size)

    def planned(method: Method) -> PlannedMethod:
        base = model.build(dtype=dtype)
        try:
            with torch.device("meta"):
                tuned = method.apply(base)
        except ValueError as error:
            return PlannedMethod(method, problem=str(error))

        @functools.cache
        def report(size: int) -> MemoryReport:
            if size > _LARGEST_EXACT and len(report(_LARGEST_EXACT // 2).timeline) > 1.2 * len(report(1).timeline):
                return extrapolate_memory(report(_LARGEST_EXACT // 2), report(_LARGEST_EXACT), size)
            return estimate_memory(
                tuned,
                image_batch(tuned, size, image_size),
                loss_fn=model.loss_fn,
                autocast=autocast,
                device=device,
                processes=processes,
                sharding=sharding,
                reduce_bucket_size=reduce_bucket_size,
            )

        largest = largest_batch_size(report, budget, start=batch_size) if budget is not None else None
        return PlannedMethod(method, report(batch_size), largest)

    return Plan(model, batch_size, budget, tuple(planned(method) for method in track(methods.values())), shared)
