"""How close quantised gradients are to exact ones, on real weights and real images.

    python benchmarks/fidelity.py CACHE

DINOv2-small (`dinov2.py` puts it into CACHE) with a random head for ten classes. Images: Fashion-MNIST (Debian's
package dataset-fashion-mnist) and scikit-learn's handwritten digits, resized. The gradients of all biases and norm
scales are compared with those of the unquantised model on the same batch: cosine and relative error over all of them
together, means over batches. One operator kind at a time at every width (the others at 8 bits, next to which their
errors do not count), and the whole model.

Writes `benchmarks/results/fidelity-<setting>-<device>.json`, and beside it a plot (.png).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dinov2 import checkpoint
from environment import describe_environment, result_file, write_result
from images import digits, fashion_mnist, pixel_values
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForImageClassification

from peft_s2a import (
    ActivationQuantizationConfig,
    calibrate_activations,
    quantize_activations,
    restore_activations,
)
from peft_s2a.activations.codec import WIDTHS


ALL = "whole model"
KINDS = ("activation", "norm", "attention")
BUDGETS = (1.0, 0.75)  # of calibrated bits: parts of the bytes of 4 bits everywhere
SETTINGS = {"full": 3, "reduced": 1}  # batches of each kind of image
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


def gradient(model: nn.Module, batch: Batch) -> Tensor:
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def compare(
    model: nn.Module, data: list[Batch], exact: list[Tensor], config: ActivationQuantizationConfig
) -> dict[str, float]:
    quantize_activations(model, config)
    ours = [gradient(model, batch) for batch in data]
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
    torch.manual_seed(args.seed)
    model = AutoModelForImageClassification.from_pretrained(checkpoint(args.cache), num_labels=10).to(args.device)
    for name, p in model.named_parameters():
        p.requires_grad = name.endswith("bias") or "norm" in name
    count = args.batches or SETTINGS[args.setting]
    # calibrated bits are chosen on a batch of their own
    *data, calibration = [
        {name: tensor.to(args.device) for name, tensor in batch.items()}
        for batch in (*batches(count, args.seed), batches(1, args.seed + 1)[0])
    ]
    exact = [gradient(model, batch) for batch in data]
    rows = []
    for name, config in tqdm(variants(model, calibration if args.setting == "full" else None, args.backend)):
        rows.append({**name, **compare(model, data, exact, config)})
    environment = describe_environment(args.device)
    settings = {"model": "DINOv2-small", "batches": len(data), "seed": args.seed, "backend": args.backend}
    path = args.out or result_file("fidelity", args.setting, args.device)
    write_result(path, {"environment": environment, "settings": settings, "rows": rows})
    console = Console(width=120)
    console.print(table_of(rows))
    plot(rows, path.with_suffix(".png"))
    console.print(f"{environment['device']}, torch {environment['torch']}; written to {path}")


if __name__ == "__main__":
    main()
