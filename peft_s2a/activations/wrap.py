"""`quantize_activations` and `restore_activations`: making the modules of a model train with quantised activations.

A module is changed by giving it a subclass of its own class whose forward runs the stock forward under an
`interception.OperatorMode` (`torch.nn.utils.parametrize` changes modules the same way). Parameters, hooks,
``state_dict`` keys and ``isinstance`` checks stay as they are; going back is giving the module its class again. Blocks
moreover run by plans (`plans`), which do the same without finding it out anew.
"""

import copy
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .. import compat
from ..parallelism import refuse_tensor_parallel
from . import notes
from .config import OPERATOR_KINDS, ActivationQuantizationConfig
from .interception import OperatorMode, follow_checkpoints
from .operators.quantized_weight import int4_linear, int8_linear
from .plans.planner import Planner, Store, asked_outputs
from .plans.trace import is_recording
from .sharpness import Sharpness, first_call_is_over, is_looking


# Modules whose own forward pass only hands tensors to other modules, or holds none of the operators.
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_ADAPTED = (BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper)
_LEFT_ALONE = (*_LISTS, nn.Sequential, nn.Identity, nn.Embedding, PreTrainedModel, *_ADAPTED)


@dataclass
class _Settings:
    """How one module runs while its activations are quantised."""

    operators: OperatorMode
    sharpness: Sharpness
    planner: Planner | None = None
    is_new: bool = True  # no training call yet

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


_STOCK: dict[type[nn.Module], type[nn.Module]] = {}  # by quantised class


def _stock_class(module: nn.Module) -> type[nn.Module]:
    """The class a module has when its activations are not quantised."""
    return _without_quantized(type(module))


@functools.cache
def _without_quantized(cls: type[nn.Module]) -> type[nn.Module]:
    """``cls``, or if others derived it from a quantised class (as parametrisations and FSDP do), its like without."""
    if cls in _STOCK or not issubclass(cls, _Quantized):
        return _STOCK.get(cls, cls)
    own = {name: thing for name, thing in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(map(_without_quantized, cls.__bases__)), own)


@functools.cache
def _quantized_class(stock: type[nn.Module]) -> type[nn.Module]:
    is_linear = stock is nn.Linear
    product = {8: int8_linear, 4: int4_linear}.get(compat.bits_of_bitsandbytes(stock))
    follow_checkpoints()

    @functools.wraps(stock.forward)
    def forward(self, *args, **kwargs):
        # None: restored, but accelerate's hooks, or transformers in classes derived from this one, hold the forward it had.
        settings = getattr(self, "_activation_settings", None)
        if (
            settings is None
            or not torch.is_grad_enabled()
            or _is_exporting()
            or (is_linear and _is_frozen(self._parameters.get("weight")))
        ):
            return stock.forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return settings.operators.run(stock.forward, self, *args, **kwargs)

        if settings.is_new:
            return first_call(self, settings, args, kwargs)
        return run(self, settings, args, kwargs)

    def first_call(self, settings, args, kwargs):
        with settings.sharpness.looking(settings.operators.module_name):
            result = run(self, settings, args, kwargs)
        if is_looking():  # on behalf of a module around this one
            settings.is_new = False
        else:
            settings.is_new = not first_call_is_over()
            settings.sharpness.say_later(result)
        return result

    def run(self, settings, args, kwargs):
        compute = stock.forward if product is None else functools.partial(product, stock.forward)
        whole = functools.partial(settings.operators.run, compute, self)
        if settings.planner is None or is_recording():
            result = whole(*args, **kwargs)
            if not all(map(_is_harmless, self._forward_hooks.values())):
                notes.forget(result)  # they may keep it, and ask for its gradient later
            return result
        return settings.planner.run(self, functools.partial(notes.apart, whole), args, kwargs)

    names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    quantized = type(stock.__name__, (_Quantized, stock), {"forward": forward, **names})
    _STOCK[quantized] = stock
    return quantized


