"""A plan as one page to open in a browser: tables and pictures (SVG), nothing to be fetched."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from .plan import Plan, PlannedMethod
from .report import ENGINE_PART, PARTS, PHASES, MemoryReport, MiB, engine_title, mib


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; width: 100%; } th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; }
th { text-align: left; vertical-align: bottom; } td.number, th.number { text-align: right; } td { white-space: nowrap; } td:nth-child(2) { white-space: normal; }
td.problem { color: #777; } svg { width: 100%; height: auto; } figure { margin: 1.5rem 0; } svg text { font-size: 12px; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
.steps { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem; }
.steps figure { margin: 0; } footer { color: #777; margin-top: 2rem; }
"""


def plan_page(plan: Plan) -> str:
    """`plan` as a page: its table, the peak of each method by what it holds, and live memory over each step."""
    title = escape(plan.title)
    shown = PARTS if plan.sharding is None else (*PARTS, ENGINE_PART)
    reports = [(row.method.name, row.report) for row in plan.rows if row.report is not None]
    top = max((_highest(report) for _, report in reports), default=1)
    steps = "".join(_step(name, report, top) for name, report in reports if report.timeline)
    keys = "".join(f'<span class="key" style="background: {color}"></span>{label}' for label, _, color in shown)
    parts = [
        f"<h1>Memory of a training step: {title}</h1>",
        "<p>Estimated from shapes: nothing was run or allocated. <b>Saved</b> is what is kept for the backward pass, "
        "<b>peak</b> everything that is live at once, parameters and optimiser included.</p>",
        _table(plan),
        f"<h2>What the peak consists of</h2><p>{keys}</p>{_bars(reports, plan.budget)}" if reports else "",
        f'<h2>Live memory over the step</h2><p>Gradients, kept activations and working set, operator by operator, on '
        f'one scale; shades: forward, backward, optimiser.</p><div class="steps">{steps}</div>' if steps else "",
        "<footer>peft-s2a plan</footer>",
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{title}</title><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


def _table(plan: Plan) -> str:
    headings = ["trainable", "%", "saved, MiB/image", "peak, MiB", "of it the step, MiB"]
    if plan.sharding is not None:
        headings.append(f"of that {engine_title(plan.sharding.engine)}, MiB")
    if plan.budget is not None:
        headings.append(f"largest batch in {plan.budget / 2**30:.4g} GiB")
    head = "<th>method</th><th>trains</th>" + "".join(f'<th class="number">{heading}</th>' for heading in headings)
    rows = "\n".join(f"<tr>{_row(row, plan.batch_size, len(headings))}</tr>" for row in plan.rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


def _row(row: PlannedMethod, batch_size: int, columns: int) -> str:
    name = f"<td>{escape(row.method.name)}</td>"
    if row.report is None:
        return f'{name}<td class="problem" colspan="{1 + columns}">{escape(row.problem or "")}</td>'
    report = row.report
    cells = [
        f"{report.trainable_parameters:,}",
        f"{report.trainable_parameters / report.total_parameters:.2%}",
        mib(report.saved_bytes / batch_size),
        mib(report.peak_bytes),
        mib(report.step_peak_bytes),
        *([mib(report.peak.engine)] if report.sharding is not None else []),
    ]
    if row.largest_batch_size is not None:
        cells.append(str(row.largest_batch_size) if row.largest_batch_size else "none fits")
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return f"{name}<td>{escape(row.method.description)}</td>{numbers}"


def _bars(reports: Iterable[tuple[str, MemoryReport]], budget: int | None) -> str:
    """A bar a method, divided by what is live at the peak; a line at the budget, where it is in reach."""
    reports = list(reports)
    left, width, pitch = 150, 700, 26
    most = max(report.peak_bytes for _, report in reports)
    scale = width / most
    height = pitch * len(reports) + 10
    shapes = []
    for place, (name, report) in enumerate(reports):
        y, x = pitch * place + 4, float(left)
        shapes.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        for label, attributes, color in (*PARTS, ENGINE_PART):
            size = sum(getattr(report.peak, attribute) for attribute in attributes)
            if not size:
                continue
            hint = f"<title>{label}: {mib(size)} MiB</title>"
            shapes.append(
                f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="18" fill="{color}">{hint}</rect>'
            )
            x += size * scale
        shapes.append(f'<text x="{x + 6:.1f}" y="{y + 14}">{report.peak_bytes / MiB:,.0f} MiB</text>')
    if budget is not None and budget < most:
        x = left + budget * scale
        shapes.append(
            f'<path d="M{x:.1f} 0 V{height}" stroke="#000" stroke-dasharray="3 3"><title>budget</title></path>'
        )
    return (
        f'<figure><svg viewBox="0 0 {left + width + 90} {height}" role="img" aria-label="peak of each method">'
        f"{''.join(shapes)}</svg></figure>"
    )


def _step(name: str, report: MemoryReport, top: int) -> str:
    """Live bytes at each operator's own peak, stacked."""
    width, height = 320, 130
    count = len(report.timeline)
    shapes = []
    start = 0
    for phase in PHASES:
        span = sum(moment[0] == phase for moment in report.timeline)
        shade = {"forward": "#fafafa", "backward": "#f0f0f0", "optimizer": "#e4e4e4"}[phase]
        x, w = width * start / count, width * span / count
        shapes.append(f'<rect x="{x:.1f}" y="0" width="{w:.1f}" height="{height}" fill="{shade}"/>')
        start += span
    below: list[int] = [0] * count
    for place, (label, _, color) in enumerate((*PARTS[2:], ENGINE_PART)):
        sizes = [moment[1:][place] for moment in report.timeline]
        above = [low + size for low, size in zip(below, sizes)]
        outline = [*enumerate(above), *reversed([*enumerate(below)])]
        points = " ".join(
            f"{width * i / max(count - 1, 1):.1f},{height * (1 - size / top):.1f}" for i, size in outline
        )
        shapes.append(f'<polygon points="{points}" fill="{color}"><title>{label}</title></polygon>')
        below = above
    return (
        f"<figure><figcaption>{escape(name)}: {_highest(report) / MiB:,.0f} MiB</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="live memory over the step of {escape(name)}">'
        f"{''.join(shapes)}</svg></figure>"
    )


def _highest(report: MemoryReport) -> int:
    return max((sum(moment[1:]) for moment in report.timeline), default=report.step_peak_bytes)
