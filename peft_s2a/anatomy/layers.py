"""The leaves of a model: which of them compute, which normalise, and how wide they are."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMALISATIONS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *BATCH_NORMS)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

# Small networks that make position biases, beside the path that features take.
POSITION_NETWORKS = ("continuous_position_bias_mlp", "cpb_mlp", "relative_position_bias", "rel_pos")


def is_normalisation(module: nn.Module) -> bool:
    """Torch's normalisation layers, and a model's own ones that are called so and hold one scale vector."""
    if isinstance(module, NORMALISATIONS):
        return True
    named_so = any(kind in type(module).__name__ for kind in ("LayerNorm", "RMSNorm"))
    weight = getattr(module, "weight", None)
    return named_so and isinstance(weight, nn.Parameter) and weight.dim() == 1


def has_running_statistics(module: nn.Module) -> bool:
    """Whether a batch or instance normalisation notes down what it sees in training, and uses it in inference."""
    return isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)) and module.running_mean is not None


def _base_of(module: nn.Module) -> nn.Module | None:
    """What an adapter's layer wraps; None for one that wraps nothing but sits on another module."""
    return module.get_base_layer() if "base_layer" in module._modules else None


def visible_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, base module) of all modules but the root, as if no adapter were there.

    Wrapped leaves appear under the wrapper's name; what adapters and `modules_to_save` added does not appear, nor do
    the parts of an `nn.MultiheadAttention`, which it never calls as modules.
    """
    hidden: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(prefix) for prefix in hidden):
            continue
        if isinstance(module, (AuxiliaryTrainingWrapper, BaseTunerLayer, nn.MultiheadAttention)):
            hidden.append(f"{name}.")
        if isinstance(module, BaseTunerLayer):
            base = _base_of(module)
            if base is not None:
                yield name, base
        elif not isinstance(module, AuxiliaryTrainingWrapper):
            yield name, module


def hidden_in_heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What `visible_modules` leaves out: the base model's own modules where an adapter trains a copy of them whole, by their
    names in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            original = module.original_module
            yield name, original
            yield from ((f"{name}.{inner}", part) for inner, part in visible_modules(original))


def held_aside(model: nn.Module) -> set[int]:
    """The ids of modules that others keep in a list or dict of their own, besides their children: wrapping the child
    would leave the one that is called as it is (MaskFormer's convolution blocks)."""
    found = set()
    for holder in model.modules():
        if isinstance(holder, BaseTunerLayer):
            continue
        for name, value in vars(holder).items():
            items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            if not name.startswith("_"):
                found.update(id(item) for item in items if isinstance(item, nn.Module))
    return found


def projections(module: nn.Module) -> list[nn.Module]:
    """The linear and convolution layers that features pass in `module` (or `module` itself), in order.

    Those of adapters and of networks that make position biases are not among them.
    """
    if isinstance(module, BaseTunerLayer):
        module = _base_of(module)
    if module is None:
        return []
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return [module]
    found = []
    for name, child in module.named_children():
        if name not in POSITION_NETWORKS:
            found.extend(projections(child))
    return found


def input_width(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def output_width(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
