"""What `peft-s2a plan` says: how much memory each way of fine-tuning takes, and which batch fits a card.

    python benchmarks/plans.py                        # ViT-B/16, Swin-B, ResNet-50, DINOv2-g; a budget of 24 GiB

Estimates from shapes alone, for the kernels of CPUs: nothing runs, and no weights are read.

Writes `benchmarks/results/plans.json`.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from environment import RESULTS, describe_environment, write_result
from rich.console import Console
from tqdm.auto import tqdm

from peft_s2a.memory.methods import METHODS
from peft_s2a.memory.models import find_model
from peft_s2a.memory.plan import Plan, plan_memory


MODELS = ("vit-b", "swin-b", "resnet50", "dinov2-g")
SHOWN = ("full", "bias", "lora", "lora+checkpointing", "s2a", "s2a-ladder")
GiB = 2**30


def rows_of(plan: Plan) -> list[dict[str, Any]]:
    """The figures of a plan, sizes in bytes, without the split by operator and module."""
    rows = []
    for row in plan.rows:
        shared = {"model": plan.model.name, "method": row.method.name}
        if row.report is None:
            rows.append({**shared, "skipped": row.problem})
            continue
        rows.append(
            {
                **shared,
                "trainable": row.report.trainable_parameters,
                "parameters": row.report.total_parameters,
                "saved_bytes_per_image": row.report.saved_bytes / plan.batch_size,
                "peak_bytes": row.report.peak_bytes,
                "step_peak_bytes": row.report.step_peak_bytes,
                "largest_batch_size": row.largest_batch_size,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help="as for `peft-s2a plan`")
    parser.add_argument("--methods", nargs="+", default=list(SHOWN), choices=METHODS, metavar="METHOD")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--budget", type=float, default=24, help="GiB")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    methods = {name: METHODS[name] for name in args.methods}
    console = Console(width=140)
    rows = []
    for name in args.models:
        plan = plan_memory(
            find_model(name),
            methods,
            batch_size=args.batch_size,
            budget=int(args.budget * GiB),
            track=lambda chosen, name=name: tqdm(chosen, desc=name),
        )
        console.print(plan)
        rows += rows_of(plan)
    settings = {"batch_size": args.batch_size, "budget_bytes": int(args.budget * GiB)}
    path = RESULTS / "plans.json"
    write_result(path, {"environment": describe_environment(), "settings": settings, "rows": rows})
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
