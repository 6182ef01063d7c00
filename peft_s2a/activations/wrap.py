"""`quantize_activations` and `restore_activations`: making the modules of a model train with quantised activations.

A module is changed by giving it a subclass of its own class whose forward runs the stock forward under an
`interception.OperatorMode` (`torch.nn.utils.parametrize` changes modules the same way). Parameters, hooks,
``state_dict`` keys and ``isinstance`` checks stay as they are; going back is giving the module its class again. Blocks
and MLPs moreover run in tiles (`tiling`).
"""

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from . import tiling
from .config import ActivationQuantizationConfig
from .functional import _autocast_dtype
from .interception import OperatorMode


# Modules whose own forward pass only hands tensors to other modules, or holds none of the operators.
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_ADAPTED = (BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper)
_LEFT_ALONE = (*_LISTS, nn.Sequential, nn.Identity, nn.Embedding, PreTrainedModel, *_ADAPTED)

# Bytes for the working set of one tile: enough for its operators to have work to do, small beside the codes that are kept.
_ROOM = {"cpu": 12 * 2**20}
_DEFAULT_ROOM = 12 * 2**24
_SLACK = 0.25  # of a tile: not worth another one
# Bytes that running a block forward and backward takes, for each byte of its input: with linear layers, with convolutions only.
_WORKING_SET, _WORKING_SET_OF_CONVOLUTIONS = 11, 8


@dataclass
class _Settings:
    """How one module runs while its activations are quantised."""

    operators: OperatorMode
    tile_dim: int | None  # 0: in tiles of samples, 1: of tokens, None: whole
    later: float = 0.0  # bytes of codes that the blocks after this one will keep, for each byte of its input
    working_set: int = _WORKING_SET
    producer: nn.Module | None = None  # for activation functions: the module whose result nobody else reads
    certificates: dict[Any, tiling.Certificate] = field(default_factory=dict)

    @property
    def config(self) -> ActivationQuantizationConfig:
        return self.operators.config


class _Quantized:
    """Mixed into the class of every quantised module, before its stock class."""

    _activation_settings: _Settings

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_quantized, (_stock_class(self),), *state


def _new_quantized(stock: type[nn.Module]) -> nn.Module:
    cls = _quantized_class(stock)
    return cls.__new__(cls)


def _stock_class(module: nn.Module) -> type[nn.Module]:
    """The class a module has when its activations are not quantised."""
    return type(module).__mro__[2] if isinstance(module, _Quantized) else type(module)


@functools.cache
def _quantized_class(stock: type[nn.Module]) -> type[nn.Module]:
    is_linear = stock is nn.Linear

    @functools.wraps(stock.forward)
    def forward(self, *args, **kwargs):
        settings = self._activation_settings
        if not torch.is_grad_enabled() or (is_linear and _is_frozen(self._parameters.get("weight"))):
            return stock.forward(self, *args, **kwargs)

        settings.operators.overwrites = settings.producer is not None and not (
            _has_hooks(settings.producer) or _has_hooks(self) or torch.compiler.is_compiling()
        )

        whole = functools.partial(settings.operators.run, stock.forward, self)
        if settings.tile_dim is None or torch.compiler.is_compiling():
            return whole(*args, **kwargs)
        return _in_tiles(self, settings, whole, args, kwargs)

    names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock.__name__, (_Quantized, stock), {"forward": forward, **names})


