"""Softmax: codes of the square roots of its results."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantizer import Quantizer
from .common import recording, refuse_double_backward
from .registry import handles


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, quantizer):
        p = F.softmax(x, dim)
        rows = p.movedim(dim, -1)
        ctx.dim, ctx.dtype, ctx.quantizer = dim, x.dtype, quantizer
        # square roots: most probabilities are small, and an even grid would code them all as zero
        rows = rows.reshape(-1, rows.shape[-1])
        seed = quantizer.draw_seed()
        ctx.save_for_backward(*quantizer.ops.encode_roots(rows, quantizer.bits, quantizer.group_size, seed))
        return p

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        rows = grad.movedim(ctx.dim, -1)
        settings = ctx.quantizer.bits, ctx.quantizer.group_size
        d_x = ctx.quantizer.ops.softmax_backward(rows.reshape(-1, rows.shape[-1]), *ctx.saved_tensors, *settings)
        return d_x.view(rows.shape).movedim(-1, ctx.dim).to(ctx.dtype), None, None


def softmax(x: Tensor, dim: int, *, quantizer: Quantizer) -> Tensor:
    """`torch.nn.functional.softmax`; keeps b-bit square roots of the probabilities, in groups along ``dim``.

    dx = p (dy - sum(dy p)), with the decoded p scaled to sum to one. Coding the square root is our choice.
    """
    if not recording(x) or x.dim() == 0:
        return F.softmax(x, dim)
    return _Softmax.apply(x, dim, quantizer)


@handles(F.softmax)
def _softmax(mode, input, dim=None, _stacklevel=3, dtype=None):
    return NotImplemented if dim is None else _torch_softmax(mode, input, dim, dtype)


@handles(torch.softmax, Tensor.softmax)
def _torch_softmax(mode, input, dim, dtype=None):
    input = input if dtype is None else input.to(dtype)
    return softmax(input, dim, quantizer=mode.quantizer("softmax"))
