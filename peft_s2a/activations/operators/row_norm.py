"""LayerNorm and RMSNorm: codes of the normalised rows."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantizer import Quantizer
from .common import recording, refuse_double_backward
from .registry import handles


# rows from which on a norm's columns are standardised (bfloat16 mean and deviation each): there they weigh little
_ROWS_FOR_STATISTICS = 64


def _rows(x: Tensor, normalized_shape: Sequence[int]) -> Tensor:
    """``x`` with the trailing dimensions that are normalised as one."""
    return x if len(normalized_shape) == 1 else x.reshape(-1, math.prod(normalized_shape))


class _RowNorm(torch.autograd.Function):
    """LayerNorm and RMSNorm: the trailing dimensions are one row of ``count`` values."""

    @staticmethod
    def forward(ctx, x, weight, bias, normalized_shape, eps, center, quantizer, factor=None):
        if factor is not None:
            y = (x if weight is None else weight) * factor
        elif center:
            y = F.layer_norm(x, normalized_shape, weight, bias, eps)
        else:
            y = F.rms_norm(x, normalized_shape, weight, eps)
        count = math.prod(normalized_shape)
        if eps is None:
            eps = torch.finfo(x.dtype).eps
        # a bias alone needs nothing kept
        rows = _rows(x, normalized_shape)
        by_column = x.numel() >= count * _ROWS_FOR_STATISTICS
        group_size = count if by_column else quantizer.group_size
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            kept = quantizer.ops.encode_norm(
                rows, eps, center, by_column, quantizer.bits, group_size, quantizer.draw_seed()
            )
        else:
            kept = (None, None, None, None)
        ctx.save_for_backward(*kept, weight)
        ctx.settings = (center, quantizer.bits, group_size)
        ctx.quantizer, ctx.normalized_shape, ctx.x_dtype = quantizer, normalized_shape, x.dtype
        ctx.parameter_like = [None if p is None else (p.shape, p.dtype) for p in (weight, bias)]
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        packed, scales, rstd, columns, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        rows = _rows(grad, ctx.normalized_shape)
        if packed is None:
            d_x, d_weight, d_bias = None, None, rows.reshape(-1, rows.shape[-1]).sum(0)
        else:
            flat_weight = None if weight is None else weight.reshape(-1)
            d_x, d_weight, d_bias = ctx.quantizer.ops.norm_backward(
                rows, packed, scales, rstd, columns, flat_weight, *ctx.settings, list(wanted)
            )
        if wanted[0]:
            d_x = d_x.view(grad.shape).to(ctx.x_dtype)
        d_parameters = [
            d.view(like[0]).to(like[1]) if want else None
            for d, like, want in zip((d_weight, d_bias), ctx.parameter_like, wanted[1:])
        ]
        return (d_x if wanted[0] else None, *d_parameters, None, None, None, None, None)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    quantizer: Quantizer,
) -> Tensor:
    """`torch.nn.functional.layer_norm`; keeps b-bit normalised values and one reciprocal deviation a row.

    With 64 rows or more, the columns of the normalised values are standardised and each row shares one scale; with
    fewer rows there is a scale for every ``quantizer.group_size`` values. Our choice, for the outlying channels of
    transformers.

    Args: as the stock function. The gradients of ``weight`` and ``bias`` are computed from the codes when they are
    wanted.
    """
    if not recording(x, weight, bias):
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    return _RowNorm.apply(x, weight, bias, tuple(normalized_shape), eps, True, quantizer)


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    quantizer: Quantizer,
) -> Tensor:
    """`torch.nn.functional.rms_norm`; keeps b-bit normalised values and one reciprocal root mean square a row."""
    if not recording(x, weight):
        return F.rms_norm(x, normalized_shape, weight, eps)
    return _RowNorm.apply(x, weight, None, tuple(normalized_shape), eps, False, quantizer)


def rms_normalized(
    x: Tensor, factor: Tensor, eps: float, weight: Tensor | None = None, *, quantizer: Quantizer
) -> Tensor:
    """RMSNorm over the last dimension as a model writes it: ``x * factor`` with ``factor = rsqrt(mean(x ** 2) + eps)``, or
    ``weight * factor`` with ``factor`` what is normalised already; without gradients of its own, either. Keeps what
    `rms_norm` does."""
    return _RowNorm.apply(x, weight, None, x.shape[-1:], eps, False, quantizer, factor)


@handles(F.layer_norm)
def _layer_norm(mode, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return layer_norm(input, normalized_shape, weight, bias, eps, quantizer=mode.quantizer("norm"))


@handles(torch.layer_norm)
def _torch_layer_norm(mode, input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return _layer_norm(mode, input, normalized_shape, weight, bias, eps)


@handles(F.rms_norm, torch.rms_norm)
def _rms_norm(mode, input, normalized_shape, weight=None, eps=None):
    return rms_norm(input, normalized_shape, weight, eps, quantizer=mode.quantizer("norm"))
