"""Writes the results in README.md and docs/results.md from the files in `benchmarks/results`, so that text and data
cannot drift apart.

    python benchmarks/readme.py

A section shows every result file of its question, so results of different hardware stand beside each other, each with
its own note. Reduced runs (`make benchmark`) are left out. Sections without a result file stay empty.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import budgets
from accuracy import COMPARED, accuracies, mean_accuracies, mean_and_deviation, paired_difference
from memory_and_speed import COMPILED, METHODS, RIVALS

from peft_s2a.memory.report import ENGINE_TITLES


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/results.md", "docs/choosing.md", "docs/distributed.md")
FEWEST_PAIRS = 10  # of runs, from which on a difference between two methods is stated
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


FIGURE = "docs/figures/summary.png"
TITLES = {
    "vit-b": "ViT-B/16",
    "dinov2-s": "DINOv2-S",
    "swin-t": "Swin-T",
    "resnet50": "ResNet-50",
    "convnext-t": "ConvNeXt-T",
}


SHORT = ("LoRA", "LoRA + checkpointing", "LoRA, micro-batch 1", "S2A")  # of the first table


def summary(data: Result, path: Path) -> list[str]:
    """What a user could pick within a budget, where that was measured on the same hardware."""
    figure = f"![peak of a training step by backbone and method]({FIGURE})" if (ROOT / FIGURE).is_file() else ""
    within = path.with_name(path.name.replace("-main-", "-budget-"))
    if not within.is_file():
        return peaks(data, figure)
    data = json.loads(within.read_text())
    rows = [row for row in data["budgets"] if row["method"] in SHORT]
    about = f"{budget_note(data)} {budget_losses(rows)}"
    return [figure, budget_table(rows), note(data, about)]


def budget_table(rows: list[Result]) -> str:
    """A row a backbone and method."""
    header = ("backbone", "method", "one image", *(budgets.gib(fitted["budget_bytes"]) for fitted in rows[0]["fits"]))
    cells = (
        (
            TITLES.get(row["backbone"], row["backbone"]),
            row["method"],
            f"{row['smallest_bytes'] / MiB:,.0f} MiB",
            *map(budgets.cell, row["fits"]),
        )
        for row in rows
    )
    return table(header, ([f"**{text}**" for text in row] if row[1] == "S2A" else row for row in cells))


def budget_note(data: Result) -> str:
    return (
        "One image: the least memory in which one can be trained, parameters, gradients and optimiser state included. "
        "Within each budget: images a second (micro-batch), of the largest micro-batch that fits; ~: planned from a "
        "line through measured batches, at the images a second of the largest of these; -: nothing fits. 224 x 224, "
        f"fp32, on {hardware(data)}."
    )


def budget_losses(rows: list[Result]) -> str:
    """In how many of the budgets that S2A fits another method is faster, and where one needs less memory."""
    parts = []
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        ours = next((row for row in rows if (row["backbone"], row["method"]) == (backbone, "S2A")), None)
        if ours is None:
            continue
        others = [row for row in rows if row["backbone"] == backbone and row is not ours]
        faster = {
            budgets.gib(mine["budget_bytes"]): row["method"]
            for index, mine in enumerate(ours["fits"])
            for row in others
            if (row["fits"][index]["images_per_second"] or 0) > (mine["images_per_second"] or 0)
        }
        smaller = [row["method"] for row in others if row["smallest_bytes"] < ours["smallest_bytes"]]
        lost = []
        if faster:
            lost.append(f"another method is faster in {', '.join(faster)}")
        if smaller:
            lost.append(f"one image takes less with {', '.join(smaller)}")
        parts.append(f"{TITLES.get(backbone, backbone)}: {' and '.join(lost) if lost else 'nowhere'}")
    return f"Where S2A loses: {'; '.join(parts)}." if parts else ""


def budget(data: Result, path: Path) -> list[str]:
    """Images a second within a budget, all methods."""
    rows = data["budgets"]
    about = f"{budget_note(data)} {budget_losses(rows)}"
    return [budget_table(rows), note(data, about), picture(path, "images a second over the memory budget")]


def without_checkpointing(data: Result, path: Path) -> list[str]:
    """Model types that transformers does not checkpoint, by task."""
    cells = []
    for task in dict.fromkeys(task for row in data["rows"] for task in row["supported"]):
        support = {row["model_type"]: row["supported"][task] for row in data["rows"] if task in row["supported"]}
        names = [name for name, supported in support.items() if not supported]
        cells.append((task, f"{len(names)} of {len(support)}", ", ".join(names)))
    about = (
        f"Model types of transformers {data['environment']['transformers']} whose classes have "
        "`supports_gradient_checkpointing = False`."
    )
    return [table(("task", "without", "model types"), cells), note(data, about)]


def compiled(data: Result, path: Path) -> list[str]:
    """LoRA and S2A under `torch.compile`."""
    rows = [row for row in data["rows"] if row["axis"] is None]
    lora = {row["backbone"]: row for row in rows if row["method"] == "LoRA" and "skipped" not in row}
    cells = []
    for row in rows:
        if row["method"] not in (*COMPILED, "LoRA", "S2A"):
            continue
        title = TITLES.get(row["backbone"], row["backbone"])
        if "skipped" in row:
            cells.append((title, row["method"], row["skipped"], "", "", ""))
            continue
        first = f"{row['first_step_seconds']:.0f}" if "first_step_seconds" in row else ""
        ratios = (ratio(quantity, row, lora.get(row["backbone"])) for quantity in ("peak_bytes", "step_seconds"))
        cells.append((title, row["method"], f"{row['peak_bytes'] / MiB:,.0f}", *ratios, first))
    header = ("backbone", "method", "peak, MiB", "peak / LoRA", "step time / LoRA", "first step, s")
    about = (
        f"`torch.compile`, the first step with its compilation; of what the compiler would keep, `activation_memory_"
        f"budget` lets it keep the part named. Batch {max(row['batch_size'] for row in rows)}, 224 x 224, fp32, on "
        f"{hardware(data)}."
    )
    return [table(header, cells), note(data, about), picture(path, "peak and step time under torch.compile")]


def peaks(data: Result, figure: str) -> list[str]:
    """Peak and time of what a user could pick, a backbone a column, and where S2A loses."""
    rows, lora, about = training_steps(data)
    found = {(row["backbone"], row["method"]): row for row in rows if "skipped" not in row}
    methods = [method for method in RIVALS if any(method == name for _, name in found)]
    backbones = list(dict.fromkeys(backbone for backbone, _ in found))

    def cell(backbone: str, method: str) -> str:
        if (row := found.get((backbone, method))) is None:
            return "-"
        return f"{row['peak_bytes'] / MiB:,.0f} MiB, {ratio('step_seconds', row, lora.get(backbone))}"

    cells = [(method, *(cell(backbone, method) for backbone in backbones)) for method in methods]
    cells = [tuple(f"**{text}**" for text in row) if row[0] == "S2A" else row for row in cells]
    about = f"Cells: peak of a training step, step time / LoRA's. {about} A dash: the model class does not support it."
    return [
        figure,
        table(("", *(TITLES.get(name, name) for name in backbones)), cells),
        note(data, f"{about} {losses(found, methods)}"),
    ]


def draw_summary(data: Result, path: Path) -> None:
    """The figure above that table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, _, _ = training_steps(data)
    found = {(row["backbone"], row["method"]): row["peak_bytes"] / MiB for row in rows if "skipped" not in row}
    methods = [method for method in RIVALS if any(method == name for _, name in found)]
    backbones = list(dict.fromkeys(backbone for backbone, _ in found))
    colors = ["#5c6370", "#7570b3", "#a7a3d1", "#c3c0e2", "#d9d7ee", "#e3b95f"]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.85 / len(methods)
    for place, method in enumerate(methods):
        color = "#1b9e77" if method == "S2A" else colors[place % len(colors)]
        at = [index + place * width for index, backbone in enumerate(backbones) if (backbone, method) in found]
        peaks = [found[backbone, method] for backbone in backbones if (backbone, method) in found]
        axes.bar_label(axes.bar(at, peaks, width, label=method, color=color), fmt="{:,.0f}", fontsize=6)
    axes.set_xticks([index + 0.425 - width / 2 for index in range(len(backbones))])
    axes.set_xticklabels([TITLES.get(backbone, backbone) for backbone in backbones])
    axes.set_ylabel("peak of a training step, MiB")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, ncols=4, loc="outside upper center")
    figure.savefig(path, dpi=130, metadata={"Software": None})