def _is_frozen(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and not parameter.requires_grad


def quantize_activations(
    model: nn.Module, config: ActivationQuantizationConfig | Mapping[str, Any] | None = None
) -> nn.Module:
    """Make ``model`` train with quantised activations, in place, and return it.

    Its outputs are those of the stock model: equal bit for bit on the reference backend, within rounding of the dtype
    on the others. What is kept for backward are codes, whenever autograd records and whatever is trained. Calling it
    again applies the new configuration, also to modules added since; `restore_activations` undoes it.

    Args:
        model: any module: a model, one that a tuner has been added to, or a single layer.
        config: an `ActivationQuantizationConfig`, a dict of its arguments, or None for the defaults.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    if config is None:
        config = ActivationQuantizationConfig()
    elif isinstance(config, Mapping):
        config = ActivationQuantizationConfig.from_dict(config)
    elif not isinstance(config, ActivationQuantizationConfig):
        raise ValueError(
            "`config` must be an ActivationQuantizationConfig, a dict of its arguments or None, got "
            f"{type(config).__name__}."
        )
    blocks = _later_codes(model, set(_blocks(model)))
    mlps = {module: codes for block, codes in blocks.items() for module in block.modules() if _is_mlp(module)}
    later = mlps | blocks
    producers = _producers(model)
    for name, module in model.named_modules():
        if config.skips(name) or not _has_operators(module):
            _restore(module)
            continue
        tile_dim = 0 if module in blocks else 1 if _is_mlp(module) else None
        module.__class__ = _quantized_class(_stock_class(module))
        producer = producers.get(module) if config.backend != "reference" else None
        working_set = _WORKING_SET if tile_dim is None else _working_set(module)
        module._activation_settings = _Settings(
            OperatorMode(config, name), tile_dim, later.get(module, 0.0), working_set, producer
        )
    return model


def restore_activations(model: nn.Module) -> nn.Module:
    """Undo `quantize_activations`, in place: every module gets its stock class again. Returns ``model``."""
    for module in model.modules():
        _restore(module)
    return model


def _restore(module: nn.Module) -> None:
    if isinstance(module, _Quantized):
        module.__class__ = _stock_class(module)
        del module._activation_settings


def _has_operators(module: nn.Module) -> bool:
    return not isinstance(module, _LEFT_ALONE) and hasattr(type(module), "forward")


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that take a batch of samples and return one: the blocks or stages of a backbone, and what precedes
    them.

    The former are the outermost modules that are repeated: members of lists and sequences whose class occurs there
    more than once. The latter are the outermost modules with children and without any of the former inside: patch
    embeddings, stems.
    """
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    times = Counter(_stock_class(child) for parent in lists for child in parent.children())

    def is_repeated(parent: nn.Module, child: nn.Module) -> bool:
        repeated = isinstance(parent, (nn.ModuleList, nn.Sequential)) and times[_stock_class(child)] > 1
        return repeated and not isinstance(child, _LEFT_ALONE) and next(child.children(), None) is not None

    around = {module for module in model.modules() if any(_any_inside(module, is_repeated))}
    blocks, pending = [], [model]
    while pending:
        module = pending.pop()
        for child in module.children():
            is_stem = module in around and child not in around and not isinstance(child, _LEFT_ALONE)
            if is_repeated(module, child) or (is_stem and next(child.children(), None) is not None):
                blocks.append(child)
            else:
                pending.append(child)
    return blocks


def _later_codes(model: nn.Module, blocks: set[nn.Module]) -> dict[nn.Module, float]:
    """{block: bytes of codes that the blocks after it will keep, for each byte of its input}, roughly.

    A guess from the layers alone: half a byte for each value that a norm puts out, somewhat less for a linear layer (some
    of them only add to the features), a bit for each of a convolution; twice the width means a quarter of the positions.
    """
    later, codes = {}, 0.0  # of the blocks seen so far, from the end, where a layer of width w has 1 / w^2 positions
    for block in reversed([module for module in model.modules() if module in blocks]):
        layers = [found for module in _without_adapters(block) if (found := _widths_and_codes(module)) is not None]
        later[block] = codes * layers[0][0] / 4 if layers else 0.0
        codes += sum(kept / min(read, written) ** 2 for read, written, kept in layers)
    return later


def _without_adapters(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` and the modules in it, apart from those that tuners added."""
    yield module
    for name, child in module.named_children():
        if not isinstance(module, BaseTunerLayer) or name == "base_layer":
            yield from _without_adapters(child)


def _widths_and_codes(layer: nn.Module) -> tuple[int, int, float] | None:
    """(channels read, channels written, bytes kept at a position) of a linear layer, a convolution or a norm."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, 0.4 * layer.out_features
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return layer.in_channels, layer.out_channels, layer.out_channels / 8
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1], layer.normalized_shape[-1], 0.5 * layer.normalized_shape[-1]
    return None


def _working_set(block: nn.Module) -> int:
    has_linear = any(isinstance(module, nn.Linear) for module in block.modules())
    return _WORKING_SET if has_linear else _WORKING_SET_OF_CONVOLUTIONS


def _any_inside(module: nn.Module, predicate) -> Iterator[bool]:
    return (predicate(parent, child) for parent in module.modules() for child in parent.children())


def _producers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """{activation function: linear or convolutional layer} for pairs of which it is certain that nothing but the
    activation function reads what the layer computes, so that this may be overwritten.

    Certainty comes from tracing the forward pass of the module that holds both; where that cannot be traced there is
    none.
    """
    producers: dict[nn.Module, nn.Module] = {}
    refused: set[nn.Module] = set()
    for parent in model.modules():
        children = dict(parent.named_children())
        plain = [c for c in children.values() if not [*c.parameters()] and not [*c.children()]]
        if not any(_computes(child) for child in children.values()) or not plain:
            continue
        readers = _single_readers(parent, children)
        for child in plain:
            if child in readers and child not in producers and child not in refused:
                producers[child] = readers[child]
            else:  # read elsewhere too, or a part of several modules
                producers.pop(child, None)
                refused.add(child)
    return producers


def _computes(module: nn.Module) -> bool:
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _single_readers(parent: nn.Module, children: dict[str, nn.Module]) -> dict[nn.Module, nn.Module]:
    """{child: layer} for children of ``parent`` that are called once, with the result of a layer that only they
    read."""
    if isinstance(parent, nn.ModuleList | nn.ModuleDict | PreTrainedModel | BaseTunerLayer):
        return {}
    quantized = type(parent)
    parent.__class__ = _stock_class(parent)
    try:
        nodes = list(_ChildTracer().trace(parent).nodes)
    except Exception:  # control flow that depends on values, calls that cannot be recorded, and the like
        return {}
    finally:
        parent.__class__ = quantized
    calls = [node for node in nodes if node.op == "call_module" and node.target in children]
    times = Counter(children[node.target] for node in calls)
    readers = {}
    for node in calls:
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if source not in calls or len(source.users) != 1:
            continue
        child, layer = children[node.target], children[source.target]
        if times[child] == times[layer] == 1 and _computes(layer):
            readers[child] = layer
    return readers


class _ChildTracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True


def _is_mlp(module: nn.Module) -> bool:
    """Whether a module consists of two or more linear layers and of parameter-free leaves such as activation
    functions.

    That its forward pass treats tokens one by one is then likely, and found out by `tiling.certify`.
    """
    children = [child.get_base_layer() if isinstance(child, BaseTunerLayer) else child for child in module.children()]
    linear = [child for child in children if isinstance(child, nn.Linear)]
    others = [child for child in children if not isinstance(child, nn.Linear)]
    plain = all(next(child.parameters(), None) is None and next(child.children(), None) is None for child in others)
    return len(linear) > 1 and len(others) > 0 and plain


def _in_tiles(module: nn.Module, settings: _Settings, whole, args: tuple, kwargs: dict) -> Any:
    """Run ``whole(*args, **kwargs)``, the forward pass of ``module``, in tiles if that is possible and pays."""
    leaves = tree_leaves((args, kwargs))
    size = _tile_size(settings, leaves)
    if size is None:
        return whole(*args, **kwargs)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not _pays(module, parameters, leaves[0]):
        return whole(*args, **kwargs)
    masks = _masks(leaves, settings.tile_dim)
    if masks is None:
        return whole(*args, **kwargs)
    key = (module.training, len(parameters))
    certificate = settings.certificates.get(key)
    if certificate is None:
        certificate = tiling.certify(module, whole, args, kwargs, settings.tile_dim, masks)
        if not certificate.tentative:
            settings.certificates[key] = certificate
    if certificate.reason is not None:
        return whole(*args, **kwargs)
    return tiling.run_tiled(whole, args, kwargs, parameters, size, settings.tile_dim, masks, certificate.draws)


def _tile_size(settings: _Settings, leaves: list[Any]) -> int | None:
    """Rows of a tile, or None if one would hold all rows, or the module has to run whole."""
    dim, tiles = settings.tile_dim, settings.config.mlp_tiles
    if not leaves or not isinstance(leaves[0], Tensor) or leaves[0].dim() < dim + 2 or leaves[0].numel() == 0:
        return None
    x = leaves[0]
    count = x.shape[dim]
    if tiling.inside_tile():
        return None
    if settings.config.backend == "reference":  # bit for bit the stock forward, which matrix products of tiles are not
        return None
    if tiles == "auto":
        # Memory peaks where all codes are kept, in the last blocks; those before them have that much more room.
        room = _ROOM.get(x.device.type, _DEFAULT_ROOM) + settings.later * x.nbytes
        itemsize = min(x.itemsize, (_autocast_dtype(x) or x.dtype).itemsize)
        tiles = max(1, math.ceil(settings.working_set * x.numel() * itemsize / room - _SLACK))
    size = -(-count // tiles)
    return size if size < count else None


def _pays(module: nn.Module, parameters: list[nn.Parameter], x: Tensor) -> bool:
    """Whether running in tiles saves memory, and goes unnoticed by hooks."""
    if not (x.requires_grad or parameters):
        return False
    if sum(parameter.nbytes for parameter in parameters) > x.nbytes:  # their gradients are added up tile after tile
        return False
    if any(
        getattr(layer, "is_read_later", False) and layer.get_base_layer() is not module for layer in module.modules()
    ):
        return False  # what it noted of the last tile would be taken for the whole
    # hooks would fire for every tile
    return not any(parameter._backward_hooks for parameter in parameters) and not _is_observed(module)


def _masks(leaves: list[Any], dim: int) -> list[int] | None:
    """Positions of the attention masks (``[samples, heads or 1, queries, keys]``) that are tiled together with the
    first leaf (``[samples, tokens, channels]``); None if it cannot be told whether another tensor has to be."""
    masks = []
    for position, leaf in enumerate(leaves[1:], start=1):
        if isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == leaves[0].shape[dim]:
            if dim != 0 or leaf.dim() != 4 or leaves[0].dim() != 3 or leaf.requires_grad:
                return None
            masks.append(position)
    return masks


def _is_observed(module: nn.Module) -> bool:
    """Whether hooks of others look at what happens inside the module."""
    return any(_has_hooks(inner) for inner in module.modules() if inner is not module)


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(not _is_harmless(hook) for of_a_kind in hooks for hook in of_a_kind.values())


def _is_harmless(hook: Any) -> bool:
    hook = hook.func if isinstance(hook, functools.partial) else hook
    origin = getattr(hook, "__module__", None) or ""
    if origin == "transformers.utils.output_capturing":  # installed once, records only while outputs are asked for
        from transformers.utils.output_capturing import _active_collector

        return not _active_collector.get()
    return origin.split(".")[0] == "peft_s2a"
