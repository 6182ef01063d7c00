"""Dropout and stochastic depth: one bit a value, or a sample."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codec import pack, unpack
from ..ops import op_set
from .common import memory_order, ordered, recording, refuse_double_backward, reordered
from .registry import handles


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        # the stock operator on ones draws the very mask it would draw for x
        noise = F.dropout(torch.ones_like(x), p)
        ctx.order, ctx.p = memory_order(x), p
        ctx.save_for_backward(op_set("auto").encode_steps(ordered(noise, ctx.order), (0.0,), (0, 1), 1))
        return noise * x  # selective checkpoints may keep the noise

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        (packed,) = ctx.saved_tensors
        d_x = op_set("auto").scale_by_levels(ordered(grad, ctx.order), packed, (0.0, 1 / (1 - ctx.p)), 1)
        return reordered(d_x, ctx.order), None


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """`torch.nn.functional.dropout` with the same random numbers; keeps one bit a value."""
    if not recording(x) or not training or not 0 < p < 1:
        return F.dropout(x, p, training)
    return _Dropout.apply(x, p)


class _DropPath(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        keep = 1 - p
        kept = torch.rand(x.shape[0], dtype=x.dtype, device=x.device).add_(keep).floor_()
        ctx.keep, ctx.samples = keep, x.shape[0]
        ctx.save_for_backward(pack(kept.to(torch.uint8).view(1, -1), 1))
        return x.div(keep).mul_(kept.view(-1, *[1] * (x.dim() - 1)))

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        (packed,) = ctx.saved_tensors
        kept = unpack(packed, 1, ctx.samples).view(-1, *[1] * (grad.dim() - 1))
        return grad.div(ctx.keep).mul_(kept), None


def drop_path(x: Tensor, p: float = 0.0, training: bool = True) -> Tensor:
    """Stochastic depth (Huang et al. 2016): drops whole samples (first dimension), as the DropPath modules of
    `transformers` do, with the same random numbers; keeps one bit a sample."""
    if not training or p == 0:
        return x
    return _DropPath.apply(x, p)


@handles(F.dropout)
def _dropout(mode, input, p=0.5, training=True, inplace=False):
    return NotImplemented if inplace or p == 0 or not training else dropout(input, p, training)
