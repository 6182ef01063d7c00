"""Fine-tune a semantic segmentation model with S2A or LoRA on generated scenes, and see what each takes in memory.

    python examples/semantic_segmentation.py --model_name_or_path nvidia/mit-b0 --learning_rate 2e-3
    python examples/semantic_segmentation.py --model_name_or_path openmmlab/upernet-swin-tiny --method lora

Images show discs, squares and stripes of random colours on a textured ground, one class each. Without
`--model_name_or_path` a small SegFormer with random weights is made, so that nothing is downloaded; with it, any
checkpoint for AutoModelForSemanticSegmentation. Prints the training loss and the mean intersection over union, and at the
end a training step of S2A beside one of LoRA. Writes adapter and results to `--output_dir`.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import evaluate
import torch
from finetuning import MethodArguments, prepare_model, trainable_parameters
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoModelForSemanticSegmentation,
    HfArgumentParser,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    set_seed,
)

from peft_s2a import MemoryReport, profile_memory


MEAN_IOU = Path(__file__).parent / "metrics" / "mean_iou"
CLASSES = ("ground", "disc", "square", "stripe")


@dataclass
class Arguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "None: a small SegFormer, untrained."})
    method: Literal["s2a", "lora"] = field(default="s2a", metadata={"help": "What to train with."})
    output_dir: str = field(default="outputs/semantic_segmentation", metadata={"help": "Where results are written."})
    learning_rate: float = 2e-3
    steps: int = 300
    batch_size: int = 8
    image_size: int = 128
    eval_images: int = 64
    seed: int = 0


def scenes(images: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """`pixel_values` [images, 3, size, size], about standardised, and `labels` [images, size, size] out of `CLASSES`."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    pixels = torch.empty(images, 3, size, size)
    labels = torch.zeros(images, size, size, dtype=torch.int64)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    for image, label in zip(pixels, labels):
        waves = torch.sin(x * between(0.1, 0.5) + y * between(0.1, 0.5) + between(0, 2 * math.pi))
        image.copy_(between(-1, 1, 3)[:, None, None] + 0.3 * waves)
        for kind in (1 + torch.randperm(3, generator=generator)).tolist():
            across, down = (value.item() for value in between(0.2, 0.8, 2) * size)
            radius = between(0.12, 0.25).item() * size
            dx, dy = (x - across).abs(), (y - down).abs()
            inside = {1: dx**2 + dy**2 < radius**2, 2: torch.maximum(dx, dy) < 0.8 * radius, 3: dx < 0.3 * radius}[
                kind
            ]
            image[:, inside] = between(-1.5, 1.5, 3)[:, None]
            label[inside] = kind
        image.add_(0.2 * torch.randn(image.shape, generator=generator))
    return {"pixel_values": pixels, "labels": labels}


def load_model(args: Arguments) -> PreTrainedModel:
    labels = dict(enumerate(CLASSES))
    if args.model_name_or_path is not None:
        return AutoModelForSemanticSegmentation.from_pretrained(
            args.model_name_or_path, id2label=labels, ignore_mismatched_sizes=True, dtype=torch.float32
        )
    config = SegformerConfig(
        hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4], mlp_ratios=[2] * 4,
        decoder_hidden_size=64, id2label=labels, initializer_range=0.1,
    )  # fmt: skip
    return SegformerForSemanticSegmentation(config)


def adapted(args: Arguments, method: str) -> torch.nn.Module:
    """The same model with the same new head for every method."""
    set_seed(args.seed)
    return prepare_model(load_model(args), MethodArguments(method=method))


@torch.no_grad()
def mean_iou(model: torch.nn.Module, args: Arguments) -> float:
    """Over images that training never sees."""
    metric = evaluate.load(str(MEAN_IOU), keep_in_memory=True)
    generator = torch.Generator().manual_seed(args.seed + 10_000)
    model.eval()
    for start in range(0, args.eval_images, args.batch_size):
        batch = scenes(min(args.batch_size, args.eval_images - start), args.image_size, generator)
        logits = model(pixel_values=batch["pixel_values"]).logits
        found = torch.nn.functional.interpolate(logits, size=batch["labels"].shape[1:], mode="bilinear").argmax(1)
        metric.add_batch(predictions=found.flatten().numpy(), references=batch["labels"].flatten().numpy())
    model.train()
    return metric.compute(num_labels=len(CLASSES))["mean_iou"]


def train(model: torch.nn.Module, args: Arguments, console: Console) -> list[float]:
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps)
    losses = []
    model.train()
    for step in range(args.steps):
        loss = model(**scenes(args.batch_size, args.image_size, generator)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 0 or (step + 1) % max(1, args.steps // 10) == 0:
            console.print(f"step {step + 1:5}   loss {loss.item():.3f}")
    return losses


def side_by_side(reports: dict[str, MemoryReport]) -> Table:
    table = Table("", "trained", "kept for backward", "peak of a step", title="One training step")
    for method, report in reports.items():
        kept, peak = report.saved_bytes / 2**20, report.step_peak_bytes / 2**20
        table.add_row(method, f"{report.trainable_parameters:,}", f"{kept:.1f} MiB", f"{peak:.1f} MiB")
    return table


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    console = Console()
    model = adapted(args, args.method)
    console.print(f"{args.method} trains {trainable_parameters(model):,} parameters")
    before = mean_iou(model, args)
    losses = train(model, args, console)
    after = mean_iou(model, args)
    console.print(f"mean IoU {before:.3f} before, {after:.3f} after training")
    model.save_pretrained(args.output_dir)

    batch = scenes(args.batch_size, args.image_size, torch.Generator().manual_seed(args.seed))
    reports = {method: profile_memory(adapted(args, method), batch) for method in ("lora", "s2a")}
    console.print(side_by_side(reports))
    results = {
        "losses": losses,
        "mean_iou": {"before": before, "after": after},
        "memory": {method: report.saved_bytes for method, report in reports.items()},
    }
    (Path(args.output_dir) / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
