"""Computing with quantised activations inside any module: a function mode that replaces the operators it calls.

Modules, functions and methods end in the same few operators, so catching those covers stock layers, activation classes
of other libraries and attention written inline alike, without a patch per model.
"""

import functools
import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode

from .. import compat
from . import functional, inline, masks, products, shapes, structures
from .config import WIDE_HEAD, ActivationQuantizationConfig
from .functional import Quantizer
from .plans.planner import as_before


class OperatorMode(TorchFunctionMode):
    """While entered and autograd records, supported operators keep codes instead of full-precision tensors.

    Args:
        config: widths, levels and backend.
        module_name: dotted name of the module whose operators these are, for settings that go by module.
    """

    is_replaced_by_plans = True  # what it does to the modules inside is recorded in their plans

    def __init__(self, config: ActivationQuantizationConfig, module_name: str) -> None:
        super().__init__()
        self.config = config
        self.module_name = module_name
        self._quantizers = config.quantizers(module_name)

    def __reduce__(self):
        return OperatorMode, (self.config, self.module_name)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)`` under this mode in place of the surrounding module's: every mode in force costs time
        at every operator."""
        outer = _get_current_function_mode()
        replaces = isinstance(outer, OperatorMode)
        if replaces:
            _pop_mode()
        notes, result = inline.begin(), None
        _push_mode(self)
        try:
            result = function(*args, **kwargs)
            return result
        finally:
            _pop_mode()
            inline.end(notes, result if replaces else None)
            if replaces:
                _push_mode(outer)

    def quantizer(self, kind: str, channels: int | None = None) -> Quantizer:
        """The settings of operators of ``kind`` in this module; ``channels``: of an attention head, if known."""
        narrow = kind == "attention" and channels is not None and channels <= WIDE_HEAD
        return self._quantizers["narrow_attention" if narrow else kind]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        inline.before_call(func, args, kwargs)
        # torch.compile finds this one in no dict: it is a function that torch has written in Python
        handler = _pow if func is Tensor.__pow__ else _HANDLERS.get(func)
        if handler is not None and torch.is_grad_enabled() and not _left_to_stock(args, kwargs):
            result = handler(self, *args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if torch.compiler.is_compiling():
            if func in _ARRAY_OPERATORS and any(isinstance(arg, np.ndarray) for arg in args):
                return _ARRAY_OPERATORS[func](*args)
            return func(*args, **(kwargs or {}))
        if func in masks.FUNCTIONS and torch.is_grad_enabled():
            return masks.call(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@functools.cache
def follow_checkpoints() -> None:
    """Have what a checkpoint recomputes computed as it was before: under the mode of the module it is in, by plans where
    there were plans."""

    def under_its_mode(function: Callable[..., Any]) -> Callable[..., Any]:
        function = as_before(function)
        mode = _get_current_function_mode()
        if not isinstance(mode, OperatorMode):
            return function
        inline.forget_all()  # the second time none of these will be there
        return functools.partial(mode.run, function)

    compat.replace_recomputed(under_its_mode)


def _left_to_stock(args: tuple, kwargs: dict[str, Any] | None) -> bool:
    """Whether a call is one that no operator here takes: of complex numbers, or with ``out=``."""
    if kwargs:
        if kwargs.get("out") is not None:
            return True
        args = (*args, *kwargs.values())
    return any(isinstance(x, Tensor) and x.is_complex() for x in args)


# Under torch.compile function modes are offered numpy's arithmetic as well, as methods of tensors, which arrays lack.
_ARRAY_OPERATORS = {
    Tensor.neg: operator.neg,
    Tensor.abs: operator.abs,
    Tensor.add: operator.add,
    Tensor.sub: operator.sub,
    Tensor.mul: operator.mul,
    Tensor.div: operator.truediv,
    Tensor.pow: operator.pow,
}
_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {}


def _handles(*stock: Callable[..., Any]):
    """Register a handler for stock functions: it takes the mode and the stock arguments, and returns the result, or
    NotImplemented to leave the call as it is."""

    def register(handler):
        _HANDLERS.update(dict.fromkeys(stock, handler))
        return handler

    return register


def _register_activation(name: str, *stock: Callable[..., Any], inplace: bool = False, parameters: tuple = ()) -> None:
    def handler(mode, input, *args, **kwargs):
        params = {**dict(zip((*parameters, "inplace"), args)), **kwargs}
        over = params.pop("inplace", inplace)
        options = {"quantizer": mode.quantizer("activation"), "inplace": over}
        result = functional.activation(input, name, **options, **params)
        return result if over else inline.activated(input, result, name, params)

    _handles(*stock)(handler)


_register_activation("silu", F.silu)
_register_activation("mish", F.mish)
_register_activation("hardswish", F.hardswish)
_register_activation("hardsigmoid", F.hardsigmoid)
_register_activation("relu6", F.relu6)
_register_activation("relu", F.relu, torch.relu, Tensor.relu)
_register_activation("relu", F.relu_, torch.relu_, Tensor.relu_, inplace=True)
_register_activation("leaky_relu", F.leaky_relu, parameters=("negative_slope",))
_register_activation("hardtanh", F.hardtanh, parameters=("min_val", "max_val"))
_register_activation("elu", F.elu, parameters=("alpha",))
_register_activation("celu", F.celu, parameters=("alpha",))
_register_activation("selu", F.selu)
_register_activation("softplus", F.softplus, parameters=("beta", "threshold"))
_register_activation("logsigmoid", F.logsigmoid)
_register_activation("hardshrink", F.hardshrink, parameters=("lambd",))
_register_activation("softshrink", F.softshrink, parameters=("lambd",))
_register_activation("tanh", torch.tanh, Tensor.tanh)
_register_activation("tanh", torch.tanh_, Tensor.tanh_, inplace=True)
_register_activation("sigmoid", torch.sigmoid, Tensor.sigmoid)
_register_activation("sigmoid", torch.sigmoid_, Tensor.sigmoid_, inplace=True)


@_handles(F.gelu)
def _gelu(mode, input, approximate="none"):
    name = "gelu" if approximate == "none" else "gelu_tanh"
    result = functional.activation(input, name, quantizer=mode.quantizer("activation"))
    return inline.activated(input, result, name, {})


@_handles(F.layer_norm)
def _layer_norm(mode, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return functional.layer_norm(input, normalized_shape, weight, bias, eps, quantizer=mode.quantizer("norm"))


@_handles(torch.layer_norm)
def _torch_layer_norm(mode, input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return _layer_norm(mode, input, normalized_shape, weight, bias, eps)


@_handles(F.rms_norm, torch.rms_norm)
def _rms_norm(mode, input, normalized_shape, weight=None, eps=None):
    return functional.rms_norm(input, normalized_shape, weight, eps, quantizer=mode.quantizer("norm"))


@_handles(F.group_norm)
def _group_norm(mode, input, num_groups, weight=None, bias=None, eps=1e-5):
    return functional.group_norm(input, num_groups, weight, bias, eps, quantizer=mode.quantizer("norm"))


@_handles(F.batch_norm)
def _batch_norm(
    mode, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    return functional.batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, quantizer=mode.quantizer("norm")
    )


@_handles(F.softmax)
def _softmax(mode, input, dim=None, _stacklevel=3, dtype=None):
    return NotImplemented if dim is None else _torch_softmax(mode, input, dim, dtype)


@_handles(torch.softmax, Tensor.softmax)
def _torch_softmax(mode, input, dim, dtype=None):
    input = input if dtype is None else input.to(dtype)
    return functional.softmax(input, dim, quantizer=mode.quantizer("softmax"))


@_handles(F.scaled_dot_product_attention)
def _attention(mode, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(repeats, dim=-3) for t in (key, value))
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        quantizer=mode.quantizer("attention", query.shape[-1]),
    )


@_handles(F.max_pool2d)
def _max_pool2d(mode, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    if return_indices:
        return NotImplemented
    return functional.max_pool2d(
        input, kernel_size, stride, padding, dilation, ceil_mode, quantizer=mode.quantizer("activation")
    )


@_handles(F.dropout)
def _dropout(mode, input, p=0.5, training=True, inplace=False):
    return NotImplemented if inplace or p == 0 or not training else functional.dropout(input, p, training)


@_handles(F.linear)
def _linear(mode, input, weight, bias=None):
    inline.forget(input)
    if not weight.requires_grad:
        return shapes.frozen_linear(input, weight, bias)
    if mode.config.compress_linear_inputs:
        return functional.linear(input, weight, bias, quantizer=mode.quantizer("linear"))
    # a head reads one token: keep that, not all tokens it is a view of, which a compiler does not tell
    if input.dim() == 2 if torch.compiler.is_compiling() else input.untyped_storage().nbytes() > 2 * input.nbytes:
        input = input.clone()
    return F.linear(input, weight, bias)


@_handles(F.conv1d, F.conv2d, F.conv3d)
def _convolution(mode, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    inline.forget(input)
    if input.dim() != weight.dim():
        return NotImplemented
    if isinstance(padding, str):
        padding = _padding(padding, weight.shape[2:], dilation)
        if padding is None:
            return NotImplemented
    if not weight.requires_grad:
        return shapes.frozen_convolution(input, weight, bias, stride, padding, dilation, False, 0, groups)
    if mode.config.compress_linear_inputs and weight.dim() == 4:
        return functional.conv2d(
            input, weight, bias, stride, padding, dilation, groups, quantizer=mode.quantizer("linear")
        )
    return NotImplemented


def _padding(name: str, kernel: torch.Size, dilation: int | tuple[int, ...]) -> list[int] | None:
    """Numbers for "valid" and "same" padding; None where "same" is more on one side than on the other."""
    if name == "valid":
        return [0] * len(kernel)
    dilations = [dilation] * len(kernel) if isinstance(dilation, int) else dilation
    both_sides = [d * (k - 1) for d, k in zip(dilations, kernel)]
    return [total // 2 for total in both_sides] if all(total % 2 == 0 for total in both_sides) else None


@_handles(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _transposed_convolution(
    mode, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    if input.dim() != weight.dim() or weight.requires_grad:
        return NotImplemented
    return shapes.frozen_convolution(input, weight, bias, stride, padding, dilation, True, output_padding, groups)


@_handles(F.avg_pool2d)
def _avg_pool2d(mode, input, *args, **kwargs):
    return shapes.avg_pool2d(input, *args, **kwargs)


@_handles(F.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(mode, input, output_size):
    return shapes.adaptive_avg_pool2d(input, output_size)


@_handles(torch.bmm, Tensor.bmm)
def _bmm(mode, input, mat2, out=None):
    return _matmul(mode, input, mat2)


@_handles(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def _matmul(mode, input, other, out=None):
    if not (products.is_activation(input) and products.is_activation(other)) or min(input.dim(), other.dim()) < 2:
        return NotImplemented
    return products.matmul(input, other, quantizer=mode.quantizer("attention"))


@_handles(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _mul(mode, input, other, out=None):
    if isinstance(other, float):
        return inline.scaled(input, other)
    both = all(isinstance(t, Tensor) and t.requires_grad for t in (input, other))
    if not both or not (products.is_activation(input) or products.is_activation(other)):
        return NotImplemented
    result = inline.product(mode, input, other)
    if result is None:
        result = products.multiply(input, other, quantizer=mode.quantizer("gated_activation"))
    return inline.squared(input, result) if input is other else result


@_handles(torch.pow, Tensor.pow)
def _pow(mode, input, exponent, out=None):
    return inline.squared(input) if isinstance(exponent, (int, float)) and exponent == 2 else NotImplemented


@_handles(torch.square, Tensor.square)
def _square(mode, input):
    return inline.squared(input)


@_handles(torch.mean, Tensor.mean)
def _mean(mode, input, dim=None, keepdim=False, *, dtype=None, out=None):
    dims = [dim] if isinstance(dim, int) else dim
    if not keepdim or dtype is not None or not dims or [d % input.dim() for d in dims] != [input.dim() - 1]:
        return NotImplemented
    return inline.averaged(input)


@_handles(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(mode, input, other, *, alpha=1, out=None):
    return inline.offset(input, other) if isinstance(other, float) and alpha == 1 else NotImplemented


@_handles(torch.rsqrt, Tensor.rsqrt)
def _rsqrt(mode, input):
    return inline.inverted(input)


@_handles(Tensor.to)
def _to(mode, input, *args, **kwargs):
    return inline.cast(input, input.to(*args, **kwargs)) if input.requires_grad else NotImplemented


@_handles(Tensor.float)
def _float(mode, input, **kwargs):
    return inline.cast(input, input.float(**kwargs)) if input.requires_grad else NotImplemented


@_handles(torch.linalg.vector_norm)
def _vector_norm(mode, x, ord=2, dim=None, keepdim=False, *, dtype=None, out=None):
    if ord != 2 or dtype is not None:
        return NotImplemented
    return products.vector_norm(x, [dim] if isinstance(dim, int) else dim, keepdim, quantizer=mode.quantizer("norm"))


@_handles(F.normalize)
def _normalize(mode, input, p=2.0, dim=1, eps=1e-12, out=None):
    if p != 2 or dim not in (-1, input.dim() - 1):
        return NotImplemented
    return products.normalize(input, eps, quantizer=mode.quantizer("norm"))


@_handles(structures.add_prompt_attention)
def _add_prompt_attention(mode, attended, query, key, value, gate, num_heads):
    quantizer = mode.quantizer("attention", query.shape[-1] // num_heads)
    return structures.quantized_add_prompt_attention(attended, query, key, value, gate, num_heads, quantizer=quantizer)


@_handles(structures.add_low_rank)
def _add_low_rank(mode, base, hidden, up, scaling, activation=None):
    return structures.quantized_add_low_rank(base, hidden, up, scaling, activation, quantizer=mode.quantizer("linear"))


def _open(function: FunctionType) -> FunctionType:
    """A copy of a composite function of `torch.nn.functional` that does not offer itself to function modes, so that
    the operators it consists of are."""
    body = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(function.__code__, body, function.__name__, function.__defaults__, function.__closure__)
    return functools.update_wrapper(copy, function)


_multi_head_attention_forward = _open(F.multi_head_attention_forward)


@_handles(F.multi_head_attention_forward)
def _multi_head_attention(mode, *args, **kwargs):
    if torch.compiler.is_compiling():
        return NotImplemented
    with mode:
        return _multi_head_attention_forward(*args, **kwargs)
