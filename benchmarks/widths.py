"""Do the default learning rates suit narrow networks, and untrained ones?

    python benchmarks/widths.py                       # a few minutes on one core; prints the table of docs/choosing.md

ViTs of four layers with random frozen weights learn random labels of 32 noise images in 30 steps of AdamW. The weights have
a standard deviation of 1/sqrt(width), about that of trained ones, or of 0.02, as transformers initialises any width.

Writes `benchmarks/results/widths.json`.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from environment import RESULTS, describe_environment, write_result
from peft import LoraConfig, PeftConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification

from peft_s2a import S2ABiasConfig, S2AConfig


LEARNING_RATES = (5e-4, 2e-3, 5e-3)
IMAGES, LABELS = 32, 8


def configs() -> dict[str, PeftConfig]:
    exact = {"activation_quantization": None}
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return {
        "biases": S2ABiasConfig(**exact),
        "LoRA": lora,
        "S2A": S2AConfig(**exact),
    }


def last_loss(width: int, deviation: float, config: PeftConfig, learning_rate: float) -> float:
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=width, num_hidden_layers=4, num_attention_heads=max(1, width // 32), intermediate_size=4 * width,
            image_size=32, patch_size=8, num_labels=LABELS, initializer_range=deviation,
        )
    )  # fmt: skip
    images = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = get_peft_model(model, config).eval()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate, weight_decay=0)
    for _ in range(30):
        logits = model(pixel_values=images).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(IMAGES) % LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def table(rows: list[dict[str, Any]]) -> str:
    methods = list(configs())
    lines = [
        f"| weights | width | learning rate | {' | '.join(methods)} |",
        "|---|---" + "|---" * (1 + len(methods)) + "|",
    ]
    for row in rows:
        losses = " | ".join(f"{row['losses'][method]:.2f}" for method in methods)
        lines.append(f"| {row['weights']} | {row['width']} | {row['learning_rate']:g} | {losses} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 384])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    settings = [
        (weights, width, rate) for weights in ("1/√width", "0.02") for width in args.widths for rate in LEARNING_RATES
    ]
    rows = []
    for weights, width, rate in tqdm(settings):
        deviation = 0.02 if weights == "0.02" else width**-0.5
        losses = {name: last_loss(width, deviation, config, rate) for name, config in configs().items()}
        rows.append({"weights": weights, "width": width, "learning_rate": rate, "losses": losses})
    write_result(RESULTS / "widths.json", {"environment": describe_environment(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
