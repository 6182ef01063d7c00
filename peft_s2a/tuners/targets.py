"""Where the structures go: the modules of a model that each of them can serve, and those it is put on by default.

Everything is read off the modules' types, widths and the names that vision models give their projections, so models
nobody listed are covered by the same rules as the listed ones. `UNUSED_MODULES` is all that depends on the model type.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, MODEL_MAPPING, PreTrainedModel

from peft_s2a.config import STRUCTURES, S2AConfig, _S2ABaseConfig
from peft_s2a.registration import PREFIX
from peft_s2a.tuners import bias, side
from peft_s2a.tuners.bias import BATCH_NORMS, CONVOLUTIONS, BiasLayer, is_normalisation
from peft_s2a.tuners.ladder import LadderRung
from peft_s2a.tuners.layer import AttachedLayer
from peft_s2a.tuners.prompt import PromptLayer


QUERY_NAMES = {"q_proj", "query", "q", "to_q", "wq"}
KEY_NAMES = {"k_proj", "key", "k", "to_k", "wk"}
VALUE_NAMES = {"v_proj", "value", "v", "to_v", "wv"}
FUSED_NAMES = {"qkv", "qkv_proj", "in_proj", "query_key_value", "to_qkv"}
OUTPUT_NAMES = {"o_proj", "out_proj", "proj", "dense", "projection", "to_out", "wo", "out"}
HEAD_COUNT_NAMES = ("num_attention_heads", "num_heads", "n_heads", "heads")
STRUCTURE_OF_LAYER = {
    PromptLayer.attribute: "prompt",
    side.SideLayer.attribute: "side",
    LadderRung.attribute: "ladder",
}
PLAIN_HEAD_NAMES = ("classifier", "head", "fc", "score")

# Modules whose output does not reach the loss in the usual heads; training them would leave gradients empty.
UNUSED_MODULES = {
    "clip": r"(.*\.)?(text_model(\..*)?|post_layernorm|text_projection|visual_projection)",
    "clip_vision_model": r"(.*\.)?post_layernorm",
    "siglip": r"(.*\.)?(text_model(\..*)?|vision_model\.head(\..*)?)",
    "siglip2": r"(.*\.)?(text_model(\..*)?|vision_model\.head(\..*)?)",
    "upernet": r"backbone\.\w+\.layernorm",  # backbones have a norm for each feature map they put out
}


@dataclass(frozen=True)
class Attention:
    """The parts of an attention layer that prompts need.

    Args:
        query: the query projection, or the fused one that starts with the query.
        output: the output projection.
        num_heads: attention heads.
        width: width of all heads together.
    """

    query: nn.Linear
    output: nn.Linear
    num_heads: int
    width: int


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
        if isinstance(module, BiasLayer):
            yield name, module.get_base_layer()
        elif not isinstance(module, (AuxiliaryTrainingWrapper, BaseTunerLayer)):
            yield name, module


def find_task_heads(model: nn.Module) -> list[str]:
    """The names of the modules that turn a backbone's features into the task's output.

    For transformers models these are all children with weights beside the base model, or those named so where the base
    model is no child of its own (CLIP, SigLIP, UperNet); a bare backbone has none. timm models say what their
    classifier is; in other modules it is a child with one of the usual names.
    """
    timm_model = getattr(model, "timm_model", model)
    children = dict(model.named_children())
    if hasattr(timm_model, "get_classifier"):
        classifier = timm_model.get_classifier()
        candidates = [classifier] if isinstance(classifier, nn.Module) else list(classifier or ())
        names = [name for name, module in model.named_modules() if any(module is item for item in candidates)]
    elif isinstance(model, PreTrainedModel):
        base_model = model.base_model
        if _is_bare_backbone(model):
            names = []
        elif base_model is not model:
            names = [name for name, module in children.items() if module is not base_model]
        else:
            names = [name for name in children if name.endswith(("classifier", "head"))]
    else:
        names = [name for name in PLAIN_HEAD_NAMES if name in children][:1]
    return [name for name in names if any(True for _ in model.get_submodule(name).parameters())]


def _is_bare_backbone(model: PreTrainedModel) -> bool:
    classes: list[type] = []
    for mapping in (MODEL_MAPPING, MODEL_FOR_BACKBONE_MAPPING):
        found = mapping.get(type(model.config), ())
        classes.extend(found if isinstance(found, (list, tuple)) else [found])
    return type(model) in classes


def find_attention(model: nn.Module) -> dict[str, Attention]:
    """The attention layers of a model, by name (`""`: the module itself).

    For each query projection this is the smallest module that also holds the output projection.
    """
    modules = {"": model, **dict(visible_modules(model))}
    found: dict[str, Attention] = {}
    for name, query in modules.items():
        own_name = name.rpartition(".")[2]
        if not isinstance(query, nn.Linear) or own_name not in QUERY_NAMES | FUSED_NAMES:
            continue
        is_fused = own_name in FUSED_NAMES
        width = query.out_features // 3 if is_fused else query.out_features
        parent_name = name
        for _ in range(min(2, name.count(".") + 1)):
            parent_name = parent_name.rpartition(".")[0]
            if parent_name not in modules or parent_name in found:
                break
            output = _output_projection(parent_name, modules, width)
            if output is None:
                continue
            inside = [modules[parent_name], modules.get(name.rpartition(".")[0], modules[parent_name])]
            if not any(_reads_weights_directly(module) for module in inside):
                found[parent_name] = Attention(query, output, _head_count(inside, width), width)
            break
    return found


def _output_projection(parent_name: str, modules: dict[str, nn.Module], width: int) -> nn.Linear | None:
    prefix = f"{parent_name}." if parent_name else ""
    candidates = [
        module
        for name, module in modules.items()
        if name.startswith(prefix)
        and name.rpartition(".")[2] in OUTPUT_NAMES
        and isinstance(module, nn.Linear)
        and module.in_features == width
    ]
    return candidates[-1] if candidates else None


def _reads_weights_directly(module: nn.Module) -> bool:
    """Attention that never calls its fused projection (timm's with separate biases), or whose tokens do not stay."""
    has_separate_bias = isinstance(getattr(module, "q_bias", None), nn.Parameter)
    return has_separate_bias or getattr(module, "query_stride", 1) not in (1, None)


def _head_count(modules: list[nn.Module], width: int) -> int:
    for module in modules:
        for name in HEAD_COUNT_NAMES:
            count = getattr(module, name, None)
            if isinstance(count, int) and count > 0 and width % count == 0:
                return count
    return width // 64 if width % 64 == 0 else 1


def find_mlps(model: nn.Module) -> list[str]:
    """The MLPs of a model: the smallest modules of Linears (and depthwise convolutions) with equal widths in and out.

    An MLP split over two siblings `intermediate` and `output` is named by the latter.
    """
    attention = find_attention(model)
    modules = dict(visible_modules(model))
    found: list[str] = []
    for name, module in modules.items():
        if any(key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.") for key in attention):
            continue
        layers = side.projections(module)
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        parent_name, _, own_name = name.rpartition(".")
        entry = side_entry(model.get_submodule(parent_name), own_name)
        if entry is not None:
            linears = [*side.projections(entry), *linears]
        elif not any(True for _ in module.children()):
            continue
        is_mlp = (
            len(linears) >= 2
            and linears[0].in_features == linears[-1].out_features
            and linears[0].out_features >= linears[0].in_features
            and all(isinstance(layer, nn.Linear) or layer.groups == layer.in_channels for layer in layers)
        )
        if is_mlp and (entry is not None or isinstance(layers[0], nn.Linear) or layers[0].groups > 1):
            found.append(name)
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


def side_entry(parent: nn.Module, name: str) -> nn.Module | None:
    """For the second half of an MLP split over siblings `intermediate` and `output` the first; None for others."""
    entry = getattr(parent, "intermediate", None)
    if name != "output" or not isinstance(entry, nn.Module):
        return None
    return entry if all(isinstance(layer, nn.Linear) for layer in side.projections(entry)) else None


def find_stages(model: nn.Module) -> list[str]:
    """The stages of a convolutional network: from the root down, the first place where its convolutions are shared out
    over several modules."""
    heads = find_task_heads(model)
    name, module = "", model
    while True:
        children = {
            f"{name}.{key}" if name else key: child
            for key, child in module.named_children()
            if not isinstance(child, (AttachedLayer, AuxiliaryTrainingWrapper))
        }
        counts = {
            key: sum(isinstance(layer, CONVOLUTIONS) for layer in side.projections(child))
            for key, child in children.items()
            if key not in heads
        }
        total = sum(counts.values())
        stages = [key for key, count in counts.items() if count >= 2]
        largest = max(counts, key=counts.get, default=None)
        if total and largest in stages and (len(stages) == 1 or counts[largest] > 0.9 * total):
            name, module = largest, children[largest]
            continue
        return stages


def find_blocks(model: nn.Module) -> list[str]:
    """The blocks a ladder runs beside: the elements of lists that hold attention or MLPs, else the stages."""
    parts = [*find_attention(model), *find_mlps(model)]
    modules = dict(visible_modules(model))
    blocks = []
    for name in modules:
        own_name = name.rpartition(".")[2]
        if own_name.isdigit() and any(part == name or part.startswith(f"{name}.") for part in parts):
            blocks.append(name)
    innermost = [name for name in blocks if not any(other.startswith(f"{name}.") for other in blocks)]
    return innermost or find_stages(model)


def find_stem(model: nn.Module) -> str | None:
    """The first convolution: what reads the image."""
    return next((name for name, module in visible_modules(model) if isinstance(module, nn.Conv2d)), None)


def resolve_targets(model: nn.Module, config: _S2ABaseConfig) -> dict[str, list[str]]:
    """Which modules each requested structure sits on.

    Args:
        model: the base model, possibly with adapters already.
        config: the configuration of the adapter to be added. `modules_to_save` has been resolved.

    Returns:
        structure ("bias", "prompt", "side", or "ladder" in ladder mode) -> full module names; under "statistics" the
        batch normalisations whose running statistics are frozen or belong to the adapter.

    Raises:
        NoMatchingPeftModuleError: (a ValueError) if a requested structure has no place to go, or if recorded targets
            are not in this model.
        ValueError: if recorded targets do not fit the modules or the structures of the configuration.
    """
    ladder = getattr(config, "side_mode", "residual") == "ladder"
    structures = ("ladder",) if ladder else config.structures
    if config.structure_targets is not None:
        targets = config.structure_targets
        _check_recorded_targets(model, config, structures)
    else:
        find = _default_targets if config.target_modules is None else _named_targets
        targets = find(model, config, structures)
        # Of structures that nobody asked for, those without a place do not stand in the way of named targets.
        if config.target_modules is not None and structures == STRUCTURES and any(targets.values()):
            targets = {structure: names for structure, names in targets.items() if names}
        for structure in structures:
            if structure in targets and not targets[structure]:
                _raise_no_place(model, config, structure)
        if statistics := find_statistics(model, config):
            targets["statistics"] = statistics
    # In the order of the model, which a ladder follows.
    order = {name: index for index, (name, _) in enumerate(visible_modules(model))}
    return {structure: sorted(names, key=order.__getitem__) for structure, names in targets.items()}


def find_statistics(model: nn.Module, config: _S2ABaseConfig) -> list[str]:
    """The batch normalisations with running statistics, but for those in modules that are trained in full."""
    return [
        name
        for name, module in visible_modules(model)
        if isinstance(module, BATCH_NORMS) and module.track_running_stats and not _is_saved_whole(config, name)
    ]


def recorded_in(state_dict: Iterable[str]) -> dict[str, list[str]]:
    """The targets of the adapter whose weights have these keys; see `resolve_targets`."""
    targets: dict[str, list[str]] = {}
    for key in state_dict:
        host, found, parameter = key.rpartition(f".{PREFIX}")
        name, _, attribute = host.rpartition(".")
        if found and attribute in STRUCTURE_OF_LAYER:
            targets.setdefault(STRUCTURE_OF_LAYER[attribute], []).append(name)
        elif found and PREFIX + parameter in BiasLayer.adapter_layer_names:
            targets.setdefault("bias", []).append(host)
    return {structure: list(dict.fromkeys(names)) for structure, names in targets.items()}


def _check_recorded_targets(model: nn.Module, config: _S2ABaseConfig, structures: tuple[str, ...]) -> None:
    modules = dict(visible_modules(model))
    attention = find_attention(model)
    for structure, names in config.structure_targets.items():
        if structure not in (*structures, "statistics"):
            raise ValueError(
                f"`structure_targets` names {structure!r}, but this configuration trains only {structures}."
            )
        missing = [name for name in names if name not in modules]
        if missing:
            raise NoMatchingPeftModuleError(
                f"The configuration was made for modules that {type(model).__name__} does not have: {missing[:3]}"
                f"{' and others' if len(missing) > 3 else ''}. Use the base model that the adapter was trained with, "
                f"or a new {type(config).__name__} for a new model."
            )
        for name in names:
            is_stem = structure == "prompt" and not attention and isinstance(modules[name], nn.Conv2d)
            if not is_stem and not _can_carry(structure, name, modules[name], attention):
                raise ValueError(
                    f"`structure_targets` puts {structure!r} on {name!r}, a {type(modules[name]).__name__}, which "
                    "cannot carry it. Use the base model that the adapter was trained with."
                )


def _can_carry(structure: str, name: str, module: nn.Module, attention: dict[str, Attention]) -> bool:
    if structure == "bias":
        return bias.can_serve(module)
    if structure == "prompt":
        return name in attention
    if structure == "statistics":
        return isinstance(module, BATCH_NORMS) and module.track_running_stats
    return side.can_serve(module)


def _raise_no_place(model: nn.Module, config: _S2ABaseConfig, structure: str) -> None:
    serves = {
        "bias": "linear, convolution and normalisation layers",
        "prompt": "attention layers with a query and an output projection"
        + (" (or the first convolution of a network without attention)" if config.target_modules is None else ""),
        "side": "Linear, Conv1d, Conv2d, and modules that start and end with such layers",
        "ladder": "blocks of a transformer and stages of a convolutional network",
    }
    found = "has none" if config.target_modules is None else f"has none among target_modules={config.target_modules!r}"
    if config.exclude_modules or config.layers_to_transform is not None:
        found += ", `exclude_modules` and `layers_to_transform` considered"
    others = [other for other in config.structures if other != structure]
    advice = (
        f", or train without it: `structures={tuple(others)!r}`" if others and isinstance(config, S2AConfig) else ""
    )
    raise NoMatchingPeftModuleError(
        f"The structure {structure!r} has no place to go in {type(model).__name__}: it serves {serves[structure]}, "
        f"and this model {found}. Name suitable modules in `target_modules`{advice}."
    )


def _in_selected_layers(config: _S2ABaseConfig, name: str) -> bool:
    """PEFT's rule: the first number in the name is the layer's index; modules outside the layers are not selected."""
    selected = config.layers_to_transform
    if selected is None or selected == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)(?:\.|$)", name)
        if match is not None:
            return int(match["index"]) in ([selected] if isinstance(selected, int) else selected)
    return False


def is_excluded(config: _S2ABaseConfig, name: str) -> bool:
    """Whether the name is in `exclude_modules` or in a head that is trained in full; as PEFT decides it."""
    excluded = config.exclude_modules
    if isinstance(excluded, str) and re.fullmatch(excluded, name):
        return True
    if not isinstance(excluded, str) and any(name == key or name.endswith(f".{key}") for key in excluded or ()):
        return True
    return _is_saved_whole(config, name)


def _is_saved_whole(config: _S2ABaseConfig, name: str) -> bool:
    return any(re.match(rf"(^|.*\.){key}($|\..*)", name) for key in config.modules_to_save or ())


def _default_targets(model: nn.Module, config: _S2ABaseConfig, structures: tuple[str, ...]) -> dict[str, list[str]]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    unused = UNUSED_MODULES.get(model_type)

    def keep(names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if _in_selected_layers(config, name)
            and not is_excluded(config, name)
            and not (unused and re.fullmatch(unused, name))
        ]

    attention = find_attention(model)
    mlps = find_mlps(model)
    targets: dict[str, list[str]] = {}
    if "bias" in structures:
        targets["bias"] = keep(_default_bias_targets(model, config))
    if "prompt" in structures:
        stem = find_stem(model)
        targets["prompt"] = keep(list(attention) if attention else [stem] if stem else [])
    if "side" in structures:
        same_width = [
            name for name, parts in attention.items() if parts.query.in_features == parts.output.out_features
        ]
        targets["side"] = keep([*mlps, *same_width]) or keep(find_stages(model)) or keep(_single_projections(model))
    if "ladder" in structures:
        targets["ladder"] = keep(find_blocks(model))
    return targets


def _default_bias_targets(model: nn.Module, config: _S2ABaseConfig) -> list[str]:
    """Leaves whose offset has an effect and can be merged: those that have a bias, and norms with only a scale.

    Left out are key projections (softmax does not see a constant added to all scores of a query, so their bias never
    gets a gradient), convolutions without a bias (a normalisation that has one follows them) and fused projections
    whose attention reads their weight directly.
    """
    modules = dict(visible_modules(model))
    found = []
    for name, module in modules.items():
        parent_name, _, own_name = name.rpartition(".")
        parent = modules.get(parent_name, model)
        reads_directly = own_name in FUSED_NAMES and isinstance(getattr(parent, "q_bias", None), nn.Parameter)
        if not bias.can_serve(module) or own_name in KEY_NAMES or reads_directly:
            continue
        has_bias = isinstance(getattr(module, "bias", None), nn.Parameter)
        trains_scale = getattr(config, "train_norm_scale", False) and is_normalisation(module)
        has_scale = isinstance(getattr(module, "weight", None), nn.Parameter)
        if has_bias or (trains_scale and has_scale and not isinstance(module, BATCH_NORMS)):
            found.append(name)
    return found


def _single_projections(model: nn.Module) -> list[str]:
    heads = find_task_heads(model)
    return [
        name
        for name, module in visible_modules(model)
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
        and getattr(module, "groups", 1) == 1
        and not any(name == head or name.startswith(f"{head}.") for head in heads)
    ]


def _named_targets(model: nn.Module, config: _S2ABaseConfig, structures: tuple[str, ...]) -> dict[str, list[str]]:
    """The structures that each module named by the user can carry."""
    modules = dict(visible_modules(model))
    if isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        # PEFT's own resolution does not see linear layers inside our wrappers.
        config.target_modules = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    attention = find_attention(model)
    blocks = find_blocks(model) if "ladder" in structures else ()
    targets: dict[str, list[str]] = {structure: [] for structure in structures}
    matched = [name for name in modules if check_target_module_exists(config, name)]
    for name in matched:
        for structure in structures:
            if name in blocks if structure == "ladder" else _can_carry(structure, name, modules[name], attention):
                targets[structure].append(name)
    if not matched:
        message = f"Target modules {config.target_modules} not found in the base model. "
        if config.layers_to_transform is not None:
            message += f"Note: You specified 'layers_to_transform': {config.layers_to_transform}. "
        raise NoMatchingPeftModuleError(message + "Please check the target modules and try again.")
    return targets
