"""Division of rows by their L2 norm: codes of the directions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codec import math_dtype
from ..quantizer import Quantizer
from .common import recording, refuse_double_backward
from .registry import handles


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps, quantizer):
        norm = x.norm(2, -1, keepdim=True)
        clamped = norm.clamp_min(eps)
        y = x / clamped  # as the stock function does it
        # A direction is a row over its root mean square, times count ** -0.5. Rows shorter than eps are divided by a
        # constant: without a direction the backward pass of a norm is that of this.
        count = x.shape[-1]
        directions = (y * (norm >= eps)).reshape(-1, count) * count**0.5
        codes = quantizer.ops.encode_groups(directions, quantizer.bits, quantizer.group_size, quantizer.draw_seed())
        scale = clamped.reshape(-1).to(math_dtype(x.dtype)).reciprocal()
        ctx.save_for_backward(*codes, scale, x.new_empty(0, dtype=torch.bfloat16))
        ctx.quantizer = quantizer
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        count = grad.shape[-1]
        bits, group_size = ctx.quantizer.bits, ctx.quantizer.group_size
        d_x, _, _ = ctx.quantizer.ops.norm_backward(
            grad.reshape(-1, count), *ctx.saved_tensors, None, False, bits, group_size, [True, False, False]
        )
        return d_x.view(grad.shape), None, None


def normalize(x: Tensor, eps: float = 1e-12, *, quantizer: Quantizer) -> Tensor:
    """`torch.nn.functional.normalize` over the last dimension; keeps b-bit directions and a reciprocal norm a row."""
    if not recording(x) or not x.numel():
        return F.normalize(x, dim=-1, eps=eps)
    return _Normalize.apply(x, eps, quantizer)


@handles(F.normalize)
def _normalize(mode, input, p=2.0, dim=1, eps=1e-12, out=None):
    if p != 2 or dim not in (-1, input.dim() - 1):
        return NotImplemented
    return normalize(input, eps, quantizer=mode.quantizer("norm"))
