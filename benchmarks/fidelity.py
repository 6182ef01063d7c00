"""How close quantised gradients are to exact ones, on real weights and real images.

    python benchmarks/fidelity.py CACHE
    python benchmarks/fidelity.py CACHE --setting training    # after up to 200 steps of training: six minutes on a core

DINOv2-small (`dinov2.py` puts it into CACHE) with a random head for ten classes. Images: Fashion-MNIST (Debian's
package dataset-fashion-mnist) and scikit-learn's handwritten digits, resized. The gradients of all biases and norm
scales are compared with those of the unquantised model on the same batch: cosine and relative error over all of them
together, means over batches. One operator kind at a time at every width (the others at 8 bits, next to which their
errors do not count), and the whole model.

With `--setting training` each of S2A's structures alone and all together are trained at 4 bits on Fashion-MNIST, and the
gradients of what they train, the head excepted (it is exact in any case and would hide the others), are compared with
those in full precision at the start and after `STEPS` steps, on garments that are not trained on.

Writes `benchmarks/results/fidelity-<setting>-<device>.json`, and beside it a plot (.png).
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dinov2 import checkpoint
from environment import describe_environment, result_file, write_result
from images import digits, fashion_mnist, pixel_values
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from peft_s2a import (
    ActivationQuantizationConfig,
    S2AConfig,
    calibrate_activations,
    quantize_activations,
    restore_activations,
)
from peft_s2a.activations.codec import WIDTHS


ALL = "whole model"
KINDS = ("activation", "norm", "attention")
BUDGETS = (1.0, 0.75)  # of calibrated bits: parts of the bytes of 4 bits everywhere
SETTINGS = {"full": 3, "reduced": 1, "training": 4}  # batches of each kind of image
STRUCTURES = {"bias": ("bias",), "prompt": ("prompt",), "side": ("side",), "all": ("bias", "prompt", "side")}
STEPS = (0, 10, 30, 60, 200)
RATES = {"prompt": 3e-3}  # where it is not 2e-3: those of the accuracy benchmark
Batch = dict[str, Tensor]


def batches(count: int, seed: int) -> list[Batch]:
    """``count`` batches of each: 16 garments at 112 x 112, 16 digits at 112 x 112, 4 garments at 224 x 224."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for (images, labels), samples, size in (
        (fashion_mnist("test"), 16, 112),
        (digits(), 16, 112),
        (fashion_mnist("test"), 4, 224),
    ):
        for _ in range(count):
            chosen = torch.randperm(len(images), generator=generator)[:samples]
            found.append({"pixel_values": pixel_values(images[chosen], size), "labels": labels[chosen]})
    return found


def gradient(model: nn.Module, batch: Batch, parameters: Sequence[nn.Parameter] | None = None) -> Tensor:
    """That of ``parameters``, by default of all that are trained, as a vector."""
    model.zero_grad()
    model(**batch).loss.backward()
    parameters = list(model.parameters()) if parameters is None else parameters
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double()


