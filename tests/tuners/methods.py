"""The tuners that most tests run over: PEFT's LoRA as the reference, S2A's variants, on a small ViT."""

from __future__ import annotations

import families
import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import ViTForImageClassification

from peft_s2a import S2ABiasConfig, S2AConfig, S2APromptConfig, S2ASideConfig


LINEAR_SIDE = {"structures": ("bias", "side"), "side_activation": "linear", "target_modules": ["q_proj", "fc1", "fc2"]}
S2A = {
    "s2a": S2AConfig,
    "s2a_bias": S2ABiasConfig,
    "s2a_prompt": S2APromptConfig,
    "s2a_side": S2ASideConfig,
    "s2a_ladder": lambda **kwargs: S2AConfig(**{"structures": ("side",), "side_mode": "ladder", **kwargs}),
    "s2a_linear": lambda **kwargs: S2AConfig(**{**LINEAR_SIDE, **kwargs}),
}
METHODS = ("lora", *S2A)
MERGEABLE = ("lora", "s2a_bias", "s2a_linear")


def make_config(method: str, *, random_start: bool = False, **kwargs) -> PeftConfig:
    """A configuration that also trains the classifier. `random_start` makes the adapter change the output at once."""
    # Activations are left alone here, so that gradients can be compared to the last bits.
    if method == "lora":
        kwargs = {"target_modules": ["q_proj", "v_proj", "fc1"], "modules_to_save": ["classifier"], **kwargs}
        return LoraConfig(r=4, init_lora_weights=not random_start, **kwargs)
    return S2A[method](init_weights=not random_start, **{"activation_quantization": None, **kwargs})


def base_model(seed: int = 0) -> ViTForImageClassification:
    return families.build("vit", seed).eval()


IMAGES, LABELS = families.batch("vit")


def logits(model: nn.Module) -> torch.Tensor:
    """Logits for fixed images, without gradient."""
    with torch.no_grad():
        return families.logits(model, IMAGES)


def train_a_little(model: nn.Module, steps: int = 2, lr: float = 1e-2) -> list[float]:
    """A few steps of Adam on the fixed images. Returns the losses, the one after the last step included."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    losses = []
    for step in range(steps + 1):
        loss = nn.functional.cross_entropy(families.logits(model, IMAGES), LABELS)
        losses.append(loss.item())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    return losses


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def snapshot(model: nn.Module) -> dict:
    """All that an adapter might leave behind in a model."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trainable": trainable(model),
        "hooks": hooks(model),
        "training": {name: module.training for name, module in model.named_modules()},
    }


def assert_untouched(model: nn.Module, before: dict, *, trainable_too: bool = True) -> None:
    now = snapshot(model)
    assert now["modules"] == before["modules"]
    assert now["hooks"] == before["hooks"]
    assert now["training"] == before["training"]
    assert now["weights"].keys() == before["weights"].keys()
    assert all(torch.equal(now["weights"][name], tensor) for name, tensor in before["weights"].items())
    if trainable_too:
        assert now["trainable"] == before["trainable"]
        assert not hasattr(model, "peft_config")
