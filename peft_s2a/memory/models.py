"""Vision models by name, made from their configuration alone: no weights are read."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


# (transformers' model type, what differs from the default configuration), after the released checkpoints.
_DINOV2 = {"patch_size": 14, "image_size": 224}
_SWIN_T = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
_SWIN_S = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]}
_SWIN_B = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
_SWIN_L = {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]}


def _transformer(width: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


_SMALL, _BASE, _LARGE = _transformer(384, 12, 6), _transformer(768, 12, 12), _transformer(1024, 24, 16)

KNOWN_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit-s": ("vit", _SMALL),
    "vit-b": ("vit", _BASE),
    "vit-l": ("vit", _LARGE),
    "deit-s": ("deit", _SMALL),
    "deit-b": ("deit", _BASE),
    "beit-b": ("beit", _BASE),
    "beit-l": ("beit", _LARGE),
    "dinov2-s": ("dinov2", _DINOV2 | _SMALL),
    "dinov2-b": ("dinov2", _DINOV2 | _BASE),
    "dinov2-l": ("dinov2", _DINOV2 | _LARGE),
    "dinov2-g": ("dinov2", _DINOV2 | _transformer(1536, 40, 24) | {"use_swiglu_ffn": True}),
    "swin-t": ("swin", _SWIN_T),
    "swin-s": ("swin", _SWIN_S),
    "swin-b": ("swin", _SWIN_B),
    "swin-l": ("swin", _SWIN_L),
    "swinv2-t": ("swinv2", _SWIN_T | {"window_size": 8, "image_size": 256}),
    "swinv2-b": ("swinv2", _SWIN_B | {"window_size": 8, "image_size": 256}),
    "resnet18": ("resnet", {"depths": [2, 2, 2, 2], "layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}),
    "resnet50": ("resnet", {"depths": [3, 4, 6, 3]}),
    "resnet101": ("resnet", {"depths": [3, 4, 23, 3]}),
    "convnext-t": ("convnext", {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]}),
    "convnext-s": ("convnext", {"depths": [3, 3, 27, 3], "hidden_sizes": [96, 192, 384, 768]}),
    "convnext-b": ("convnext", {"depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]}),
}


@dataclass(frozen=True)
class VisionModel:
    """A model to be made, any number of times.

    Attributes:
        name: As it was asked for.
        config: Its transformers configuration.
    """

    name: str
    config: Any

    def build(self, device: str = "meta", dtype: torch.dtype = torch.float32) -> nn.Module:
        """The image classifier with random weights, in train mode; the bare backbone where transformers has no
        classifier of this type. On the meta device nothing is allocated.

        Raises:
            ValueError: If transformers cannot make an image model of the configuration.
        """
        from transformers import AutoModel, AutoModelForImageClassification

        config = copy.deepcopy(self.config)
        is_classifier = type(config) in AutoModelForImageClassification._model_mapping
        if is_classifier and not config.architectures:  # where there are several, transformers asks for the one meant
            classes = AutoModelForImageClassification._model_mapping[type(config)]
            config.architectures = [(classes[0] if isinstance(classes, tuple) else classes).__name__]  # type: ignore[union-attr]
        auto = AutoModelForImageClassification if is_classifier else AutoModel
        try:
            with torch.device(device):
                model = auto.from_config(config, dtype=dtype)
        except (ValueError, ImportError, KeyError) as error:
            raise ValueError(
                f"{self.name}: transformers cannot make a model of this configuration: {error}"
            ) from error
        return model.train()  # type: ignore[no-any-return]

    @property
    def loss_fn(self) -> Callable[[nn.Module, Any], torch.Tensor] | None:
        """The loss of a training step: the model's own, or for a bare backbone the mean square of its features."""
        from transformers import AutoModelForImageClassification

        return None if type(self.config) in AutoModelForImageClassification._model_mapping else _feature_loss


def find_model(name: str, image_size: int | None = None, num_labels: int | None = None) -> VisionModel:
    """A vision model by name.

    Args:
        name: One of `KNOWN_MODELS` ("vit-b"), a model type of transformers in its default configuration ("segformer"),
            a folder with a `config.json` or such a file, or the id of a checkpoint on the Hub, of which only the
            configuration is read.
        image_size: Pixels of the square images, None for the model's own.
        num_labels: Number of classes, None for the model's own.

    Raises:
        ValueError: If there is no such model, or its configuration cannot be read.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if name in KNOWN_MODELS:
        model_type, settings = KNOWN_MODELS[name]
        config = CONFIG_MAPPING[model_type](**settings)
    elif Path(name).exists() or "/" in name:
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: cannot read its configuration: {error}") from error
    elif name in CONFIG_MAPPING:
        config = CONFIG_MAPPING[name]()
    else:
        close = difflib.get_close_matches(name, [*KNOWN_MODELS, *CONFIG_MAPPING.keys()], n=3, cutoff=0.5)
        raise ValueError(
            f"{name}: no such model{'; did you mean ' + ' or '.join(close) + '?' if close else '.'} Known names: "
            f"{', '.join(KNOWN_MODELS)}; also a transformers model type, a folder with a config.json, or a Hub id"
        )
    if image_size is not None:
        if image_size < 1:
            raise ValueError(f"image_size: must be positive, got {image_size}")
        vision_config = getattr(config, "vision_config", config)
        if hasattr(vision_config, "image_size"):
            vision_config.image_size = image_size
    if num_labels is not None:
        config.num_labels = num_labels
    return VisionModel(name, config)


def _feature_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(pixel_values=batch["pixel_values"]).last_hidden_state.square().mean()  # type: ignore[no-any-return]