def _is_exporting() -> bool:
    """Whether the model is being written down for use elsewhere, where it keeps nothing for backward."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _is_frozen(parameter: nn.Parameter | None) -> bool:
    """Whether a product with it keeps nothing in any case."""
    return parameter is not None and not parameter.requires_grad and not compat.is_quantized_weight(parameter)


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

    Raises:
        ValueError: if an argument is none of these, or the model is tensor-parallel. The model is as it was.
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
    refuse_tensor_parallel(model)
    found = set(_blocks(model))
    blocks, store = [module for module in model.modules() if module in found], Store()
    sharpness = Sharpness(config)
    for name, module in model.named_modules():
        if config.skips(name) or not _has_operators(module):
            _restore(module)
            continue
        planner = None
        if module in found:
            later, narrows = _later(module, blocks[blocks.index(module) + 1 :]), _narrows(module, blocks[-1])
            settings = _settings_inside(config, name, module)
            planner = Planner(store, settings, _is_harmless, later, narrows, _tiles(config))
        if not isinstance(module, _Quantized):
            module.__class__ = _quantized_class(type(module))
        module._activation_settings = _Settings(OperatorMode(config, name), sharpness, planner)
        _reach_replaced_forward(module)
    return model


def _reach_replaced_forward(module: nn.Module) -> None:
    """Quantise what a forward method computes that was set on ``module`` itself, which hides its class's."""
    compat.bind_forward_anew(module, _stock_class(module))
    name = compat.hooked_forward(module)
    forward = compat.replaced_forward(module, name)
    if forward is None:
        return
    if not _is_under_mode(forward):
        setattr(module, name, functools.partial(_run_under_mode, module, forward))
    if (planner := module._activation_settings.planner) is not None:
        planner.reason = "its forward method was replaced"


