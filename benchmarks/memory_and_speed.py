"""Memory and time of a training step, S2A against what a user could pick instead, and without each of its tricks.

    python benchmarks/memory_and_speed.py                      # ViT-B/16, Swin-T, ResNet-50 at batch 8, 224 x 224, fp32
    python benchmarks/memory_and_speed.py vit-b --rounds 3

Models have random weights from their configurations, 100 labels. All methods of a backbone live in one process and take
their steps in turn, so that a machine that slows down hits all alike. What is measured, by `peft_s2a.profile_memory`:

saved   bytes autograd keeps for backward (unique storages, parameters and buffers excluded), per image
peak    highest live bytes during a training step, above parameters, optimiser state and batch

and step, the median seconds of a training step with AdamW.

Writes `benchmarks/results/memory_and_speed-<device>.json` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from environment import describe_environment, slug
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from peft_s2a import ActivationQuantizationConfig, S2ABiasConfig, S2AConfig, profile_memory
from peft_s2a.activations.functional import Quantizer


RESULTS = Path(__file__).parent / "results"
NUM_LABELS = 100
BACKBONES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "vit-b": (lambda: ViTForImageClassification(ViTConfig(num_labels=NUM_LABELS)), ["q_proj", "v_proj"]),
    "swin-t": (lambda: SwinForImageClassification(SwinConfig(num_labels=NUM_LABELS)), ["q_proj", "v_proj"]),
    "resnet50": (lambda: ResNetForImageClassification(ResNetConfig(num_labels=NUM_LABELS)), ["convolution"]),
}


class WithoutTokenMean(ActivationQuantizationConfig):
    """Queries, keys and values are coded as they are, not minus their mean over tokens."""

    def quantizer(self, kind: str, module_name: str = "") -> Quantizer:
        return replace(super().quantizer(kind, module_name), center_attention=False)


def s2a(**quantization: Any) -> Callable[[nn.Module, list[str]], nn.Module]:
    config = {"activation_quantization": ActivationQuantizationConfig(**quantization)}
    return lambda model, targets: get_peft_model(model, S2AConfig(**config))


def lora(model: nn.Module, targets: list[str]) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=8, target_modules=targets, modules_to_save=["classifier"]))


def checkpointed(model: nn.Module, targets: list[str]) -> nn.Module:
    model = lora(model, targets)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


METHODS: dict[str, Callable[[nn.Module, list[str]], nn.Module]] = {
    "full fine-tuning": lambda model, targets: model,
    "LoRA": lora,
    "LoRA + checkpointing": checkpointed,
    "biases only": lambda model, targets: get_peft_model(model, S2ABiasConfig(activation_quantization=None)),
    "S2A": s2a(),
    "S2A, activations in full precision": lambda model, targets: get_peft_model(
        model, S2AConfig(activation_quantization=None)
    ),
    "S2A, eager backend": s2a(backend="reference"),
    "S2A, no tiles": s2a(mlp_tiles=1),
    "S2A, no token mean": lambda model, targets: get_peft_model(
        model, S2AConfig(activation_quantization=WithoutTokenMean())
    ),
}


def training_step(model: nn.Module, batch: dict[str, torch.Tensor], autocast: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

    def step() -> None:
        with torch.autocast(batch["pixel_values"].device.type, torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(backbone: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a method."""
    build, targets = BACKBONES[backbone]
    generator = torch.Generator().manual_seed(args.seed)
    batch = {
        "pixel_values": torch.randn(args.batch_size, 3, 224, 224, generator=generator).to(args.device),
        "labels": torch.randint(0, NUM_LABELS, (args.batch_size,), generator=generator).to(args.device),
    }
    rows, steps = {}, {}
    for name in tqdm(args.methods, desc=f"{backbone}: prepare"):
        torch.manual_seed(args.seed)
        try:
            model = METHODS[name](build(), targets).to(args.device).train()
        except ValueError as error:
            rows[name] = {"backbone": backbone, "method": name, "skipped": str(error)}
            continue
        report = profile_memory(model, batch, autocast=torch.bfloat16 if args.autocast else None)
        steps[name] = training_step(model, batch, args.autocast)
        steps[name]()
        rows[name] = {
            "backbone": backbone,
            "method": name,
            "trainable": report.trainable_parameters,
            "parameters": report.total_parameters,
            "saved_bytes_per_image": report.saved_bytes / args.batch_size,
            "peak_bytes": report.step_peak_bytes,
        }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(args.rounds), desc=f"{backbone}: rounds"):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if args.device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        rows[name] |= {"step_seconds": statistics.median(times), "all_step_seconds": times}
    return list(rows.values())


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "backbone", "method", "saved MiB/image", "peak MiB", "step s", "saved / LoRA", "peak / LoRA", "step / LoRA"
    )
    lora_rows = {row["backbone"]: row for row in rows if row["method"] == "LoRA" and "skipped" not in row}
    for row in rows:
        if "skipped" in row:
            table.add_row(row["backbone"], row["method"], "not supported by the model class")
            continue
        base = lora_rows.get(row["backbone"])
        names = ("saved_bytes_per_image", "peak_bytes", "step_seconds")
        ratios = [f"{row[name] / base[name]:.2f}" if base else "" for name in names]
        table.add_row(
            row["backbone"],
            row["method"],
            f"{row['saved_bytes_per_image'] / 2**20:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['step_seconds']:.3f}",
            *ratios,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="*", default=list(BACKBONES), metavar="BACKBONE", help=", ".join(BACKBONES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args()
    if unknown := set(args.backbones) - set(BACKBONES):
        parser.error(f"unknown backbones {sorted(unknown)}; known: {sorted(BACKBONES)}")
    warnings.filterwarnings("ignore")
    rows = [row for backbone in args.backbones for row in measure(backbone, args)]
    environment = describe_environment(args.device)
    settings = {name: getattr(args, name) for name in ("batch_size", "rounds", "seed", "device", "autocast")}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"memory_and_speed-{slug(environment['device'])}{'-bf16' if args.autocast else ''}.json"
    path.write_text(json.dumps({"environment": environment, "settings": settings, "rows": rows}, indent=1) + "\n")
    console = Console(width=140)
    console.print(table_of(rows))
    console.print(f"{environment['device']}, torch {environment['torch']}; written to {path}")


if __name__ == "__main__":
    main()
