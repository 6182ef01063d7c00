"""Bias: trained offsets of linear, convolution and normalisation layers, and scales of normalisations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from peft_s2a.anatomy import BATCH_NORMS, CONVOLUTIONS, NORMALISATIONS, is_normalisation, output_width
from peft_s2a.compat import (
    bits_of_bitsandbytes,
    has_global_module_hooks,
    placing_hook,
    replaced_forward,
    resident,
)
from peft_s2a.tuners.layer import S2ALayer


def can_serve(module: nn.Module) -> bool:
    """Whether a `BiasLayer` can sit on `module`."""
    return isinstance(module, (nn.Linear, *CONVOLUTIONS)) or is_normalisation(module)


class BiasLayer(S2ALayer):
    """Wraps a leaf module: `y = base(x)` with bias `b + delta_b` and, for normalisations, scale `gamma + delta_gamma`.

    Both offsets start at zero (BitFit, Zaken et al. 2022, section 3; TinyTL, Cai et al. 2020, section 3.2). The
    gradient of a bias is the sum of the output's gradient: nothing has to be kept for backward (though torch's own
    convolutions and batch normalisations keep their input all the same, unless activations are quantised). That of a
    scale needs the normalised input, which a normalisation keeps anyway. Offsets go *into* the base module's own
    computation, so they cost neither a pass over the output nor a copy of it. A base module without a bias gets its
    offset added to the output.

    The layer is also what a side branch beside a single leaf is attached to; it may then hold no offsets of its own.

    Args:
        base_layer: a module for which `can_serve` holds.
    """

    adapter_layer_names = ("s2a_bias", "s2a_scale")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._reads_its_bias = bits_of_bitsandbytes(type(base_layer)) is not None
        """As torch's own layers do, though it is of another class."""
        self.s2a_bias = nn.ParameterDict({})
        self.s2a_scale = nn.ParameterDict({})

    def __getattr__(self, name: str) -> Any:
        """Looks up on the base module what the wrapper lacks: models read `eps`, `stride`, ... off their layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @property
    def in_features(self) -> int:
        """Width of the input, of convolutions too, as PEFT's layers have it. Normalisations have none."""
        base_layer = self.get_base_layer()
        return base_layer.in_channels if isinstance(base_layer, CONVOLUTIONS) else base_layer.in_features

    @property
    def out_features(self) -> int:
        """Width of the output, of convolutions too, as PEFT's layers have it. Normalisations have none."""
        base_layer = self.get_base_layer()
        return base_layer.out_channels if isinstance(base_layer, CONVOLUTIONS) else base_layer.out_features

    def update_layer(self, adapter_name: str, *, train_scale: bool, init_weights: bool) -> None:
        """Adds an adapter.

        Args:
            adapter_name: its name.
            train_scale: also train the scale, if the base module is a normalisation that has one.
            init_weights: start at zero; otherwise at random.
        """
        like = self.reference_tensor()
        self.s2a_bias[adapter_name] = nn.Parameter(
            torch.zeros(self._bias_shape(), device=like.device, dtype=like.dtype)
        )
        base_layer = self.get_base_layer()
        if train_scale and is_normalisation(base_layer) and getattr(base_layer, "weight", None) is not None:
            self.s2a_scale[adapter_name] = nn.Parameter(torch.zeros_like(base_layer.weight.data))
        if not init_weights:
            for parameters in (self.s2a_bias, self.s2a_scale):
                if adapter_name in parameters:
                    nn.init.normal_(parameters[adapter_name], std=0.02)

    def _bias_shape(self) -> torch.Size:
        base_layer = self.get_base_layer()
        if getattr(base_layer, "bias", None) is not None:
            return base_layer.bias.shape
        if isinstance(base_layer, (nn.Linear, *CONVOLUTIONS)):
            return torch.Size([output_width(base_layer)])  # a weight may be packed
        if getattr(base_layer, "weight", None) is not None:
            return base_layer.weight.shape
        if isinstance(base_layer, (nn.LayerNorm, nn.RMSNorm)):
            return torch.Size(base_layer.normalized_shape)
        return torch.Size(
            [base_layer.num_channels if isinstance(base_layer, nn.GroupNorm) else base_layer.num_features]
        )

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        base_layer = self._modules["base_layer"]
        adapters = self.adapters_in_use()
        if not adapters:
            return base_layer(*args, **kwargs)
        watched = _is_watched(base_layer)
        parameters, offset = self._adapted_tensors(
            adapters, bias_inside=_takes_bias_inside(base_layer, watched, self._reads_its_bias)
        )
        if not parameters:
            output = base_layer(*args, **kwargs)
        elif torch.compiler.is_compiling() and not _hides_a_parameter(base_layer, parameters):
            output = _call_compiled(base_layer, parameters, args, kwargs)
        elif watched:
            output = _call_watched(base_layer, parameters, args, kwargs)
        else:
            output = _call_with(base_layer, parameters, args, kwargs, hooks=_has_hooks(base_layer))
        if offset is not None:
            output = output + self._broadcast(offset, output).to(output)
        return output

    def _adapted_tensors(
        self, adapters: list[str], *, bias_inside: bool
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """(the base module's tensors with their offsets, offset for its output: of a bias that does not go inside)."""
        base_layer = self._modules["base_layer"]
        tensors: dict[str, torch.Tensor] = {}
        offset = _total(self.s2a_bias, adapters)
        if offset is not None and bias_inside:
            tensors["bias"] = _moved(resident(base_layer, "bias"), offset)
            offset = None
        scale = _total(self.s2a_scale, adapters)
        if scale is not None:
            tensors["weight"] = _moved(resident(base_layer, "weight"), scale)
        return tensors, offset

    def _broadcast(self, offset: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """`offset` shaped to be added to `output`: convolutions, batch and group norms have spatial axes last."""
        base_layer = self.get_base_layer()
        if isinstance(base_layer, CONVOLUTIONS):
            spatial_axes = len(base_layer.kernel_size)
        elif isinstance(base_layer, (nn.GroupNorm, *BATCH_NORMS)) or _normalises_images(base_layer):
            spatial_axes = output.dim() - 2
        else:
            spatial_axes = 0
        return offset.reshape(*offset.shape, *[1] * spatial_axes)

    def not_mergeable(self, adapter_name: str) -> str | None:
        if adapter_name in self.s2a_bias and getattr(self.get_base_layer(), "bias", None) is None:
            return (
                f"Adapter {adapter_name!r} trains a bias on a {type(self.get_base_layer()).__name__} that has none, "
                "so it cannot be merged. Keep the adapter separate, or leave such modules out with `exclude_modules`."
            )
        return None

    def merged_into(self, adapter_name: str) -> list[nn.Parameter]:
        base_layer = self.get_base_layer()
        bias = [base_layer.bias] if adapter_name in self.s2a_bias else []
        return [*bias, base_layer.weight] if adapter_name in self.s2a_scale else bias

    def _merge_adapter(self, adapter_name: str, sign: int) -> dict[nn.Parameter, torch.Tensor]:
        base_layer = self.get_base_layer()
        new_values = {}
        if adapter_name in self.s2a_bias:
            new_values[base_layer.bias] = base_layer.bias.data + sign * self.s2a_bias[adapter_name].data
        if adapter_name in self.s2a_scale:
            new_values[base_layer.weight] = base_layer.weight.data + sign * self.s2a_scale[adapter_name].data
        return new_values

    def extra_repr(self) -> str:
        return f"adapters={self._all_available_adapter_names()}"


def _is_watched(layer: nn.Module) -> bool:
    """Whether others look at the calls of `layer`, or run it in their own way."""
    is_replaced = replaced_forward(layer) is not None and placing_hook(layer) is None
    if is_replaced or has_global_module_hooks():
        return True
    if not _has_hooks(layer):
        return False
    return any(not _is_own(hook) for hooks in _hooks(layer) for hook in hooks.values())


def _hooks(layer: nn.Module) -> tuple[dict, ...]:
    return layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks


def _has_hooks(layer: nn.Module) -> bool:
    return any(_hooks(layer))


def _is_own(hook: Any) -> bool:
    """Whether a hook is this package's, such as a prompt's on the query projection: those see the adapted output."""
    return (getattr(hook, "__module__", None) or "").partition(".")[0] == "peft_s2a"


STOCK_FORWARDS = {kind.forward for kind in (nn.Linear, *CONVOLUTIONS, *NORMALISATIONS)}


def _is_stock(layer: nn.Module) -> bool:
    """Whether `layer` computes what torch's own layers do. Quantised subclasses wrap the forward of theirs."""
    forward = type(layer).forward
    return getattr(forward, "__wrapped__", forward) in STOCK_FORWARDS


def _takes_bias_inside(layer: nn.Module, watched: bool, reads_its_bias: bool) -> bool:
    """Whether the offset of the bias goes into the computation of `layer`; it is added to the output otherwise.

    A linear layer or convolution of another class may hold its weights in any form and has to be called as it is;
    bitsandbytes' read their bias as torch's do.
    A norm of another class has its channels on an axis that only itself knows.
    """
    if not isinstance(getattr(layer, "bias", None), torch.Tensor):
        return False
    if _is_stock(layer) or reads_its_bias:
        return not watched
    return is_normalisation(layer)


def _normalises_images(module: nn.Module) -> bool:
    """Layer and RMS norms over the channels of [batch, channels, height, width], as timm calls them."""
    return any("2d" in kind.__name__.lower() for kind in type(module).__mro__)


def _hides_a_parameter(layer: nn.Module, names: Iterable[str]) -> bool:
    """Whether an attribute of the name of a weight or bias lies before it, as under FullyShardedDataParallel."""
    return any(name in ("weight", "bias") and not isinstance(getattr(layer, name), nn.Parameter) for name in names)


def _call_with(
    layer: nn.Module, tensors: dict[str, torch.Tensor], args: tuple, kwargs: dict[str, Any], hooks: bool = False
) -> torch.Tensor:
    """`layer(*args, **kwargs)` with other parameters and buffers; by default without its hooks.

    It runs on a shallow copy: to put them into the layer itself, as `torch.func.functional_call` does, would show them
    to whatever else uses the layer meanwhile, such as other threads. Under FullyShardedDataParallel an attribute of the
    same name hides the parameter, and has to be replaced too.
    """
    copy = object.__new__(type(layer))
    state = copy.__dict__
    state.update(layer.__dict__)
    state.pop("forward", None)
    state["_parameters"], state["_buffers"] = dict(layer._parameters), dict(layer._buffers)
    for name, tensor in tensors.items():
        holders = [holder for holder in (state["_parameters"], state["_buffers"], state) if name in holder]
        if not holders:
            raise RuntimeError(
                f"S2A trains an offset of {name!r} of a {type(layer).__name__}, which computes it anew at every call, as "
                "parametrisations do: its offset would be lost. Leave the module out with `exclude_modules`."
            )
        for holder in holders:
            holder[name] = tensor
    placing = placing_hook(layer)
    if placing is not None:
        args, kwargs = placing.pre_forward(layer, *args, **kwargs)
    output = copy(*args, **kwargs) if hooks else copy.forward(*args, **kwargs)
    if placing is not None:
        output = placing.post_forward(layer, output)
    if not _is_stock(layer):  # what it notes down is its own
        own = layer.__dict__
        kept = ("_parameters", "_buffers", "forward", *tensors)
        own.update({name: value for name, value in state.items() if name not in kept and own.get(name) is not value})
    return output


def _call_compiled(
    layer: nn.Module, tensors: dict[str, torch.Tensor], args: tuple, kwargs: dict[str, Any]
) -> torch.Tensor:
    """What `_call_with` computes, for torch.compile, which cannot copy modules: what is put into the layer is seen by the
    graph alone. `torch.func.functional_call` does the same in several times as many steps to be traced."""
    held = layer._parameters
    own = {name: held[name] for name in tensors}
    held.update(tensors)
    try:
        return layer(*args, **kwargs)
    finally:
        held.update(own)


def _call_watched(
    layer: nn.Module, tensors: dict[str, torch.Tensor], args: tuple, kwargs: dict[str, Any]
) -> torch.Tensor:
    """What `_call_with` computes, for a layer with hooks or a forward of its own: they see it run with its own
    parameters, as they would under any tuner, and what the others change is added to its output."""
    if not tensors.keys().isdisjoint(layer._buffers):  # statistics, which no second run may follow
        return _call_with(layer, tensors, args, kwargs, hooks=True)
    own = {name: resident(layer, name).clone() for name, buffer in layer._buffers.items() if buffer is not None}
    for name, parameter in layer._parameters.items():
        if parameter is not None and parameter.is_meta:
            own[name] = resident(layer, name)
    change = _call_with(layer, {**own, **tensors}, args, kwargs) - _call_with(layer, dict(own), args, kwargs)
    return layer(*args, **kwargs) + change


def _total(offsets: nn.ParameterDict, adapters: list[str]) -> torch.Tensor | None:
    """The sum of the adapters' offsets; None if none of them has any."""
    total = None
    for name in adapters:
        if name in offsets:
            offset = resident(offsets, name)
            total = offset if total is None else total + offset
    return total


def _moved(tensor: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    moved = tensor + offset
    return moved if moved.dtype == tensor.dtype else moved.to(tensor.dtype)
