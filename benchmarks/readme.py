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


def memory(data: Result, path: Path) -> list[str]:
    """S2A beside what a user could pick instead: of the largest batch, under autocast where that was measured."""
    methods = ("full fine-tuning", "LoRA", "LoRA + checkpointing", "S2A")
    rows = [row for row in data["rows"] if row["axis"] is None and "skipped" not in row and row["method"] in methods]
    batch_size = max(row["batch_size"] for row in rows)
    autocast = any(row["autocast"] for row in rows)
    rows = [row for row in rows if (row["batch_size"], row["autocast"]) == (batch_size, autocast)]
    lora = {row["backbone"]: row for row in rows if row["method"] == "LoRA"}
    cells = [
        (
            row["backbone"],
            row["method"],
            f"{row['saved_bytes_per_image'] / MiB:.1f}",
            f"{row['peak_bytes'] / MiB:,.0f}",
            f"{row['peak_bytes'] / lora[row['backbone']]['peak_bytes']:.2f}",
            f"{row['step_seconds'] / lora[row['backbone']]['step_seconds']:.2f}",
        )
        for row in rows
    ]
    header = ("backbone", "method", "kept for backward, MiB/image", "peak, MiB", "peak / LoRA", "step time / LoRA")
    about = (
        f"Batch {batch_size}, 224 x 224, {'bfloat16 autocast' if autocast else 'fp32'}, on {hardware(data)}. Peak: "
        "what a training step adds to parameters, optimiser state and batch. Checkpointing is missing where the "
        "model class does not support it."
    )
    return [table(header, cells), note(data, about), picture(path, "peak and step time by method")]


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
SECTIONS: dict[str, tuple[str, Callable[[Result, Path], list[str]]]] = {
    "demo": ("demo.json", demo),
    "memory": ("memory_and_speed-*.json", memory),
    "accuracy": ("accuracy-*.json", accuracy),
    "fidelity": ("fidelity-*.json", fidelity),
    "kernels": ("kernels-*.json", kernels),
    "plans": ("plans.json", plans),
}


def section(name: str) -> str:
    """The Markdown of a section, empty without result files."""
    files, write = SECTIONS[name]
    paths = sorted(path for path in RESULTS.glob(files) if "-reduced-" not in path.name)
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
