"""GroupNorm: codes of the normalised groups."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantizer import Quantizer
from .common import decode_rows, not_channels, per_channel, recording, refuse_double_backward
from .registry import handles


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps, quantizer):
        y = F.group_norm(x, num_groups, weight, bias, eps)
        kept = (None, None, None, None)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            rows = x.reshape(x.shape[0] * num_groups, -1)
            kept = quantizer.ops.encode_norm(
                rows, eps, True, False, quantizer.bits, quantizer.group_size, quantizer.draw_seed()
            )
        ctx.save_for_backward(*kept, weight)
        ctx.num_groups, ctx.quantizer, ctx.dtype = num_groups, quantizer, x.dtype
        ctx.parameter_dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        packed, scales, rstd, columns, weight = ctx.saved_tensors
        quantizer, others = ctx.quantizer, not_channels(grad)
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            g = grad if weight is None else grad * per_channel(weight, grad).to(grad.dtype)
            d_x, _, _ = quantizer.ops.norm_backward(
                g.reshape(rstd.shape[0], -1), packed, scales, rstd, columns, None, True, quantizer.bits, quantizer.group_size,
                [True, False, False],
            )  # fmt: skip
            d_x = d_x.view(grad.shape).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            count = grad.numel() // max(rstd.shape[0], 1)
            x_hat = decode_rows(packed, scales, quantizer, count, grad.dtype).view(grad.shape)
            d_weight = x_hat.mul_(grad).sum(others).to(ctx.parameter_dtypes[0])
        if ctx.needs_input_grad[2]:
            d_bias = grad.sum(others).to(ctx.parameter_dtypes[1])
        return d_x, d_weight, d_bias, None, None, None


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    quantizer: Quantizer,
) -> Tensor:
    """`torch.nn.functional.group_norm`; keeps b-bit normalised values and one reciprocal deviation a group."""
    if not recording(x, weight, bias) or x.numel() == 0:
        return F.group_norm(x, num_groups, weight, bias, eps)
    return _GroupNorm.apply(x, weight, bias, num_groups, eps, quantizer)


@handles(F.group_norm)
def _group_norm(mode, input, num_groups, weight=None, bias=None, eps=1e-5):
    return group_norm(input, num_groups, weight, bias, eps, quantizer=mode.quantizer("norm"))
