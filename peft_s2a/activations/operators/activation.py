"""Activation functions: codes of the derivative at every value."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import notes
from ..activation_functions import activation_function
from ..levels import CodeTable, code_table
from ..quantizer import Quantizer
from .common import memory_order, ordered, recording, refuse_double_backward, reordered
from .registry import handles


def _encode_derivative(x: Tensor, name: str, params: dict, table: CodeTable, quantizer: Quantizer) -> Tensor:
    """Codes of the derivative of activation function ``name`` at every value of ``x``."""
    function = activation_function(name)
    if quantizer.rounding == "stochastic" and function.derivative is not None:
        derivative = function.derivative_torch(x if x.dtype == torch.float64 else x.float(), **params)
        return quantizer.ops.encode_levels(derivative, table.levels, table.bits, quantizer.draw_seed())
    return quantizer.ops.encode_steps(x, table.thresholds, table.codes, table.bits)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, name, params, table, quantizer, inplace, gate=None):
        function = activation_function(name)
        ctx.order = memory_order(x)
        ctx.table, ctx.quantizer = table, quantizer
        ctx.save_for_backward(_encode_derivative(ordered(x, ctx.order), name, params, table, quantizer))
        if gate is not None:
            return x * gate
        if inplace:
            ctx.mark_dirty(x)
            return function.forward_(x, **params)
        return function.forward(x, **params)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        (packed,) = ctx.saved_tensors
        grad, table, ops = ordered(grad, ctx.order), ctx.table, ctx.quantizer.ops
        if torch.compiler.is_compiling():  # which drops the copy where nobody else reads the gradient
            d_x = grad.clone(memory_format=torch.contiguous_format)
            ops.scale_by_levels_(d_x, packed, table.levels, table.bits)
        else:
            d_x = ops.scale_by_levels(grad, packed, table.levels, table.bits)
        return reordered(d_x, ctx.order), None, None, None, None, None, None


def activation(x: Tensor, name: str, *, quantizer: Quantizer, inplace: bool = False, **params: float) -> Tensor:
    """Activation function ``name`` of ``x``; keeps ``quantizer.bits`` bits a value (1 bit, exact, if piecewise
    linear).

    Args:
        x: any shape, floating.
        name: a key of `activation_functions.ACTIVATION_FUNCTIONS`.
        inplace: write the result over ``x``. Only where nothing else reads ``x``; autograd raises if its old value was
            kept. Functions without an in-place form ignore it.
        params: the function's own parameters (``negative_slope``, ``alpha``, ...).

    Source: derivative codes as in S2A (arXiv:2503.08154) and fewbit (Novikov et al. 2022); see `levels` for the
    tables.
    """
    function = activation_function(name)
    inplace = inplace and function.forward_ is not None
    if not recording(x):
        return (function.forward_ if inplace else function.forward)(x, **params)
    table = _code_table(x, name, params, quantizer)
    if inplace and torch.compiler.is_compiling():  # whose autograd functions cannot change their input
        return x.copy_(_Activation.apply(x, name, params, table, quantizer, False))
    return _Activation.apply(x, name, params, table, quantizer, inplace)


def _code_table(x: Tensor, name: str, params: dict[str, float], quantizer: Quantizer) -> CodeTable:
    items = tuple(sorted(params.items()))
    stochastic = quantizer.rounding == "stochastic"
    return code_table(name, items, quantizer.bits, quantizer.levels, x.dtype == torch.float64, stochastic)


def self_gated(x: Tensor, gate: Tensor, name: str, *, quantizer: Quantizer) -> Tensor:
    """``x * gate`` as a model writes activation function ``name``, SiLU or CLIP's QuickGELU, with ``gate = sigmoid(c * x)``
    without a gradient of its own. Keeps what `activation` does."""
    return _Activation.apply(x, name, {}, _code_table(x, name, {}, quantizer), quantizer, False, gate)


def activated(x: Tensor, result: Tensor, name: str, params: dict[str, float]) -> Tensor:
    """Note, and return, ``result`` of activation function ``name``. Those of piecewise-linear functions are not noted:
    their derivative is known exactly from one bit."""
    return (
        result if activation_function(name).derivative is None else notes.note("activation", result, x, (name, params))
    )


def _register_activation(name: str, *stock: Callable[..., Any], inplace: bool = False, parameters: tuple = ()) -> None:
    def handler(mode, input, *args, **kwargs):
        params = {**dict(zip((*parameters, "inplace"), args)), **kwargs}
        over = params.pop("inplace", inplace)
        options = {"quantizer": mode.quantizer("activation"), "inplace": over}
        result = activation(input, name, **options, **params)
        return result if over else activated(input, result, name, params)

    handles(*stock)(handler)


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


@handles(F.gelu)
def _gelu(mode, input, approximate="none"):
    name = "gelu" if approximate == "none" else "gelu_tanh"
    result = activation(input, name, quantizer=mode.quantizer("activation"))
    return activated(input, result, name, {})
