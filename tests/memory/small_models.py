"""Small models, as the tests of memory use them."""

from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from peft_s2a import S2AConfig
from peft_s2a.activations.plans.planner import Planner


def backbone(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "vit":
        sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 384}
        return ViTForImageClassification(ViTConfig(**sizes, image_size=96, patch_size=8, num_labels=10))
    if name == "swin":
        sizes = {"embed_dim": 32, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "drop_path_rate": 0.0}
        return SwinForImageClassification(SwinConfig(**sizes, image_size=64, num_labels=10))
    sizes = {"embedding_size": 32, "hidden_sizes": [64, 128, 256], "depths": [2, 2, 1]}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=10))


def tuned(name: str, method: str) -> nn.Module:
    model = backbone(name)
    if method == "lora":
        targets = ["convolution"] if name == "resnet" else ["q_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, modules_to_save=["classifier"]))
    elif method == "s2a":
        model = get_peft_model(model, S2AConfig())
    return model.train()


def batch_for(name: str, batch_size: int = 4) -> dict[str, torch.Tensor]:
    size = {"vit": 96, "swin": 64, "resnet": 96}[name]
    return {"pixel_values": torch.randn(batch_size, 3, size, size), "labels": torch.arange(batch_size) % 10}


def settings_of(model: nn.Module) -> list:
    """How the quantised modules of a model run."""
    return [module._activation_settings for module in model.modules() if hasattr(module, "_activation_settings")]


@contextmanager
def plans_made():
    """A list that grows by one with every plan that is recorded."""
    made, make = [], Planner._make

    def counted(planner, *arguments):
        made.append(planner)
        return make(planner, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Planner, "_make", counted)
        yield made
