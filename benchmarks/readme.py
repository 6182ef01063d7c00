"""Writes the results in README.md from the files in `benchmarks/results`, so that text and data cannot drift apart.

    python benchmarks/readme.py

A section shows every result file of its question, so results of different hardware stand beside each other, each with
its own note. Reduced runs (`make benchmark`) are left out. Sections without a result file stay empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accuracy import accuracies, cost_of_quantisation, mean_and_deviation


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MiB = 2**20
Result = dict[str, Any]


def table(header: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def hardware(data: Result) -> str:
    return f"{data['environment']['device']} (torch {data['environment']['torch']})"


def note(data: Result, text: str) -> str:
    return f"{text} {data.get('note', '')}".strip()


def picture(path: Path, what: str) -> str:
    """The plot beside a result file, if there is one."""
    plot = path.with_suffix(".png")
    return f"![{what}]({plot.relative_to(ROOT).as_posix()})" if plot.is_file() else ""


def demo(data: Result, path: Path) -> list[str]:
    """The table that `make demo` printed."""
    header = (
        "method",
        "test accuracy, %",
        "trainable parameters",
        "kept for backward, KiB/image",
        "peak, MiB",
        "training, s",
    )
    rows = [
        (
            row["method"],
            row["accuracy"],
            f"{row['trainable']:,}",
            f"{row['saved_kib_per_image']:,}",
            f"{row['peak_mib']}",
            f"{row['seconds']}",
        )
        for row in data["rows"]
    ]
    about = f"`make demo`, mean and standard deviation over {data['seeds']} seeds, on {hardware(data)}."
    return [table(header, rows), note(data, about)]


def training_steps(data: Result) -> tuple[list[Result], dict[str, Result], str]:
    """The rows of the largest batch, under autocast where that was measured; LoRA's among them by backbone; and under
    which circumstances they were measured."""
    rows = [row for row in data["rows"] if row["axis"] is None]
    batch_size = max(row["batch_size"] for row in rows)
    autocast = any(row["autocast"] for row in rows)
    rows = [row for row in rows if (row["batch_size"], row["autocast"]) == (batch_size, autocast)]
    lora = {row["backbone"]: row for row in rows if row["method"] == "LoRA" and "skipped" not in row}
    about = (
        f"Batch {batch_size}, 224 x 224, {'bfloat16 autocast' if autocast else 'fp32'}, on {hardware(data)}. Peak: "
        "what a training step adds to parameters, optimiser state and batch."
    )
    return rows, lora, about


def ratio(quantity: str, row: Result, base: Result | None) -> str:
    return f"{row[quantity] / base[quantity]:.2f}" if base else "-"


def memory(data: Result, path: Path) -> list[str]:
    """S2A beside what a user could pick instead."""
    methods = ("full fine-tuning", "LoRA", "LoRA + checkpointing", "S2A")
    rows, lora, about = training_steps(data)
    cells = [
        (
            row["backbone"],
            row["method"],
            f"{row['saved_bytes_per_image'] / MiB:.1f}",
            f"{row['peak_bytes'] / MiB:,.0f}",
            *(ratio(quantity, row, lora.get(row["backbone"])) for quantity in ("peak_bytes", "step_seconds")),
        )
        for row in rows
        if row["method"] in methods and "skipped" not in row
    ]
    header = ("backbone", "method", "kept for backward, MiB/image", "peak, MiB", "peak / LoRA", "step time / LoRA")
    about += " Checkpointing is missing where the model class does not support it."
    return [table(header, cells), note(data, about), picture(path, "peak and step time by method")]


def wide(data: Result, path: Path) -> list[str]:
    """All methods on all backbones, folded, and how the peak grows."""
    rows, lora, about = training_steps(data)
    found = {(row["method"], row["backbone"]): row for row in rows}
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    reasons = list(dict.fromkeys(row["skipped"] for row in rows if "skipped" in row))

    def cell(method: str, backbone: str) -> str:
        row = found.get((method, backbone))
        if row is None:
            return ""
        if "skipped" in row:
            return f"({1 + reasons.index(row['skipped'])})"
        base = lora.get(backbone)
        return (
            f"{row['saved_bytes_per_image'] / MiB:.1f}, {ratio('peak_bytes', row, base)}, "
            f"{ratio('step_seconds', row, base)}"
        )

    methods = dict.fromkeys(row["method"] for row in rows)
    cells = [(method, *(cell(method, backbone) for backbone in backbones)) for method in methods]
    why = " ".join(
        f"({number}) {reason[0].upper()}{reason[1:].rstrip('.')}." for number, reason in enumerate(reasons, 1)
    )
    about = f"Cells: kept for backward in MiB/image, peak / LoRA, step time / LoRA. {about}"
    parts = [
        f"<details>\n<summary>{len(cells)} methods on {', '.join(backbones)}</summary>",
        table(("method", *backbones), cells),
        f"{note(data, about)} {why}".strip(),
        picture(path, "peak and step time by method"),
        "</details>",
    ]
    return parts + growth(data)


def growth(data: Result) -> list[str]:
    """What another image, token or block adds to the peak."""
    slopes = data.get("slopes", [])
    found = {(row["method"], row["axis"]): row for row in slopes}
    axes = {row["axis"]: row for row in slopes}
    titles = {
        "images": lambda row: "another image",
        "tokens": lambda row: f"another token in each of {row['batch_size']} images",
        "blocks": lambda row: f"another block at batch {row['batch_size']}",
    }
    if not slopes:
        return []
    cells = [
        (
            method,
            *(
                f"{found[method, axis]['peak_bytes_slope'] / MiB:.3g}" if (method, axis) in found else ""
                for axis in axes
            ),
        )
        for method in dict.fromkeys(row["method"] for row in slopes)
    ]
    header = ("method", *(f"{titles[axis](row)}, MiB" for axis, row in axes.items()))
    points = "; ".join(f"{axis} {', '.join(map(str, row['at']))}" for axis, row in axes.items())
    about = (
        f"What adds how much to the peak of a training step of {slopes[0]['backbone']}: slopes of lines through "
        f"{points}; on {hardware(data)}."
    )
    return [table(header, cells), about]


def accuracy(data: Result, path: Path) -> list[str]:
    """Accuracy beside memory, and what quantisation costs."""
    datasets = list(dict.fromkeys(row["dataset"] for row in data["runs"] if row["split"] == "test"))
    seeds = {row["seed"] for row in data["runs"] if row["split"] == "test"}
    rows = []
    for row in data["memory"]:
        values = [list(accuracies(data, dataset, row["method"]).values()) for dataset in datasets]
        if not any(values):
            continue
        percent = (
            "{:.1f} ± {:.1f}".format(*mean_and_deviation(found))
            + (f" ({len(found)} seeds)" if len(found) < len(seeds) else "")
            if found
            else ""
            for found in values
        )
        saved, peak = f"{row['saved_bytes_per_image'] / MiB:.2f}", f"{row['peak_bytes'] / MiB:.0f}"
        rows.append((row["method"], f"{row['trainable']:,}", saved, peak, *percent))
    setting = data["setting"]
    about = (
        f"DINOv2-small, {setting['train_images']:,} training images of {setting['image_size']} x "
        f"{setting['image_size']}, {setting['epochs']} epochs, {setting['test_images']:,} test "
        f"images{' (digits: 797)' if 'digits' in datasets else ''}; mean and standard deviation over {len(seeds)} "
        f"seeds, on {hardware(data)}. S2A without a number of bits keeps 4; calibrated bits fit into three quarters "
        "of that."
    )
    sentence = (
        "on {}, 4 bits change S2A's accuracy by {difference:+.2f} ± {standard_error:.2f} points (mean over {seeds} "
        "pairs of runs and its standard error; one seed's standard deviation is {seed_noise:.2f})"
    )
    found = {dataset: cost_of_quantisation(data, dataset) for dataset in datasets}
    costs = [sentence.format(dataset, **cost) for dataset, cost in found.items() if cost]
    cost = f"Quantisation: {'; '.join(costs)}." if costs else ""
    header = ("method", "trainable", "kept, MiB/image", "peak, MiB", *(f"{name}, %" for name in datasets))
    return [table(header, rows), note(data, f"{about} {cost}".strip()), picture(path, "accuracy over memory")]


def fidelity(data: Result, path: Path) -> list[str]:
    """Cosine by operator and width."""
    rows = [row for row in data["rows"] if row["variant"] == "nearest"]
    widths = sorted({row["bits"] for row in rows})
    found = {(row["operator"], row["bits"]): row["cosine"] for row in rows}
    cells = [
        (operator, *(f"{found[operator, bits]:.4f}" for bits in widths))
        for operator in dict.fromkeys(row["operator"] for row in rows)
    ]
    about = (
        f"Cosine between the quantised and the exact gradient of all biases and norm scales, DINOv2-small, mean over "
        f"{data['settings']['batches']} batches of Fashion-MNIST and digits; single kinds with the others at 8 bits. "
        f"On {hardware(data)}."
    )
    return [table(("operator", *(f"{bits} bits" for bits in widths)), cells), note(data, about)]


def kernels(data: Result, path: Path) -> list[str]:
    """The fused versions beside the stock operators."""
    versions = list(dict.fromkeys(row["version"] for row in data["rows"]))
    stock = {row["operator"]: row for row in data["rows"] if row["version"] == "stock"}
    cells = []
    for row in data["rows"]:
        if row["version"] != versions[-1]:
            continue
        base = stock[row["operator"]]
        times = (
            f"{1e3 * base[f'{phase}_seconds']:.2f} / {1e3 * row[f'{phase}_seconds']:.2f} / "
            f"{1e3 * row[f'{phase}_limit_seconds']:.2f}"
            for phase in ("forward", "backward")
        )
        cells.append((row["operator"], f"{base['kept_bytes'] / row['kept_bytes']:.1f}x less", *times))
    settings = data["settings"]
    about = (
        f"Milliseconds of stock operator / {versions[-1]} backend at {settings['bits']} bits / bandwidth limit, batch "
        f"{settings['batch_size']}, {settings['dtype']}, on {hardware(data)}."
    )
    return [table(("operator", "kept", "forward, ms", "backward, ms"), cells), note(data, about)]


def plans(data: Result, path: Path) -> list[str]:
    """Peak and largest batch, a model a row."""
    methods = {
        "full": "full",
        "lora": "LoRA",
        "lora+checkpointing": "LoRA + checkpointing",
        "s2a": "S2A",
        "s2a-ladder": "ladder",
    }
    found = {(row["model"], row["method"]): row for row in data["rows"]}
    methods = {name: title for name, title in methods.items() if any(name == method for _, method in found)}

    def cell(model: str, method: str) -> str:
        row = found[model, method]
        if "skipped" in row:
            return "not supported"
        return f"{row['peak_bytes'] / 2**30:.1f} GiB, {row['largest_batch_size'] or 'none'}"

    models = dict.fromkeys(row["model"] for row in data["rows"])
    settings = data["settings"]
    about = (
        f"`peft-s2a plan`: estimated peak of a training step at batch {settings['batch_size']}, parameters and "
        f"optimiser included, and the largest batch in {settings['budget_bytes'] / 2**30:.0f} GiB; fp32, for the "
        "kernels of CPUs."
    )
    rows = [(model, *(cell(model, method) for method in methods)) for model in models]
    return [table(("model", *methods.values()), rows), note(data, about)]


# name of the section: (which result files, how each is written)
SECTIONS: dict[str, tuple[tuple[str, ...], Callable[[Result, Path], list[str]]]] = {
    "demo": (("demo.json",), demo),
    "memory": (tuple(f"memory_and_speed-{preset}-*.json" for preset in ("main", "bf16", "full")), memory),
    "wide": (("memory_and_speed-wide-*.json", "memory_and_speed-full-*.json"), wide),
    "accuracy": (("accuracy-*.json",), accuracy),
    "fidelity": (("fidelity-*.json",), fidelity),
    "kernels": (("kernels-*.json",), kernels),
    "plans": (("plans.json",), plans),
}


def section(name: str) -> str:
    """The Markdown of a section, empty without result files."""
    files, write = SECTIONS[name]
    paths = (path for pattern in files for path in sorted(RESULTS.glob(pattern)) if "-reduced-" not in path.name)
    parts = [part for path in paths for part in write(json.loads(path.read_text()), path) if part]
    return "\n\n".join(parts) + "\n" if parts else ""


def render(readme: str) -> str:
    """`readme` with every `<!-- results: NAME -->` section written anew."""

    def written(match: re.Match) -> str:
        return f"<!-- results: {match['name']} -->\n{section(match['name'])}<!-- /results -->"

    return re.sub(r"<!-- results: (?P<name>\w+) -->\n.*?<!-- /results -->", written, readme, flags=re.DOTALL)


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