def losses(found: dict[tuple[str, str], Result], methods: list[str]) -> str:
    """Where something else takes less memory than S2A, or less time than S2A while keeping to its memory."""
    smaller, faster = [], []
    for (backbone, method), row in found.items():
        ours = found.get((backbone, "S2A"))
        if ours is None or method not in methods or method == "S2A":
            continue
        if row["peak_bytes"] < ours["peak_bytes"]:
            smaller.append(f"{method} on {TITLES.get(backbone, backbone)}")
        if method == "LoRA" and row["step_seconds"] < ours["step_seconds"]:
            faster.append(TITLES.get(backbone, backbone))
    parts = []
    if smaller:
        parts.append(f"Less memory than S2A: {', '.join(smaller)}.")
    if faster:
        parts.append(f"LoRA is faster on {', '.join(faster)}.")
    return " ".join(parts)


def training_steps(data: Result) -> tuple[list[Result], dict[str, Result], str]:
    """The rows of the largest batch, under autocast where that was measured, of methods that there still are; LoRA's
    among them by backbone; and under which circumstances they were measured."""
    rows = [row for row in data["rows"] if row["axis"] is None]
    batch_size = max(row["batch_size"] for row in rows)
    autocast = any(row["autocast"] for row in rows)
    rows = [
        row
        for row in rows
        if (row["batch_size"], row["autocast"]) == (batch_size, autocast) and row["method"] in METHODS
    ]
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
        if row["method"] in RIVALS and "skipped" not in row
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