def _run_under_mode(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    settings = getattr(module, "_activation_settings", None)
    if settings is None or not torch.is_grad_enabled() or _is_exporting():
        return forward(*args, **kwargs)
    result = settings.operators.run(forward, *args, **kwargs)
    notes.forget(result)  # as with hooks of others: whoever replaced the forward method may keep it
    return result


def _is_under_mode(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func is _run_under_mode


def _tiles(config: ActivationQuantizationConfig) -> int | None:
    """How many tiles blocks run in; None: as many as their room asks for."""
    if config.backend == "reference":  # bit for bit the stock forward, which matrix products of tiles are not
        return 1
    return None if config.mlp_tiles == "auto" else config.mlp_tiles


def _later(block: nn.Module, others: list[nn.Module]) -> float:
    """How much more than ``block`` itself the blocks after it keep: the wider, the less, since backbones that double their
    width halve both sides of their feature maps."""
    width = _width(block)
    return sum(min(1.0, width / _width(other)) for other in others)


def _narrows(block: nn.Module, last: nn.Module) -> float:
    """By which share less than ``block``'s the feature maps of the last block take, going by widths as `_later` does."""
    return 1 - min(1.0, _width(block) / _width(last))


def _width(block: nn.Module) -> int:
    """Channels that the first layer of a block reads."""
    for layer in _without_adapters(block):
        if isinstance(layer, nn.LayerNorm):
            return layer.normalized_shape[-1]
        if _computes(layer):
            return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    return 1


def _settings_inside(config: ActivationQuantizationConfig, name: str, block: nn.Module) -> Any:
    """Equal for blocks whose operators have equal settings."""
    if isinstance(config.bits, int) and config.levels is None:
        return config
    names = [f"{name}.{inner}".strip(".") for inner, _ in block.named_modules()]
    return [config.quantizer(kind, inner) for inner in names for kind in OPERATOR_KINDS]


def plan_anew(model: nn.Module) -> None:
    """Let blocks be recorded anew, as if a model's activations had just been quantised: what was recorded of other
    tensors stays with the settings that the modules had."""
    stores: dict[int, Store] = {}
    for module in model.modules():
        if isinstance(module, _Quantized):
            settings = module._activation_settings
            planner = copy.copy(settings.planner)
            if planner is not None:
                planner.store = stores.setdefault(id(planner.store), Store())
            module._activation_settings = replace(settings, planner=planner)


def unplanned(model: nn.Module) -> dict[str, str]:
    """{name of a block: why it last ran without a plan, or "in one piece" where tiles were wanted}."""
    found = {}
    for name, module in model.named_modules():
        planner = module._activation_settings.planner if isinstance(module, _Quantized) else None
        if planner is not None and planner.reason is not None:
            found[name] = planner.reason
    return found


def sharp_attention(model: nn.Module) -> dict[str, float]:
    """{name of a module: by how much codes move the logits of the attention in it} where that is too much for precise
    gradients, as each module's first training call showed. See `sharpness`."""
    found = {}
    for module in model.modules():
        if isinstance(module, _Quantized):
            found.update(module._activation_settings.sharpness.sharp())
    return found


def restore_activations(model: nn.Module) -> nn.Module:
    """Undo `quantize_activations`, in place: every module gets its stock class again. Returns ``model``."""
    for module in model.modules():
        _restore(module)
    return model


def _restore(module: nn.Module) -> None:
    if isinstance(module, _Quantized):
        quantized, module.__class__ = type(module), _stock_class(module)
        del module._activation_settings
        compat.bind_forward_anew(module, quantized)
        name = compat.hooked_forward(module)
        forward = compat.replaced_forward(module, name)
        if _is_under_mode(forward):
            setattr(module, name, forward.args[1])


def _has_operators(module: nn.Module) -> bool:
    return not isinstance(module, _LEFT_ALONE) and hasattr(type(module), "forward")


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that take a batch of samples and return one: the blocks of a backbone, and what precedes them.

    The former are the innermost modules that are repeated (members of lists and sequences whose class occurs there more
    than once) and hold two or more linear layers or convolutions. The latter are the outermost modules with children and
    without any of the former inside: patch embeddings, stems.
    """
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    times = Counter(_stock_class(child) for parent in lists for child in parent.children())

    def is_block(parent: nn.Module, child: nn.Module) -> bool:
        repeated = isinstance(parent, (nn.ModuleList, nn.Sequential)) and times[_stock_class(child)] > 1
        return repeated and not isinstance(child, _LEFT_ALONE) and sum(map(_computes, _without_adapters(child))) > 1

    around = {module for module in model.modules() if any(_any_inside(module, is_block))}
    blocks, pending = [], [model]
    while pending:
        module = pending.pop()
        for child in module.children():
            if child in around:
                pending.append(child)
            elif is_block(module, child) or (
                module in around and not isinstance(child, _LEFT_ALONE) and next(child.children(), None) is not None
            ):
                blocks.append(child)
            elif module not in blocks:
                pending.append(child)
    return blocks


def _without_adapters(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` and the modules in it, apart from those that tuners added."""
    yield module
    for name, child in module.named_children():
        if not isinstance(module, BaseTunerLayer) or name == "base_layer":
            yield from _without_adapters(child)


def _any_inside(module: nn.Module, predicate) -> Iterator[bool]:
    return (predicate(parent, child) for parent in module.modules() for child in parent.children())


def _computes(module: nn.Module) -> bool:
    """Whether it is a linear layer or convolution; the layer under an adapter is one, and what holds both is not another."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, layers) and not isinstance(module, BaseTunerLayer)


def _is_harmless(hook: Any) -> bool:
    hook = hook.func if isinstance(hook, functools.partial) else hook
    captured = compat.captured_by(hook)
    if captured is not None:
        return captured not in asked_outputs()
    origin = getattr(hook, "__module__", None) or ""
    crosses_modules = getattr(getattr(hook, "__self__", None), "crosses_modules", False)
    return origin.split(".")[0] == "peft_s2a" and not crosses_modules
