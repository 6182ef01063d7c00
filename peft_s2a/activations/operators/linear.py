"""Linear layers: codes of their input where the weight is trained, nothing where it is frozen."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import compat
from .. import notes
from ..quantizer import Quantizer
from .common import autocast_dtype, cast, decode_rows, encode_rows, not_a_view, recording, refuse_double_backward
from .quantized_weight import weight_only_linear
from .registry import handles


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, quantizer):
        y = not_a_view(F.linear(x, weight, bias))
        codes = (None, None)
        if ctx.needs_input_grad[1]:
            codes = encode_rows(x.reshape(-1, x.shape[-1]), quantizer)
        ctx.save_for_backward(*codes, weight if ctx.needs_input_grad[0] else None)
        ctx.quantizer, ctx.count = quantizer, x.shape[-1]
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        packed, scales, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = (grad @ weight.to(grad.dtype)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            x = decode_rows(packed, scales, ctx.quantizer, ctx.count, grad.dtype)
            d_weight = (rows.T @ x).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            d_bias = rows.sum(0).to(ctx.dtypes[2])
        return d_x, d_weight, d_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, quantizer: Quantizer) -> Tensor:
    """`torch.nn.functional.linear` whose trained weight (``[out, in]``) keeps b-bit inputs: dW = dy^T x with the
    decoded x."""
    if not recording(x, weight, bias) or x.numel() == 0 or weight.dim() != 2:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, quantizer)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, dtype):
        ctx.save_for_backward(weight)
        ctx.dtype = dtype
        return not_a_view(F.linear(input, *cast(dtype, weight), bias))

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        (weight,) = ctx.saved_tensors
        d_input = grad @ weight.to(ctx.dtype) if ctx.needs_input_grad[0] else None
        d_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return d_input, None, d_bias, None


def frozen_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with a weight that needs no gradient; keeps nothing but a reference to the weight.

    dX is dY W, db the sum of dY. Stock autograd does the same without autocast, and under it keeps a copy of the weight.
    """
    dtype = autocast_dtype(input)
    if dtype is None or weight.dtype == dtype or weight.dim() != 2 or not recording(input, bias):
        return F.linear(input, weight, bias)
    input, bias = cast(dtype, input, bias)
    return _FrozenLinear.apply(input, weight, bias, dtype)


@handles(F.linear)
def _linear(mode, input, weight, bias=None):
    notes.forget(input)
    if not weight.requires_grad:
        if not torch.compiler.is_compiling() and compat.is_weight_only(weight):
            return weight_only_linear(input, weight, bias)
        return frozen_linear(input, weight, bias)
    if mode.config.compress_linear_inputs:
        return linear(input, weight, bias, quantizer=mode.quantizer("linear"))
    # a head reads one token: keep that, not all tokens it is a view of, which a compiler does not tell
    if input.dim() == 2 if torch.compiler.is_compiling() else input.untyped_storage().nbytes() > 2 * input.nbytes:
        input = input.clone()
    return F.linear(input, weight, bias)