def choices(data: Result, path: Path) -> list[str]:
    """Peak and time of what there is to choose from, as ranges over the backbones."""
    rows, lora, about = training_steps(data)
    methods = (
        "full fine-tuning", "LoRA", "LoRA + checkpointing", "S2A", "S2A + checkpointing", "S2A bias", "S2A prompt",
        "S2A side", "S2A ladder",
    )  # fmt: skip
    cells = []
    for method in methods:
        found = [row for row in rows if row["method"] == method and "skipped" not in row and row["backbone"] in lora]
        spans = []
        for quantity in ("peak_bytes", "step_seconds"):
            ratios = sorted(row[quantity] / lora[row["backbone"]][quantity] for row in found)
            spans.append(f"{ratios[0]:.2f} to {ratios[-1]:.2f}" if ratios else "-")
        cells.append((method, *spans, ", ".join(TITLES.get(row["backbone"], row["backbone"]) for row in found)))
    about = f"Ranges over the backbones of the last column. {about}"
    return [table(("method", "peak / LoRA", "step time / LoRA", "measured on"), cells), note(data, about)]


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


TITLES_OF_WEIGHTS = {"dinov2-s": "DINOv2-small", "efficientnet-lite0": "EfficientNet-lite0 (ImageNet)"}


def tested(data: Result) -> list[str]:
    """The datasets of the runs that count."""
    return list(dict.fromkeys(row["dataset"] for row in data["runs"] if row["split"] == "test"))


def accuracy(data: Result, path: Path) -> list[str]:
    """Accuracy beside memory, and what quantisation costs."""
    datasets = tested(data)
    seeds = {row["seed"] for row in data["runs"] if row["split"] == "test"}
    rows = []
    for row in data["memory"]:
        values = [list(accuracies(data, dataset, row["method"]).values()) for dataset in datasets]
        if not any(values):
            continue
        if len(datasets) > 2:
            values.append(list(mean_accuracies(data, datasets, row["method"]).values()))
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
        f"{TITLES_OF_WEIGHTS[setting.get('backbone', 'dinov2-s')]}, {setting['train_images']:,} training images of {setting['image_size']} x "
        f"{setting['image_size']}, {setting['epochs']} epochs, {setting['test_images']:,} test "
        f"images{' (digits: 797)' if 'digits' in datasets else ''}; mean and standard deviation over {len(seeds)} "
        f"seeds, on {hardware(data)}. S2A without a number of bits keeps 4; calibrated bits fit into three quarters "
        "of that."
    )
    cost = differences(data, datasets)
    columns = [*datasets, *["mean"] * (len(datasets) > 2)]
    header = ("method", "trainable", "kept, MiB/image", "peak, MiB", *(f"{name}, %" for name in columns))
    return [table(header, rows), note(data, f"{about} {cost}".strip()), picture(path, "accuracy over memory")]


