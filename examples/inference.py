"""Classify image files with a saved adapter.

    python examples/inference.py --adapter outputs/image_classification --images cat.jpg dog.jpg --top_k 3

`--adapter` is a folder or a Hub id that holds an adapter, or a complete model (`--method full` and `linear` save one).
Labels and image processor are read beside the adapter where they are, and from the base checkpoint otherwise.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser

import peft_s2a  # noqa: F401  (registers the S2A adapter types with PEFT)


# PEFT 0.21 asks transformers 5.23 for a property by its old name, at every model.
warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)


@dataclass
class Arguments:
    adapter: str = field(metadata={"help": "Folder or Hub id of the adapter."})
    images: list[str] = field(metadata={"help": "Image files."})
    base_model: str | None = field(default=None, metadata={"help": "The base checkpoint. None: as the adapter says."})
    top_k: int = field(default=3, metadata={"help": "Labels to show for each image."})
    batch_size: int = field(default=16, metadata={"help": "Images classified at a time."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu, cuda, ..."})
    json: bool = field(default=False, metadata={"help": "Print JSON: a list of {image, labels, probabilities}."})


def _beside(load: Callable[[str], Any], adapter: str, base_model: str) -> Any:
    """`load(adapter)` where the adapter's folder has what is loaded, `load(base_model)` otherwise."""
    try:
        return load(adapter)
    except (OSError, ValueError):  # ValueError: a folder without config.json
        return load(base_model)


def load_classifier(adapter: str, base_model: str | None = None) -> tuple[torch.nn.Module, Any]:
    """The model in evaluation mode, and its image processor."""
    try:
        base_model = base_model or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except ValueError:  # no adapter_config.json: a complete model
        model = AutoModelForImageClassification.from_pretrained(adapter)
        return model.eval(), AutoImageProcessor.from_pretrained(adapter)
    config = _beside(AutoConfig.from_pretrained, adapter, base_model)
    model = AutoModelForImageClassification.from_pretrained(
        base_model, config=config, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    image_processor = _beside(AutoImageProcessor.from_pretrained, adapter, base_model)
    return PeftModel.from_pretrained(model, adapter).eval(), image_processor


@torch.inference_mode()
def classify(model: torch.nn.Module, image_processor: Any, images: list[Image.Image], device: str) -> torch.Tensor:
    """Probabilities (images, labels), float32, on the CPU."""
    pixel_values = image_processor(images, return_tensors="pt")["pixel_values"].to(device)
    return model(pixel_values=pixel_values).logits.float().softmax(-1).cpu()


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    model, image_processor = load_classifier(args.adapter, args.base_model)
    model.to(args.device)
    id2label = model.config.id2label
    results = []
    for start in range(0, len(args.images), args.batch_size):
        files = args.images[start : start + args.batch_size]
        images = []
        for file in files:
            with Image.open(file) as image:
                images.append(image.convert("RGB"))
        best = classify(model, image_processor, images, args.device).topk(min(args.top_k, len(id2label)))
        for file, probabilities, indices in zip(files, best.values.tolist(), best.indices.tolist(), strict=True):
            results.append(
                {"image": file, "labels": [id2label[index] for index in indices], "probabilities": probabilities}
            )
    if args.json:
        print(json.dumps(results))
        return
    table = Table("image", "labels")
    for result in results:
        pairs = zip(result["labels"], result["probabilities"], strict=True)
        table.add_row(result["image"], ", ".join(f"{label} {probability:.1%}" for label, probability in pairs))
    Console().print(table)


if __name__ == "__main__":
    main()
