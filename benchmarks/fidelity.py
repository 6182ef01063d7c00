"""How close quantised gradients are to exact ones, on real weights and real images.

    python benchmarks/fidelity.py CACHE [--out benchmarks/results/fidelity.json]

DINOv2-small (`dinov2.py` puts it into CACHE) with a random head for ten classes. Images: Fashion-MNIST (Debian's package
dataset-fashion-mnist) and scikit-learn's handwritten digits, resized. The gradients of all biases and norm scales are compared with
those of the unquantised model on the same batch: cosine and relative error over all of them together, means over batches.
One operator kind at a time at every width, and the whole model.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from dinov2 import checkpoint
from images import digits, fashion_mnist, pixel_values
from tqdm import tqdm
from transformers import AutoModelForImageClassification

from peft_s2a import ActivationQuantizationConfig, quantize_activations, restore_activations
from peft_s2a.activations.codec import WIDTHS


KINDS = ("activation", "norm", "attention")


def batches(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
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


def gradient(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def compare(model: torch.nn.Module, data: list, exact: list[torch.Tensor], **settings) -> dict[str, float]:
    quantize_activations(model, ActivationQuantizationConfig(**settings))
    ours = [gradient(model, batch) for batch in data]
    restore_activations(model)
    cosines = [F.cosine_similarity(a, b, 0).item() for a, b in zip(ours, exact)]
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, exact)]
    return {
        "cosine": statistics.mean(cosines), "worst_cosine": min(cosines), "relative_error": statistics.mean(errors),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", help="folder for the checkpoint")
    parser.add_argument("--batches", type=int, default=3, help="of each kind of image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole-model-only", action="store_true")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = AutoModelForImageClassification.from_pretrained(checkpoint(args.cache), num_labels=10)
    for name, p in model.named_parameters():
        p.requires_grad = name.endswith("bias") or "norm" in name
    data = batches(args.batches, args.seed)
    exact = [gradient(model, batch) for batch in data]
    runs = {f"all, {bits} bits": {"bits": bits} for bits in ((4,) if args.whole_model_only else reversed(WIDTHS))}
    runs["all, 4 bits, stochastic"] = {"bits": 4, "rounding": "stochastic"}
    if not args.whole_model_only:
        # the other kinds at 8 bits, next to which their errors do not count
        runs.update(
            {f"{kind}, {bits} bits": {"bits": {"default": 8, kind: bits}} for kind in KINDS for bits in (4, 3, 2, 1)}
        )
    results = {}
    for label, settings in (progress := tqdm(runs.items(), unit="run")):
        results[label] = compare(model, data, exact, backend=args.backend, **settings)
        progress.write(
            "{:26s} cosine {cosine:.5f} (worst {worst_cosine:.5f})  relative error {relative_error:.4f}".format(
                label, **results[label]
            )
        )
    if args.out:
        context = {
            "model": "DINOv2-small", "batches": 3 * args.batches, "seed": args.seed, "torch": torch.__version__,
            "machine": platform.machine(), "backend": args.backend,
        }  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**context, "gradients": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
