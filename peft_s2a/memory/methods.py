"""The ways of fine-tuning that a plan compares. A method added to the table appears everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning.

    Attributes:
        name: Short name.
        description: What is trained, in a few words.
        apply: Makes a model trainable this way: changes it or returns a wrapper. Raises ValueError on models that do
            not support it.
    """

    name: str
    description: str
    apply: Callable[[nn.Module], nn.Module]


def _full(model: nn.Module) -> nn.Module:
    return model


def _linear(model: nn.Module) -> nn.Module:
    heads = _heads(model)
    if not heads:
        raise ValueError("the model has no task head to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_in_any(name, heads))
    return model


def _bias(model: nn.Module) -> nn.Module:
    heads = _heads(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or _in_any(name, heads))
    return model


def lora(model: nn.Module, **settings: Any) -> nn.Module:
    """PEFT's LoRA with r = 8 on `lora_targets`, and the task head. `settings` are others of `peft.LoraConfig`."""
    from peft import LoraConfig, get_peft_model

    heads = _heads(model)
    return get_peft_model(
        model, LoraConfig(r=8, target_modules=lora_targets(model), modules_to_save=heads or None, **settings)
    )


def lora_targets(model: nn.Module) -> list[str]:
    """Query and value projections; without attention all other linear layers; without those all convolutions that are
    not depthwise. The task head is none of them.

    Raises:
        ValueError: If the model has none of these.
    """
    from peft_s2a.anatomy import FUSED_NAMES, QUERY_NAMES, VALUE_NAMES

    heads = _heads(model)
    layers = {name: layer for name, layer in model.named_modules() if not _in_any(name, heads)}
    linears = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    attention_names = FUSED_NAMES | QUERY_NAMES | VALUE_NAMES
    projections = [name for name in linears if name.rpartition(".")[2] in attention_names]
    convolutions = [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d) and layer.groups == 1]
    targets = projections or linears or convolutions
    if not targets:
        raise ValueError("the model has neither linear layers nor convolutions beside its head")
    return targets


def checkpointed(
    apply: Callable[[nn.Module], nn.Module], every_n_layers: int = 1, offload: bool = False
) -> Callable[[nn.Module], nn.Module]:
    """The same with activations recomputed in the backward pass (non-reentrant), those of one block in
    `every_n_layers`; with `offload`, from copies in the host's memory. ValueError on models, and versions of
    transformers, that do not support it."""

    def apply_checkpointed(model: Any) -> nn.Module:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ValueError(f"{type(model).__name__} does not support gradient checkpointing")
        model = apply(model)
        if hasattr(model, "activation_checkpointing_enable"):  # from transformers 5.23 on, where the old name warns
            model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers, offload)
        elif every_n_layers == 1 and not offload:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            raise ValueError("transformers before 5.23 checkpoints all blocks or none, and offloads nothing")
        return model  # type: ignore[no-any-return]

    return apply_checkpointed


def _s2a(**settings: Any) -> Callable[[nn.Module], nn.Module]:
    def apply(model: nn.Module) -> nn.Module:
        from peft import get_peft_model

        from peft_s2a import S2AConfig

        return get_peft_model(model, S2AConfig(**settings))

    return apply


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("full", "all parameters", _full),
        Method("linear", "task head only", _linear),
        Method("bias", "biases (BitFit) and head", _bias),
        Method("lora", "LoRA, r = 8 on q and v, or linears, or convolutions", lora),
        Method("lora+checkpointing", "LoRA, activations recomputed", checkpointed(lora)),
        Method("s2a", "bias, prompt and side", _s2a()),
        Method("s2a-bias", "S2A, bias only", _s2a(structures=("bias",))),
        Method("s2a-prompt", "S2A, prompt only", _s2a(structures=("prompt",))),
        Method("s2a-side", "S2A, side only", _s2a(structures=("side",))),
        Method("s2a-ladder", "S2A, ladder beside a frozen backbone", _s2a(structures=("side",), side_mode="ladder")),
    )
}


def _heads(model: nn.Module) -> list[str]:
    from peft_s2a.anatomy import find_task_heads

    return find_task_heads(model)


def _in_any(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
