"""What the example scripts share: their data, their models and the fine-tuning methods they compare.

A method is defined here once, in `METHODS`; a script asks for one by name through `MethodArguments`.
"""

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import evaluate
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from peft_s2a import ActivationQuantizationConfig, S2ABiasConfig, S2AConfig, S2APromptConfig, S2ASideConfig
from peft_s2a.anatomy import find_task_heads
from peft_s2a.memory.methods import lora_targets


# PEFT 0.21 asks transformers 5.23 for a property by its old name, at every model.
warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)

ACCURACY = Path(__file__).parent / "metrics" / "accuracy"
IMAGE_FILE_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default="google/vit-base-patch16-224-in21k",
        metadata={"help": "Any checkpoint for AutoModelForImageClassification: a Hub id or a folder."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})


@dataclass
class DataArguments:
    dataset_name: str | None = field(
        default=None, metadata={"help": "An image dataset that `datasets.load_dataset` knows: a Hub id or a folder."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of `dataset_name`."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    train_file: str | None = field(
        default=None, metadata={"help": "A parquet, arrow, json, jsonl or csv file of images (or paths) and labels."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    image_column_name: str | None = field(default=None, metadata={"help": "None: the only column of images."})
    label_column_name: str | None = field(default=None, metadata={"help": "None: `label`, `labels` or `fine_label`."})
    validation_share: float = field(
        default=0.15, metadata={"help": "Share of the training images held out where there is no evaluation split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random subset of this size."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on a random subset of this size."})
    augmentation: Literal["crop_flip", "flip", "none"] = field(
        default="crop_flip", metadata={"help": "Random changes to training images: square crops, mirror images."}
    )


@dataclass
class MethodArguments:
    method: Literal["s2a", "s2a_bias", "s2a_prompt", "s2a_side", "lora", "linear", "full"] = field(
        default="s2a", metadata={"help": "What to train: S2A or one of its structures, LoRA, the head, everything."}
    )
    side_rank: int | None = field(default=None, metadata={"help": "Width of S2A's side branches."})
    side_mode: Literal["residual", "ladder"] = field(
        default="residual", metadata={"help": "S2A's side branches: beside each module, or beside the backbone."}
    )
    num_prompt_tokens: int | None = field(default=None, metadata={"help": "S2A's prompt tokens per attention layer."})
    activation_bits: int = field(
        default=4,
        metadata={"help": "Bits of the activations S2A keeps for backward: 1, 2, 3, 4, 8; 0: full precision."},
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt, for S2A and LoRA. None: chosen from the model."}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's updates are scaled by lora_alpha / lora_rank."})


def load_images(args: DataArguments, seed: int = 0) -> datasets.DatasetDict:
    """Splits "train" and "validation" with the columns `image` (PIL) and `label` (a `ClassLabel`).

    Raises:
        ValueError: if the arguments name no data, or the columns cannot be told apart.
    """
    sources = [name for name in ("dataset_name", "train_dir", "train_file") if getattr(args, name)]
    if len(sources) != 1:
        given = ", ".join(sources) or "none of them"
        raise ValueError(f"Pass one of --dataset_name, --train_dir and --train_file, got {given}.")
    if args.dataset_name:
        raw = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    elif args.train_dir:
        folders = {"train": args.train_dir, "validation": args.validation_dir}
        raw = datasets.load_dataset(
            "imagefolder", data_files={split: str(Path(folder) / "**") for split, folder in folders.items() if folder}
        )
    else:
        suffix = Path(args.train_file).suffix
        if suffix not in IMAGE_FILE_BUILDERS:
            raise ValueError(
                f"--train_file must end in one of {', '.join(IMAGE_FILE_BUILDERS)}, got {args.train_file}."
            )
        files = {"train": args.train_file, "validation": args.validation_file}
        raw = datasets.load_dataset(
            IMAGE_FILE_BUILDERS[suffix], data_files={split: file for split, file in files.items() if file}
        )
    return _splits(_columns(raw, args), args, seed)


def _columns(raw: datasets.DatasetDict, args: DataArguments) -> datasets.DatasetDict:
    """`raw` with its image and label columns named `image` and `label`, and no others."""
    features = next(iter(raw.values())).features
    images = [args.image_column_name] if args.image_column_name else []
    images = images or [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images = images or [name for name in ("image", "img") if name in features]
    labels = [args.label_column_name] if args.label_column_name else []
    labels = labels or [name for name in ("label", "labels", "fine_label") if name in features]
    for columns, flag in ((images, "--image_column_name"), (labels, "--label_column_name")):
        if len(columns) != 1 or columns[0] not in features:
            raise ValueError(
                f"{flag} must name one column of the dataset: got {', '.join(columns) or 'nothing'}, "
                f"the columns are {', '.join(features)}."
            )
    raw = raw.select_columns([images[0], labels[0]]).rename_columns({images[0]: "image", labels[0]: "label"})
    if not isinstance(features[images[0]], datasets.Image):
        raw = raw.cast_column("image", datasets.Image())
    if not isinstance(features[labels[0]], datasets.ClassLabel):
        names = sorted({str(label) for split in raw.values() for label in split.unique("label")})
        raw = raw.cast_column("label", datasets.Value("string")).cast_column("label", datasets.ClassLabel(names=names))
    return raw


def _splits(raw: datasets.DatasetDict, args: DataArguments, seed: int) -> datasets.DatasetDict:
    if "train" not in raw:
        raise ValueError(f"The dataset has no split named train, but {', '.join(raw)}.")
    held_out = next((raw[name] for name in ("validation", "valid", "test") if name in raw), None)
    if held_out is None:
        parts = raw["train"].train_test_split(args.validation_share, seed=seed)
        splits = {"train": parts["train"], "validation": parts["test"]}
    else:
        splits = {"train": raw["train"], "validation": held_out}
    for name, limit in (("train", args.max_train_samples), ("validation", args.max_eval_samples)):
        if limit is not None and limit < len(splits[name]):
            splits[name] = splits[name].shuffle(seed=seed).select(range(limit))
    return datasets.DatasetDict(splits)


class ImageTransform:
    """What a batch of a dataset becomes when it is read: `pixel_values` tensors and `labels`.

    Images are augmented with PIL and finished by the checkpoint's own image processor. Random numbers come from
    `random`, which `set_seed` and the workers of a `DataLoader` seed.
    """

    def __init__(self, image_processor: Any, augmentation: str = "none"):
        self.image_processor = image_processor
        self.augmentation = augmentation

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        images = [self._augment(image.convert("RGB")) for image in batch["image"]]
        pixel_values = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixel_values), "labels": batch["label"]}

    def _augment(self, image: Image.Image) -> Image.Image:
        if self.augmentation == "crop_flip":
            side = max(1, round(min(image.size) * random.uniform(0.6, 1.0)))
            left, top = (random.randint(0, extent - side) for extent in image.size)
            image = image.crop((left, top, left + side, top + side))
        if self.augmentation != "none" and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


def load_backbone(args: ModelArguments, label_names: list[str]) -> tuple[PreTrainedModel, Any]:
    """The checkpoint with a head for `label_names`, and its image processor."""
    model = AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path,
        revision=args.model_revision,
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )
    return model, AutoImageProcessor.from_pretrained(args.model_name_or_path, revision=args.model_revision)


def _s2a_options(args: MethodArguments, *names: str) -> dict[str, Any]:
    """What all S2A configurations take, and those options in `names` that were set: the others have defaults there."""
    options = {name: getattr(args, name) for name in ("target_modules", *names) if getattr(args, name) is not None}
    quantization = ActivationQuantizationConfig(bits=args.activation_bits) if args.activation_bits else None
    return {"activation_quantization": quantization, **options}


def _s2a(model: PreTrainedModel, args: MethodArguments) -> PeftConfig:
    structures = ("side",) if args.side_mode == "ladder" else ("bias", "prompt", "side")
    return S2AConfig(structures=structures, **_s2a_options(args, "side_mode", "side_rank", "num_prompt_tokens"))


def _s2a_bias(model: PreTrainedModel, args: MethodArguments) -> PeftConfig:
    return S2ABiasConfig(**_s2a_options(args))


def _s2a_prompt(model: PreTrainedModel, args: MethodArguments) -> PeftConfig:
    return S2APromptConfig(**_s2a_options(args, "num_prompt_tokens"))


def _s2a_side(model: PreTrainedModel, args: MethodArguments) -> PeftConfig:
    return S2ASideConfig(**_s2a_options(args, "side_mode", "side_rank"))


def _lora(model: PreTrainedModel, args: MethodArguments) -> PeftConfig:
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        target_modules=args.target_modules or lora_targets(model),
        modules_to_save=find_task_heads(model),
    )


@dataclass(frozen=True)
class Method:
    """How a method is called in tables, its learning rate where none is given, and the PEFT configuration it uses."""

    title: str
    learning_rate: float
    config: Callable[[PreTrainedModel, MethodArguments], PeftConfig] | None = None


METHODS = {
    "s2a": Method("S2A", 2e-3, _s2a),
    "s2a_bias": Method("S2A, biases only", 2e-3, _s2a_bias),
    "s2a_prompt": Method("S2A, prompts only", 3e-3, _s2a_prompt),
    "s2a_side": Method("S2A, side branches only", 2e-3, _s2a_side),
    "lora": Method("LoRA", 2e-3, _lora),
    "linear": Method("linear probe", 1e-2),
    "full": Method("full fine-tuning", 1e-4),
}


def prepare_model(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """`model` made trainable by a method: a `PeftModel`, or `model` itself for `linear` and `full`."""
    method = METHODS[args.method]
    if method.config is not None:
        return get_peft_model(model, method.config(model, args))
    if args.method == "linear":
        model.requires_grad_(False)
        for name in find_task_heads(model):
            model.get_submodule(name).requires_grad_(True)
    return model


def trainable_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def load_accuracy() -> evaluate.EvaluationModule:
    """The accuracy metric shipped with the examples, kept in memory: every process computes its own."""
    return evaluate.load(str(ACCURACY), keep_in_memory=True)
