"""Linear layers whose frozen weight torchao or bitsandbytes hold in few bits: it is dequantised again in backward.

Forward is the library's own product, whatever it makes of the weight. Its derivative is that of a product with the
dequantised weight, dX = dY W, which both libraries compute as well, but from what they keep for it: torchao's products
the dequantised weight, bitsandbytes' 8-bit ones the input, which nobody reads where the weight is frozen.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...compat import undo_packing
from .common import autocast_dtype, not_a_view, recording, refuse_double_backward


class _DequantizedAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, dtype):
        names, attributes = weight.__tensor_flatten__()
        ctx.save_for_backward(*(getattr(weight, name) for name in names))
        ctx.weight = type(weight), names, attributes, weight.shape, weight.stride()
        ctx.dtype, ctx.dtypes = dtype, (input.dtype, None if bias is None else bias.dtype)
        return not_a_view(F.linear(input, weight, bias))

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        kind, names, attributes, shape, strides = ctx.weight
        weight = kind.__tensor_unflatten__(dict(zip(names, ctx.saved_tensors)), attributes, shape, strides)
        d_input = d_bias = None
        if ctx.needs_input_grad[0]:
            d_input = (grad.to(ctx.dtype) @ weight.dequantize().to(ctx.dtype)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            d_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.dtypes[1])
        return d_input, None, d_bias, None


def weight_only_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with a frozen weight (``[out, in]``) of torchao's that is quantised alone
    (`compat.is_weight_only`); keeps references to what the weight holds."""
    if not recording(input, bias) or input.numel() == 0 or weight.dim() != 2:
        return F.linear(input, weight, bias)
    return _DequantizedAgain.apply(input, weight, bias, autocast_dtype(input) or input.dtype)


class _WithoutInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, bias, forward, layer):
        output = not_a_view(forward(layer, input))
        # of these two bitsandbytes itself dequantises the weight in backward
        ctx.save_for_backward(layer.state.CB, layer.state.SCB)
        ctx.dtypes = input.dtype, None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        codes, scales = ctx.saved_tensors
        d_input = d_bias = None
        if ctx.needs_input_grad[0]:
            weight = codes.to(ctx.dtypes[0], copy=True).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
            d_input = grad.to(ctx.dtypes[0]) @ weight
        if ctx.needs_input_grad[1]:
            d_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.dtypes[1])
        return d_input, d_bias, None, None


Forward = Callable[[nn.Module, Tensor], Tensor]


def int8_linear(forward: Forward, layer: nn.Module, input: Tensor) -> Tensor:
    """``forward(layer, input)`` of bitsandbytes' `Linear8bitLt`; of a weight in 8 bits (``[out, in]``) it keeps references
    to the codes and scales. dX is dY W, db the sum of dY."""
    if (
        not recording(input, layer.bias)
        or layer.state.has_fp16_weights
        or input.numel() == 0
        or torch.compiler.is_compiling()
    ):
        return forward(layer, input)
    return _WithoutInput.apply(input, layer.bias, forward, layer)


def int4_linear(forward: Forward, layer: nn.Module, input: Tensor) -> Tensor:
    """``forward(layer, input)`` of bitsandbytes' `Linear4bit`, which keeps nothing but its codes, once these are laid out
    as it can differentiate them."""
    if recording(input, layer.bias) and not torch.compiler.is_compiling():
        undo_packing(layer)
    return forward(layer, input)
