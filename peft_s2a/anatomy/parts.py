"""Attention layers, MLPs, stages and blocks, found by the modules' types, widths and usual names.

Models that nobody listed are covered by the same rules as the listed ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .heads import find_task_heads
from .layers import CONVOLUTIONS, projections, visible_modules
from .usage import Usage


QUERY_NAMES = {"q_proj", "query", "q", "to_q", "wq"}
KEY_NAMES = {"k_proj", "key", "k", "to_k", "wk"}
VALUE_NAMES = {"v_proj", "value", "v", "to_v", "wv"}
FUSED_NAMES = {"qkv", "qkv_proj", "in_proj", "query_key_value", "to_qkv"}
OUTPUT_NAMES = {"o_proj", "out_proj", "proj", "dense", "projection", "to_out", "wo", "out"}
HEAD_COUNT_NAMES = ("num_attention_heads", "num_heads", "n_heads", "heads")


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
        and name.removesuffix(".0").rpartition(".")[2] in OUTPUT_NAMES  # diffusers: a list of it and a dropout
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
        layers = projections(module)
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        parent_name, _, own_name = name.rpartition(".")
        entry = side_entry(model.get_submodule(parent_name), own_name)
        if entry is not None:
            linears = [*projections(entry), *linears]
        elif next(module.children(), None) is None or type(module).forward is nn.Module.forward:  # a list of layers
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
    return entry if all(isinstance(layer, nn.Linear) for layer in projections(entry)) else None


def ends(module: nn.Module, entry: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    """(the layer that reads what `module` reads, the layer that writes what it returns): the query and the output
    projection of an attention layer, of others the first and the last layer. `entry` is the module that reads in the
    place of `module` (see `side_entry`)."""
    attention = None if entry is not None else find_attention(module).get("")
    if attention is not None:
        return attention.query, attention.output
    return projections(module if entry is None else entry)[0], projections(module)[-1]


def find_stages(model: nn.Module) -> list[str]:
    """The stages of a convolutional network: from the root down, the first place where its convolutions are shared out
    over several modules.

    timm's models skip the stages under gradient checkpointing and call the blocks in them, so there the blocks of a stage
    stand for it.
    """
    stages = _find_stages(model)
    timm_model = getattr(model, "timm_model", model)
    if not hasattr(timm_model, "set_grad_checkpointing"):
        return stages
    return [block for name in stages for block in _blocks_in(model, name)]


def _blocks_in(model: nn.Module, name: str) -> list[str]:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Sequential):
        return [name]
    blocks = [key for key, child in module.named_children() if next(child.children(), None) and projections(child)]
    return [block for key in blocks for block in _blocks_in(model, f"{name}.{key}")] or [name]


def _find_stages(model: nn.Module) -> list[str]:
    heads = find_task_heads(model)
    name, module = "", model
    while True:
        children = {
            f"{name}.{key}" if name else key: child
            for key, child in module.named_children()
            if not isinstance(child, AuxiliaryTrainingWrapper)
        }
        counts = {
            key: sum(isinstance(layer, CONVOLUTIONS) for layer in projections(child))
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


def find_stem(model: nn.Module, usage: Usage | None = None) -> str | None:
    """The first convolution: what reads the image. The order is that of use where it is known."""
    names = [name for name, module in visible_modules(model) if isinstance(module, nn.Conv2d)]
    if usage is not None:
        names = [name for name in usage.calls if name in names] or names
    return next(iter(names), None)
