"""What a training step costs in memory: the figures, as a table, a picture and plain data."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


MiB = 2**20
PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class KeptBytes:
    """Bytes kept for backward, by how they are kept.

    Attributes:
        full_precision: Floating-point tensors.
        quantized: Codes of this package's operators, with the scales, offsets and row statistics kept beside them.
        masks: Booleans and integers of stock operators: dropout masks, pooling indices, labels.
    """

    full_precision: int = 0
    quantized: int = 0
    masks: int = 0

    @property
    def total(self) -> int:
        return self.full_precision + self.quantized + self.masks

    def __add__(self, other: KeptBytes) -> KeptBytes:
        return KeptBytes(
            self.full_precision + other.full_precision, self.quantized + other.quantized, self.masks + other.masks
        )


# What peaks are drawn of: (label, attributes of `PeakBytes`, colour).
PARTS = (
    ("parameters and batch", ("parameters", "batch"), "#bdbdbd"),
    ("optimiser state", ("optimizer",), "#737373"),
    ("gradients", ("gradients",), "#e6ab02"),
    ("kept activations", ("kept",), "#1b9e77"),
    ("working set", ("working",), "#7570b3"),
)
ENGINE_PART = ("added by the engine", ("engine",), "#d95f02")


@dataclass(frozen=True)
class PeakBytes:
    """The moment of a step at which most bytes are live, and what they are.

    Attributes:
        parameters: Parameters and buffers.
        batch: The inputs and labels.
        optimizer: Optimiser state.
        gradients: Gradients of the parameters that are already complete.
        kept: Activations kept for backward that are still live.
        working: Everything else: outputs in flight, gradients of activations, temporaries of kernels.
        phase: "forward", "backward" or "optimizer".
        module: Name of the module at work ("" outside any).
        operator: Name of the operator at work, such as "aten::addmm".
        engine: What an engine for several processes adds: buckets, gathered parameters, flat buffers.
    """

    parameters: int
    batch: int
    optimizer: int
    gradients: int
    kept: int
    working: int
    phase: str
    module: str
    operator: str
    engine: int = 0

    @property
    def total(self) -> int:
        fixed = self.parameters + self.batch + self.optimizer
        return fixed + self.gradients + self.kept + self.working + self.engine


@dataclass(frozen=True)
class MemoryReport:
    """Memory of one training step (forward, backward, optimiser), measured or estimated. All sizes are in bytes.

    Attributes:
        source: "profile" (measured), "estimate" (from shapes alone) or "extrapolation" (from two estimates).
        device: The device type of the step, "cpu" or "cuda".
        batch_size: Leading dimension of the batch.
        trainable_parameters: Number of trained values.
        total_parameters: Number of all parameter values.
        parameter_bytes: Parameters and buffers.
        gradient_bytes: Gradients of the parameters when backward ends.
        optimizer_bytes: Optimiser state after a step.
        batch_bytes: The inputs and labels.
        saved_bytes: What autograd keeps for backward: unique storages, without parameters and buffers. A batch that
            is kept (the input of a trained first layer) counts here and in `batch_bytes`.
        by_operator: `saved_bytes` by the operator that keeps it, under autograd's name for it ("gelu", "addmm"). A
            storage kept by several counts once, for the first that kept it.
        by_module: `saved_bytes` by the innermost module that was running.
        peak: Highest live bytes, split by what they are.
        unplanned: {module: why it ran without a plan, or in one piece where tiles were wanted}
            (`activations.wrap.unplanned`).
        sharp_attention: {module: by how much the codes move the logits of its attention} where that is too much for
            precise gradients (`activations.wrap.sharp_attention`); empty in an estimate.
        step_seconds: Duration of one step, None in an estimate.
        timeline: For each operator of the step, in order: (phase, gradients, kept, working, engine) live at its own
            peak. Of a measured step it is that of the watched run, which may reach above `peak`.
        processes: How many processes train together. Bytes and the batch are those of one of them, the numbers of
            parameters those of the model.
        sharding: The engine they do it under ("ddp", "fsdp2", "zero2", "zero3"), None for one process.
    """

    source: str
    device: str
    batch_size: int
    trainable_parameters: int
    total_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    saved_bytes: int
    by_operator: Mapping[str, KeptBytes]
    by_module: Mapping[str, KeptBytes]
    peak: PeakBytes
    unplanned: Mapping[str, str] = field(default_factory=dict)
    sharp_attention: Mapping[str, float] = field(default_factory=dict)
    step_seconds: float | None = None
    timeline: tuple[tuple[str, int, int, int, int], ...] = field(default=(), repr=False)
    processes: int = 1
    sharding: str | None = None

    @property
    def peak_bytes(self) -> int:
        """Highest live bytes of the step, with everything: what has to fit on the device."""
        return self.peak.total

    @property
    def step_peak_bytes(self) -> int:
        """The part of `peak_bytes` that the step itself adds to parameters, optimiser state and batch."""
        return self.peak.gradients + self.peak.kept + self.peak.working + self.peak.engine

    @property
    def kept(self) -> KeptBytes:
        """`saved_bytes`, by how they are kept."""
        return sum(self.by_operator.values(), KeptBytes())

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain data (the timeline left out), fit for JSON."""
        data = asdict(self)
        del data["timeline"]
        data["peak_bytes"] = self.peak_bytes
        data["step_peak_bytes"] = self.step_peak_bytes
        return data

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip("\n")

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        peak = Table("live at the peak")
        peak.add_column("MiB", justify="right")
        peak.add_column("share", justify="right")
        for label, size in (
            ("parameters and buffers", self.peak.parameters),
            ("optimiser state", self.peak.optimizer),
            ("batch", self.peak.batch),
            ("gradients", self.peak.gradients),
            ("kept activations", self.peak.kept),
            ("working set", self.peak.working),
            *([("added by " + engine_title(self.sharding), self.peak.engine)] if self.sharding is not None else []),
        ):
            peak.add_row(label, mib(size), f"{size / max(self.peak_bytes, 1):.1%}")
        peak.add_section()
        peak.add_row("all", mib(self.peak_bytes), "", style="bold")

        how = {"profile": "Measured", "estimate": "Estimated", "extrapolation": "Extrapolated"}[self.source]
        place = f"{self.peak.operator}{' of ' if self.peak.module else ''}{self.peak.module}"
        duration = f" It takes {self.step_seconds:.3f} s." if self.step_seconds is not None else ""
        return Group(
            f"{how} memory of a training step: {self.device}, batch of {self.batch_size}{in_each(self.processes, self.sharding)}, "
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters trained "
            f"({self.trainable_parameters / max(self.total_parameters, 1):.2%})",
            peak,
            f"The peak stands in the {self.peak.phase} pass, at {place}.",
            f"The step adds {mib(self.step_peak_bytes)} MiB to parameters, optimiser state and batch.{duration}",
            self._kept_table("kept for backward by", self.by_operator),
            self._kept_table("kept for backward in (* is any index)", _by_pattern(self.by_module)),
            *self._unplanned_lines(),
            *self._sharp_lines(),
        )

    def _unplanned_lines(self) -> list[str]:
        modules = defaultdict(list)
        for name, reason in self.unplanned.items():
            modules[_pattern(name), reason].append(name)
        return [
            f"Without a plan: {pattern or 'the whole model'} ({len(names)}), because {reason}."
            if not reason.startswith("in one piece")
            else f"Planned {reason}: {pattern or 'the whole model'} ({len(names)})."
            for (pattern, reason), names in modules.items()
        ]

    def _sharp_lines(self) -> list[str]:
        found = defaultdict(list)
        for name, error in self.sharp_attention.items():
            found[_pattern(name)].append(error)
        return [
            f"Attention too sharp for its codes: {pattern or 'the whole model'} ({len(errors)}), whose logits they move by up "
            f'to {max(errors):.2f}; give it 8 bits: bits={{"attention": 8}}.'
            for pattern, errors in found.items()
        ]

    def _kept_table(self, heading: str, sizes: Mapping[str, KeptBytes]) -> Table:
        from rich.table import Table

        table = Table()
        table.add_column(heading, overflow="fold")
        for column in ("full precision", "quantised", "masks", "MiB", "MiB/sample"):
            table.add_column(column, justify="right")
        for name, size in [*_largest(sizes, 12).items(), ("all", self.kept)]:
            cells = map(mib, (size.full_precision, size.quantized, size.masks, size.total))
            if name == "all":
                table.add_section()
            style = "bold" if name == "all" else None
            table.add_row(name, *cells, mib(size.total / max(self.batch_size, 1)), style=style)
        return table

    def plot(self, path: str | Path) -> None:
        """Draws live memory over the step, and what is kept for backward by operator.

        Args:
            path: Where to write; the suffix picks the format (.png, .svg, .pdf).

        Raises:
            ImportError: Without matplotlib.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("MemoryReport.plot needs matplotlib: pip install 'peft-s2a[plot]'") from error

        figure = Figure(figsize=(12, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        live, kept = figure.subplots(1, 2, width_ratios=(3, 2))

        fixed = self.peak.parameters + self.peak.batch + self.peak.optimizer
        columns = list(zip(*(row[1:] for row in self.timeline))) or [(0,)] * 4
        layers = [[fixed / MiB] * len(columns[0]), *([size / MiB for size in column] for column in columns)]
        labels = ["parameters, optimiser, batch", "gradients", "kept activations", "working set"]
        colors = ["#bdbdbd", "#e6ab02", "#1b9e77", "#7570b3"]
        if self.sharding is None:
            del layers[-1]
        else:
            labels.append(f"added by {engine_title(self.sharding)}")
            colors.append("#d95f02")
        live.stackplot(range(len(columns[0])), layers, labels=labels, colors=colors, step="mid")
        for phase in PHASES[1:]:
            start = next((index for index, row in enumerate(self.timeline) if row[0] == phase), None)
            if start is not None:
                live.axvline(start, color="black", linewidth=0.8, linestyle=":")
                live.annotate(phase, (start, 0.99), xycoords=("data", "axes fraction"), rotation=90, va="top")
        live.set(xlabel="operator of the step", ylabel="live, MiB", title=f"Peak {mib(self.peak_bytes)} MiB")
        live.set_xlim(0, max(len(columns[0]) - 1, 1))
        live.legend(loc="lower right", fontsize="small")

        largest = _largest(self.by_operator, 10)
        names = list(largest)[::-1]
        left = [0.0] * len(names)
        for attribute, label, color in (
            ("quantized", "quantised", "#1b9e77"),
            ("masks", "masks", "#66a61e"),
            ("full_precision", "full precision", "#d95f02"),
        ):
            widths = [getattr(largest[name], attribute) / MiB for name in names]
            kept.barh(names, widths, left=left, label=label, color=color)
            left = [start + width for start, width in zip(left, widths)]
        kept.set(xlabel="kept for backward, MiB", title=f"Kept {mib(self.saved_bytes)} MiB")
        kept.legend(loc="lower right", fontsize="small")

        figure.suptitle(f"Training step, {self.source}: {self.device}, batch of {self.batch_size}")
        figure.savefig(path, dpi=150)


ENGINE_TITLES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


def engine_title(sharding: str) -> str:
    """What users call an engine."""
    return ENGINE_TITLES[sharding]


def in_each(processes: int, sharding: str | None) -> str:
    """Of which processes a report speaks, as a part of a sentence; empty for one process."""
    return "" if sharding is None else f" in each of {processes:,} processes ({engine_title(sharding)})"


def mib(size: float) -> str:
    """`size` bytes in MiB, as text."""
    return f"{size / MiB:,.2f}"


def _by_pattern(by_module: Mapping[str, KeptBytes]) -> dict[str, KeptBytes]:
    """Modules that differ only in an index (the blocks of a stage) added up: `layers.3.mlp` becomes `layers.*.mlp`."""
    patterns: dict[str, KeptBytes] = defaultdict(KeptBytes)
    for name, size in by_module.items():
        patterns[_pattern(name)] += size
    return patterns


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _largest(sizes: Mapping[str, KeptBytes], count: int) -> dict[str, KeptBytes]:
    """The `count` largest entries, largest first, and the rest as one."""
    ordered = sorted(sizes.items(), key=lambda item: -item[1].total)
    shown = {name or "(outside any module)": size for name, size in ordered[:count]}
    if rest := ordered[count:]:
        shown[f"{len(rest)} others"] = sum((size for _, size in rest), KeptBytes())
    return shown
