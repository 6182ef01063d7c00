"""BatchNorm: codes of the normalised channels, or one number a channel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import masks
from ..codec import math_dtype
from ..quantizer import Quantizer
from .common import not_channels, per_channel, recording, refuse_double_backward
from .registry import handles


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, live, momentum, eps, quantizer):
        # what F.batch_norm calls; it gives the statistics besides
        y, mean, rstd, *_ = torch._batch_norm_impl_index(
            x, weight, bias, running_mean, running_var, live, momentum, eps, torch.backends.cudnn.enabled
        )
        if not live:
            mean, rstd = running_mean, (running_var.to(math_dtype(x.dtype)) + eps).rsqrt()
        codes = (None, None)
        # with frozen statistics dx = dy * weight * rstd needs nothing of x
        if ctx.needs_input_grad[1] or (live and ctx.needs_input_grad[0]):
            codes = quantizer.ops.encode_channels(
                x.flatten(2) if x.dim() > 2 else x.unsqueeze(2), mean, rstd, quantizer.bits, quantizer.group_size,
                quantizer.draw_seed(),
            )  # fmt: skip
        ctx.save_for_backward(*codes, rstd, weight)
        ctx.live, ctx.quantizer, ctx.dtype = live, quantizer, x.dtype
        ctx.parameter_dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        packed, scales, rstd, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if packed is None:
            scale = rstd if weight is None else rstd * weight
            d_x = grad * per_channel(scale, grad) if wanted[0] else None
            d_weight, d_bias = None, grad.sum(not_channels(grad)) if wanted[2] else None
        else:
            rows = grad.flatten(2) if grad.dim() > 2 else grad.unsqueeze(2)
            settings = ctx.live, ctx.quantizer.bits, ctx.quantizer.group_size, list(wanted)
            d_x, d_weight, d_bias = ctx.quantizer.ops.batch_norm_backward(
                rows, packed, scales, rstd, weight, *settings
            )
        d_x = d_x.view(grad.shape).to(ctx.dtype) if wanted[0] else None
        d_parameters = (
            d.to(dtype) if want else None
            for d, dtype, want in zip((d_weight, d_bias), ctx.parameter_dtypes, wanted[1:])
        )
        return d_x, *d_parameters, None, None, None, None, None, None


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    quantizer: Quantizer,
) -> Tensor:
    """`torch.nn.functional.batch_norm`.

    With live statistics (``training``, or no running ones) keeps b-bit normalised values; with frozen statistics one
    number a channel, and the codes only if ``weight`` is trained.
    """
    live = training or running_mean is None
    refused = live and x.numel() == x.shape[1]  # one value a channel
    if not recording(x, weight, bias) or x.numel() == 0 or refused:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return _BatchNorm.apply(x, weight, bias, running_mean, running_var, live, momentum, eps, quantizer)


@handles(F.batch_norm)
def _batch_norm(
    mode, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    if running_mean is running_var is None and not recording(input, weight, bias):
        # of weights, which are standardised so: convolutions keep what they were made of
        if torch.compiler.is_compiling():
            return NotImplemented
        return masks.call(F.batch_norm, (input, None, None, weight, bias, training, momentum, eps), {})
    return batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, quantizer=mode.quantizer("norm")
    )
