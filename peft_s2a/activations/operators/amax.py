"""Maxima over dimensions, as windows of queries are pooled with: one bit a value."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import op_set
from .common import memory_order, not_a_view, ordered, recording, refuse_double_backward, reordered
from .registry import handles


class _Amax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, keepdim):
        y = torch.amax(x, dim, keepdim=True)
        ctx.dim, ctx.keepdim, ctx.order = dim, keepdim, memory_order(x)
        is_largest = ordered((x == y).to(x.dtype), ctx.order)
        ctx.shape = is_largest.shape
        ctx.save_for_backward(op_set("auto").encode_steps(is_largest, (0.5,), (0, 1), 1))
        return y if keepdim else not_a_view(y.view([size for d, size in enumerate(y.shape) if d not in dim]))

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        (packed,) = ctx.saved_tensors
        if not ctx.keepdim:
            for d in sorted(ctx.dim):
                grad = grad.unsqueeze(d)
        is_largest = op_set("auto").scale_by_levels(grad.new_ones(ctx.shape), packed, (0.0, 1.0), 1)
        is_largest = reordered(is_largest, ctx.order)
        return is_largest.mul_(grad / (is_largest != 0).sum(ctx.dim, keepdim=True)), None, None


def amax(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Tensor:
    """`torch.amax`, exactly; keeps one bit a value. dX = dY at the maximum, shared by all values that are equal to it."""
    if not recording(x) or x.dim() == 0 or not x.numel():
        return torch.amax(x, dim, keepdim)
    return _Amax.apply(x, tuple(d % x.dim() for d in dim or range(x.dim())), keepdim)


@handles(torch.amax, Tensor.amax)
def _amax(mode, input, dim=(), keepdim=False, *, out=None):
    return amax(input, (dim,) if isinstance(dim, int) else dim, keepdim)
