"""Squares: codes of the values."""

import torch
from torch import Tensor

from ..quantizer import Quantizer
from .common import (
    decode_rows,
    encode_rows,
    is_activation,
    memory_order,
    ordered,
    recording,
    refuse_double_backward,
    reordered,
)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, quantizer):
        ctx.order, ctx.quantizer, ctx.dtype = memory_order(x), quantizer, x.dtype
        values = ordered(x, ctx.order)
        ctx.shape = values.shape
        ctx.save_for_backward(*encode_rows(values.flatten(1), quantizer))
        return x**2

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        values = decode_rows(*ctx.saved_tensors, ctx.quantizer, ctx.shape[1:].numel(), ctx.dtype).view(ctx.shape)
        return (2 * grad * reordered(values, ctx.order)).to(ctx.dtype), None


def square(x: Tensor, *, quantizer: Quantizer) -> Tensor:
    """``x ** 2``, as in squared ReLU (So et al. 2021, arXiv:2109.08668, section 3) and StarReLU; keeps b-bit codes of
    ``x``, if it is an activation of two dimensions or more. dX = 2 dY X."""
    if not (recording(x) and is_activation(x)) or x.dim() < 2 or not x.numel():
        return x**2
    return _Square.apply(x, quantizer)
