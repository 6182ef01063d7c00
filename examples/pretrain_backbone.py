"""Pretrain the small ViT that ships with the examples (`examples/backbone/`) on Fashion-MNIST.

    python examples/pretrain_backbone.py --output_dir examples/backbone

The data are the four idx files of Zalando's Fashion-MNIST (MIT licence), as Debian's package
`dataset-fashion-mnist` installs them. Standard recipe: random crop and horizontal flip, label smoothing,
AdamW, linear warm-up, cosine decay; the matrices of the encoder are trained by Muon (Jordan et al. 2024, with the
update scale of Liu et al. 2025, arXiv:2502.16982), which here learns much more from each of the few epochs than AdamW
alone. The test images are looked at once, after training, through the saved files.
"""

import gzip
import math
import shlex
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, HfArgumentParser, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.trainer_utils import set_seed


LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
IMAGE_SIZE = 28

MODEL_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
datasets: [zalando-datasets/fashion_mnist]
---

# Small ViT pretrained on Fashion-MNIST

A ViT of {parameters:,} parameters ({layers} layers, width {width}, patches of {patch} x {patch} pixels,
{size} x {size} images, grey levels repeated over 3 channels), so that the examples have a pretrained backbone without
a download. Weights are stored in float16 and load as float32.

* Test accuracy: **{accuracy:.2%}** on the {test_images:,} test images, measured through these files.
* Data: [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) (Xiao, Rasul, Vollgraf 2017; MIT licence,
  copyright Zalando SE), {train_images:,} training images.
* Made by: `{command}` (seed {seed}, {epochs} epochs, {minutes:.0f} minutes on {threads} CPU thread(s), torch {torch}).

```python
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(
    "examples/backbone", num_labels=10, ignore_mismatched_sizes=True
)
```
"""


@dataclass
class Arguments:
    output_dir: str = field(default="examples/backbone", metadata={"help": "Where model, processor and card go."})
    data_dir: str = field(
        default="/usr/share/datasets/fashion-mnist", metadata={"help": "Folder of the four Fashion-MNIST .gz files."}
    )
    epochs: int = 6
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 0.5
    label_smoothing: float = 0.1
    crop_padding: int = field(default=2, metadata={"help": "Random crops are taken after padding by so many pixels."})
    hidden_size: int = 128
    num_layers: int = 6
    num_heads: int = 4
    patch_size: int = 4
    seed: int = 0


def read_idx(path: Path) -> torch.Tensor:
    """The uint8 tensor in a gzipped idx file (format: yann.lecun.com/exdb/mnist)."""
    if not path.is_file():
        raise SystemExit(
            f"{path} not found. Install Debian's package dataset-fashion-mnist (apt install dataset-fashion-mnist), "
            "or pass --data_dir with a folder that holds the files of "
            "https://github.com/zalandoresearch/fashion-mnist."
        )
    with gzip.open(path) as file:
        zeros, dtype, dimensions = struct.unpack(">HBB", file.read(4))
        if zeros != 0 or dtype != 0x08:
            raise SystemExit(f"{path} is not an idx file of unsigned bytes.")
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        values = np.frombuffer(file.read(), dtype=np.uint8)
    if values.size != math.prod(shape):
        raise SystemExit(f"{path} is truncated: {values.size} values, its header promises {math.prod(shape)}.")
    return torch.from_numpy(values.reshape(shape).copy())


def read_split(data_dir: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 28, 28) uint8 and labels (N,) int64 of `split`, "train" or "t10k"."""
    images = read_idx(data_dir / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(data_dir / f"{split}-labels-idx1-ubyte.gz")
    return images, labels.long()


def pixel_values(images: torch.Tensor) -> torch.Tensor:
    """(B, H, W) uint8 to (B, 3, H, W) float32 in [-1, 1], as the saved image processor computes it."""
    return (images.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def augment(images: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    """A random crop of each zero-padded image and, for every other one, its mirror image. (B, H, W) in and out."""
    batch, height, width = images.shape
    padded = torch.nn.functional.pad(images, [padding] * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, batch), generator=generator)
    columns = torch.arange(width).expand(batch, width)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, width - 1 - columns, columns) + left[:, None]
    rows = torch.arange(height) + top[:, None]
    return padded[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    correct = 0
    for chunk, target in zip(images.split(500), labels.split(500), strict=True):
        correct += (model(pixel_values=pixel_values(chunk)).logits.argmax(-1) == target).sum().item()
    return correct / len(labels)


def pretrain(args: Arguments, images: torch.Tensor, labels: torch.Tensor) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=args.patch_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        intermediate_size=4 * args.hidden_size,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    model = ViTForImageClassification(config).train()
    matrices = [p for p in model.vit.layers.parameters() if p.ndim == 2]
    are_matrices = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in are_matrices]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=args.learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=args.learning_rate, weight_decay=0.0),
    ]
    steps_per_epoch = len(images) // args.batch_size
    steps, warmup = args.epochs * steps_per_epoch, max(1, round(args.warmup_epochs * steps_per_epoch))
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        )
        for optimizer in optimizers
    ]
    generator = torch.Generator().manual_seed(args.seed)
    mean_loss = None
    with tqdm(total=steps, desc="pretraining", mininterval=1.0) as progress:
        for epoch in range(args.epochs):
            order = torch.randperm(len(images), generator=generator)[: steps_per_epoch * args.batch_size]
            for indices in order.split(args.batch_size):
                inputs = pixel_values(augment(images[indices], args.crop_padding, generator))
                logits = model(pixel_values=inputs).logits
                loss = torch.nn.functional.cross_entropy(logits, labels[indices], label_smoothing=args.label_smoothing)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()
                mean_loss = loss.item() if mean_loss is None else 0.99 * mean_loss + 0.01 * loss.item()
                progress.update()
                progress.set_postfix(epoch=epoch + 1, loss=f"{mean_loss:.3f}", refresh=False)
    return model


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    data_dir, output_dir = Path(args.data_dir), Path(args.output_dir)
    images, labels = read_split(data_dir, "train")
    test_images, test_labels = read_split(data_dir, "t10k")
    set_seed(args.seed)

    start = time.perf_counter()
    model = pretrain(args, images, labels)
    minutes = (time.perf_counter() - start) / 60

    # float16 halves the files; the configuration keeps float32, so from_pretrained loads float32.
    model.save_pretrained(output_dir, state_dict={name: value.half() for name, value in model.state_dict().items()})
    ViTImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    ).save_pretrained(output_dir)

    saved = AutoModelForImageClassification.from_pretrained(output_dir)
    test_accuracy = accuracy(saved, test_images, test_labels)
    (output_dir / "README.md").write_text(
        MODEL_CARD.format(
            parameters=model.num_parameters(),
            layers=args.num_layers,
            width=args.hidden_size,
            patch=args.patch_size,
            size=IMAGE_SIZE,
            accuracy=test_accuracy,
            train_images=len(images),
            test_images=len(test_images),
            command=shlex.join(["python", *sys.argv]),
            seed=args.seed,
            epochs=args.epochs,
            minutes=minutes,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
    )
    print(f"test accuracy {test_accuracy:.2%}, {minutes:.1f} minutes, saved to {output_dir}")


if __name__ == "__main__":
    main()