def tasks(data: Result, path: Path) -> list[str]:
    """In a sentence: the mean accuracy over all tasks, and what is kept for it."""
    datasets = tested(data)
    kept = {row["method"]: row["saved_bytes_per_image"] / 2**10 for row in data["memory"]}
    found = {method: mean_accuracies(data, datasets, method) for method in kept}
    told = [
        f"{method} {statistics.fmean(values.values()):.1f}% ({kept[method]:,.0f} KiB)"
        for method, values in found.items()
        if values and method not in ("S2A, full precision", "linear probe")
    ]
    setting = data["setting"]
    weights = TITLES_OF_WEIGHTS[setting.get("backbone", "dinov2-s")]
    text = (
        f"Accuracy: {weights}, mean over {len(datasets)} tasks of {setting['train_images']:,} images (and what is kept for "
        f"each): {', '.join(told)}. {differences(data, datasets)} On {hardware(data)}."
    )
    return [note(data, text)]


def differences(data: Result, datasets: list[str]) -> str:
    """What S2A gains over other methods, on the mean of all datasets, where there are seeds enough to say so."""
    parts, pairs = [], 0
    for method, other in COMPARED:
        found = paired_difference(data, method, other, datasets)
        if found is None:
            continue
        pairs = found["pairs"]
        if pairs >= FEWEST_PAIRS:
            parts.append(
                "{} minus {}: {difference:+.2f} points (95% interval {low:+.2f} to {high:+.2f})".format(
                    method, other, **found
                )
            )
    if parts:
        tasks = f"mean of {len(datasets)} tasks" if len(datasets) > 1 else datasets[0]
        return f"Differences, {tasks}, {pairs} pairs of runs: {'; '.join(parts)}."
    return (
        f"{pairs} seeds are too few to tell these methods apart, or to see what quantisation costs." if pairs else ""
    )


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


def fidelity_in_training(data: Result, path: Path) -> list[str]:
    """Cosine by structure over the steps of training."""
    rows = data["rows"]
    steps = list(dict.fromkeys(row["step"] for row in rows))
    found = {(row["structure"], row["step"]): row for row in rows}
    cells = [
        (title, *("{cosine:.4f} ({worst_cosine:.4f})".format(**found[title, step]) for step in steps))
        for title in dict.fromkeys(row["structure"] for row in rows)
    ]
    about = (
        f"Cosine between the gradient at {rows[0]['bits']} bits and the exact one, of all that a structure trains except "
        f"the head, while it is trained on Fashion-MNIST at {rows[0]['bits']} bits: mean (smallest) over "
        f"{data['settings']['batches']} batches of 16 test images of 56 x 56, DINOv2-small. On {hardware(data)}."
    )
    header = ("structure", *(f"step {step}" if step else "start" for step in steps))
    return [table(header, cells), note(data, about), picture(path, "distance to the exact gradient over training")]


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


def ranks(data: Result, path: Path) -> list[str]:
    """What two processes held beside what was estimated."""
    cells = []
    for row in data["rows"]:
        measured, estimated = row["measured"], row["estimated"]
        cells.append(
            (
                ENGINE_TITLES[row["engine"]],
                TITLES.get(row["model"], row["model"]),
                row["method"],
                *(
                    f"{found[key] / MiB:,.1f}"
                    for key in ("peak_bytes", "parameter_bytes")
                    for found in (measured, estimated)
                ),
                f"{estimated['parts']['engine'] / MiB:,.1f}",
                f"{100 * (estimated['peak_bytes'] / measured['peak_bytes'] - 1):+.1f}",
            )
        )
    header = (
        "engine", "model", "method", "peak, MiB, measured", "estimated", "weights, MiB, measured", "estimated",
        "added by the engine, MiB", "error of the peak, %",
    )  # fmt: skip
    errors = [abs(row["estimated"]["peak_bytes"] / row["measured"]["peak_bytes"] - 1) for row in data["rows"]]
    images = " or ".join(str(size) for size in sorted({row["batch_size"] for row in data["rows"]}))
    about = (
        f"The larger of two processes over gloo, {images} images in each, fp32; ZeRO with `reduce_bucket_size` "
        f"{data['settings']['reduce_bucket_size']:,}. The estimate is off by {100 * max(errors):.1f}% at most. On {hardware(data)}."
    )
    return [table(header, cells), note(data, about)]