def compare(
    model: nn.Module, data: list[Batch], exact: list[Tensor], config: ActivationQuantizationConfig,
    parameters: Sequence[nn.Parameter] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Of the gradients in full precision, ``exact``, with those of ``model`` under ``config``."""
    quantize_activations(model, config)
    ours = [gradient(model, batch, parameters) for batch in data]
    restore_activations(model)
    cosines = [F.cosine_similarity(a, b, 0).item() for a, b in zip(ours, exact)]
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, exact)]
    return {
        "cosine": statistics.mean(cosines), "worst_cosine": min(cosines), "relative_error": statistics.mean(errors),
    }  # fmt: skip


def variants(model: nn.Module, calibration: Batch | None, backend: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """What is compared: (how it is named in the result, the configuration)."""

    def config(**settings: Any) -> ActivationQuantizationConfig:
        return ActivationQuantizationConfig(backend=backend, **settings)

    for bits in WIDTHS:
        yield {"operator": ALL, "bits": bits, "variant": "nearest"}, config(bits=bits)
    yield {"operator": ALL, "bits": 4, "variant": "stochastic"}, config(bits=4, rounding="stochastic")
    for kind in KINDS:
        for bits in WIDTHS:
            yield {"operator": kind, "bits": bits, "variant": "nearest"}, config(bits={"default": 8, kind: bits})
    if calibration is not None:
        for budget in BUDGETS:
            found = calibrate_activations(model, [calibration], budget=budget, config=config())
            yield {"operator": ALL, "bits": 4 * budget, "variant": "calibrated"}, found


def garments(count: int, size: int, split: str, generator: torch.Generator) -> Iterator[Batch]:
    """``count`` batches of 16 random ones."""
    images, labels = fashion_mnist(split)
    for _ in range(count):
        chosen = torch.randperm(len(images), generator=generator)[:16]
        yield {"pixel_values": pixel_values(images[chosen], size), "labels": labels[chosen]}


def along_training(
    model: nn.Module, training: Iterable[Batch], data: list[Batch], config: ActivationQuantizationConfig,
    rate: float, at: Sequence[int],
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Trains ``model`` with quantised activations, and compares gradients on ``data`` after each number of steps in
    ``at``, which are ascending."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = list(named.values())
    compared = [parameter for name, parameter in named.items() if ".modules_to_save." not in name]  # that is the head
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    losses = []
    remaining = iter(training)
    for number in range(at[-1] + 1):
        if number in at:
            restore_activations(model)
            exact = [gradient(model, batch, compared) for batch in data]
            found = compare(model, data, exact, config, compared)
            model.zero_grad()
            yield {"step": number, **found, "loss": statistics.mean(losses[-10:]) if losses else None}
            quantize_activations(model, config)
        if number == at[-1]:
            break
        loss = model(**next(remaining)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())


def name_of(row: dict[str, Any]) -> str:
    return row["operator"] if row["variant"] == "nearest" else f"{row['operator']}, {row['variant']}"


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table("operator", "bits", "cosine", "worst batch", "relative error")
    for row in rows:
        cells = [f"{row[name]:.4f}" for name in ("cosine", "worst_cosine", "relative_error")]
        table.add_row(name_of(row), f"{row['bits']:g}", *cells)
    return table


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """What is missing to a cosine of one, by width and operator."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in dict.fromkeys(map(name_of, rows)):
        points = sorted((row["bits"], 1 - row["cosine"]) for row in rows if name_of(row) == name)
        whole = name.startswith(ALL)
        axes.plot(*zip(*points), "o-" if len(points) > 2 else "D", label=name, linewidth=2.5 if whole else 1.2)
    axes.set(yscale="log", xscale="log", xlabel="bits", ylabel="1 - cosine(quantised, exact gradient)")
    axes.set_xticks(WIDTHS, map(str, WIDTHS))
    axes.minorticks_off()
    axes.axhline(0.003, color="black", linewidth=0.8, linestyle=":", label="cosine 0.997")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def operator_rows(folder: Path, count: int, args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Operator by operator at every width, and the number of batches."""
    torch.manual_seed(args.seed)
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=10).to(args.device)
    for name, p in model.named_parameters():
        p.requires_grad = name.endswith("bias") or "norm" in name
    # calibrated bits are chosen on a batch of their own
    *data, calibration = [
        {name: tensor.to(args.device) for name, tensor in batch.items()}
        for batch in (*batches(count, args.seed), batches(1, args.seed + 1)[0])
    ]
    exact = [gradient(model, batch) for batch in data]
    rows = []
    for name, config in tqdm(variants(model, calibration if args.setting == "full" else None, args.backend)):
        rows.append({**name, **compare(model, data, exact, config)})
    return rows, len(data)


def training_rows(folder: Path, count: int, seed: int, backend: str, device: str) -> Iterator[dict[str, Any]]:
    """Structure by structure, what `along_training` finds."""
    config = ActivationQuantizationConfig(backend=backend)
    generator = torch.Generator().manual_seed(seed)
    data, training = (
        [
            {name: tensor.to(device) for name, tensor in batch.items()}
            for batch in garments(number, 56, split, generator)
        ]
        for number, split in ((count, "test"), (STEPS[-1], "train"))
    )
    for title, structures in tqdm(STRUCTURES.items()):
        torch.manual_seed(seed)
        model = AutoModelForImageClassification.from_pretrained(folder, num_labels=10)
        model = get_peft_model(model, S2AConfig(structures=structures, activation_quantization=None))
        model = model.to(device).train()
        for row in along_training(model, training, data, config, RATES.get(title, 2e-3), STEPS):
            yield {"structure": title, "bits": config.bits, **row}


def training_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("structure", "step", "cosine", "worst batch", "relative error", "loss of 10 steps")
    for row in rows:
        cells = [f"{row[name]:.4f}" for name in ("cosine", "worst_cosine", "relative_error")]
        table.add_row(row["structure"], str(row["step"]), *cells, "" if row["loss"] is None else f"{row['loss']:.3f}")
    return table


def training_plot(rows: list[dict[str, Any]], path: Path) -> None:
    """What is missing to a cosine of one over the steps, a line a structure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for title in dict.fromkeys(row["structure"] for row in rows):
        points = [row for row in rows if row["structure"] == title]
        steps = [row["step"] for row in points]
        mean, worst = ([1 - row[name] for row in points] for name in ("cosine", "worst_cosine"))
        (drawn,) = axes.plot(steps, mean, "o-", label=title, linewidth=2.5 if title == "all" else 1.2)
        axes.plot(steps, worst, ":", color=drawn.get_color(), linewidth=1)
    axes.set_xscale("symlog", linthresh=10)
    axes.set(
        yscale="log", xlabel="steps of training", ylabel="1 - cosine(4 bits, exact gradient); dotted: worst batch"
    )
    axes.set_xticks(STEPS, map(str, STEPS))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", help="folder for the checkpoint")
    parser.add_argument("--setting", default="full", choices=SETTINGS)
    parser.add_argument("--batches", type=int, help="of each kind of image, instead of the setting's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    count = args.batches or SETTINGS[args.setting]
    folder = checkpoint(args.cache)
    if args.setting == "training":
        rows = list(training_rows(folder, count, args.seed, args.backend, args.device))
        batches_used = count
    else:
        rows, batches_used = operator_rows(folder, count, args)
    environment = describe_environment(args.device)
    settings = {"model": "DINOv2-small", "batches": batches_used, "seed": args.seed, "backend": args.backend}
    path = args.out or result_file("fidelity", args.setting, args.device)
    write_result(path, {"environment": environment, "settings": settings, "rows": rows})
    console = Console(width=120)
    make_table, draw = (training_table, training_plot) if args.setting == "training" else (table_of, plot)
    console.print(make_table(rows))
    draw(rows, path.with_suffix(".png"))
    console.print(f"{environment['device']}, torch {environment['torch']}; written to {path}")


if __name__ == "__main__":
    main()