def traffic(data: Result, path: Path) -> list[str]:
    """What each process sends in a step, and how long that takes at least."""
    settings, counts = data["settings"], sorted({row["processes"] for row in data["rows"]})
    header = ("model", "engine", "method", "trained numbers", "sent a step")
    times = [f"{count:,} processes, ms" for count in counts]
    cells = []
    found = {(r["model"], r["engine"], r["method"], r["processes"]): r for r in data["rows"]}
    for model, engine, method in dict.fromkeys((r["model"], r["engine"], r["method"]) for r in data["rows"]):
        largest = found[model, engine, method, counts[-1]]
        cells.append(
            (
                TITLES.get(model, model), ENGINE_TITLES[engine], method, f"{largest['trained']:,}",
                f"{largest['sent_bytes'] / 1e6:,.1f} MB",
                *(
                    "{tree:,.1f} to {ring:,.1f}".format(
                        tree=1e3 * found[model, engine, method, count]["tree_seconds"],
                        ring=1e3 * found[model, engine, method, count]["ring_seconds"],
                    )
                    for count in counts
                ),
            )
        )  # fmt: skip
    about = (
        f"**Calculated, not measured.** fp32; bytes that each of {counts[-1]:,} processes sends in a step, and the time that "
        f"takes if nothing runs meanwhile, at {settings['bytes_per_second'] / 1e9:.0f} GB/s and "
        f"{1e6 * settings['hop_seconds']:.0f} µs a hop: by trees, and by rings."
    )
    return [table((*header, *times), cells), note(data, about)]


# name of the section: (which result files, how each is written)
SECTIONS: dict[str, tuple[tuple[str, ...], Callable[[Result, Path], list[str]]]] = {
    "summary": (("memory_and_speed-main-*.json",), summary),
    "demo": (("demo.json",), demo),
    "memory": (tuple(f"memory_and_speed-{preset}-*.json" for preset in ("main", "bf16", "full")), memory),
    "choices": (("memory_and_speed-wide-*.json", "memory_and_speed-full-*.json"), choices),
    "wide": (("memory_and_speed-wide-*.json", "memory_and_speed-full-*.json"), wide),
    "accuracy": (("accuracy-*.json",), accuracy),
    "tasks": (("accuracy-tasks-*.json",), tasks),
    "budget": (("memory_and_speed-budget-*.json",), budget),
    "compiled": (("memory_and_speed-compiled-*.json",), compiled),
    "without_checkpointing": (("checkpointing.json",), without_checkpointing),
    "fidelity": (("fidelity-full-*.json",), fidelity),
    "fidelity_in_training": (("fidelity-training-*.json",), fidelity_in_training),
    "kernels": (("kernels-*.json",), kernels),
    "plans": (("plans.json",), plans),
    "ranks": (("ranks.json",), ranks),
    "traffic": (("traffic.json",), traffic),
}


def section(name: str) -> str:
    """The Markdown of a section, empty without result files."""
    files, write = SECTIONS[name]
    paths = (path for pattern in files for path in sorted(RESULTS.glob(pattern)) if "-reduced-" not in path.name)
    parts = [part for path in paths for part in write(json.loads(path.read_text()), path) if part]
    return "\n\n".join(parts) + "\n" if parts else ""


def render(text: str, document: str) -> str:
    """The text of a document with every `<!-- results: NAME -->` section written anew."""
    up = "../" * document.count("/")

    def written(match: re.Match) -> str:
        markdown = section(match["name"]).replace("](benchmarks/", f"]({up}benchmarks/")
        return f"<!-- results: {match['name']} -->\n{markdown}<!-- /results -->"

    return re.sub(r"<!-- results: (?P<name>\w+) -->\n.*?<!-- /results -->", written, text, flags=re.DOTALL)


def main() -> None:
    for path in sorted(RESULTS.glob(SECTIONS["summary"][0][0])):
        draw_summary(json.loads(path.read_text()), ROOT / FIGURE)
    for document in DOCUMENTS:
        path = ROOT / document
        path.write_text(render(path.read_text(), document))


if __name__ == "__main__":
    main()
