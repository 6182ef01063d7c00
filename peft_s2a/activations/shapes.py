"""Linear operators whose backward pass needs the shape of their input or a weight that is there anyway, where the stock
operator keeps more.

Of convolutions with frozen weights autograd keeps the input, for the weight's gradient, even if nobody wants it. Under
autocast it keeps a copy of every frozen weight in the lower precision, half as large as the model. Nothing is
approximated here.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import _autocast_dtype, _not_a_view, _recording, _refuse_double_backward


def _cast(dtype: torch.dtype | None, *tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None or dtype is None else t.to(dtype) for t in tensors]


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, dtype):
        ctx.save_for_backward(weight)
        ctx.dtype = dtype
        return _not_a_view(F.linear(input, *_cast(dtype, weight), bias))

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        (weight,) = ctx.saved_tensors
        d_input = grad @ weight.to(ctx.dtype) if ctx.needs_input_grad[0] else None
        d_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return d_input, None, d_bias, None


def frozen_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with a weight that needs no gradient; keeps nothing but a reference to the weight.

    dX is dY W, db the sum of dY. Stock autograd does the same without autocast, and under it keeps a copy of the weight.
    """
    dtype = _autocast_dtype(input)
    if dtype is None or weight.dtype == dtype or weight.dim() != 2 or not _recording(input, bias):
        return F.linear(input, weight, bias)
    input, bias = _cast(dtype, input, bias)
    return _FrozenLinear.apply(input, weight, bias, dtype)


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, dtype, stride, padding, dilation, transposed, output_padding, groups):
        ctx.save_for_backward(weight)
        ctx.size, ctx.dtype = input.shape[2:], dtype
        (weight,) = _cast(dtype, weight)
        ctx.settings = stride, padding, dilation, transposed, groups
        return torch.convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        (weight,) = _cast(ctx.dtype, *ctx.saved_tensors)
        stride, padding, dilation, transposed, groups = ctx.settings
        d_input = d_bias = None
        if ctx.needs_input_grad[0]:
            # the adjoint of a convolution is a transposed convolution, and the other way round
            left_over = [0] * len(stride)
            if not transposed:
                left_over = [
                    size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
                    for size, out, s, p, d, k in zip(
                        ctx.size, grad.shape[2:], stride, padding, dilation, weight.shape[2:]
                    )
                ]
            d_input = torch.convolution(
                grad, weight, None, stride, padding, dilation, not transposed, left_over, groups
            )
        if ctx.needs_input_grad[2]:
            d_bias = grad.sum([d for d in range(grad.dim()) if d != 1])
        return d_input, None, d_bias, None, None, None, None, None, None, None


def frozen_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    transposed: bool,
    output_padding: int | Sequence[int],
    groups: int,
) -> Tensor:
    """`torch.convolution` with a weight that needs no gradient; keeps nothing but a reference to the weight.

    dX is the transposed convolution of dY with the weight, db the sum of dY.

    Args:
        input: ``[B, C, spatial...]`` with one to three spatial dimensions.
        stride, padding, dilation, output_padding: one number, or one for every spatial dimension.
    """
    dims = weight.dim() - 2
    stride, padding, dilation, output_padding = (
        [setting] * dims if isinstance(setting, int) else list(setting) * (dims // len(setting))
        for setting in (stride, padding, dilation, output_padding)
    )
    settings = stride, padding, dilation, transposed, output_padding, groups
    dtype = _autocast_dtype(input)
    input, bias = _cast(dtype, input, bias)
    if not _recording(input, bias):
        return torch.convolution(input, *_cast(dtype, weight), bias, *settings)
    return _FrozenConvolution.apply(input, weight, bias, dtype, *settings)


class _AveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, backward, pool, *settings):
        ctx.shape, ctx.dtype, ctx.backward_of, ctx.settings = input.shape, input.dtype, backward, settings
        return pool(input, *settings)

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        like_input = grad.new_empty(()).expand(ctx.shape)
        return ctx.backward_of(grad, like_input, ctx.settings), None, None, *[None] * len(ctx.settings)


def _avg_pool2d_backward(grad: Tensor, input: Tensor, settings: tuple) -> Tensor:
    return torch.ops.aten.avg_pool2d_backward(grad, input, *settings)


def _adaptive_avg_pool2d_backward(grad: Tensor, input: Tensor, settings: tuple) -> Tensor:
    return torch.ops.aten._adaptive_avg_pool2d_backward(grad, input)


def avg_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """`torch.nn.functional.avg_pool2d`; keeps nothing."""
    kernel_size, stride, padding = (
        [setting] * 2 if isinstance(setting, int) else list(setting)
        for setting in (kernel_size, kernel_size if stride is None else stride, padding)
    )
    settings = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    if not _recording(input):
        return F.avg_pool2d(input, *settings)
    return _AveragePool.apply(input, _avg_pool2d_backward, F.avg_pool2d, *settings)


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d`; keeps nothing."""
    if not _recording(input):
        return F.adaptive_avg_pool2d(input, output_size)
    return _AveragePool.apply(input, _adaptive_avg_pool2d_backward, F.adaptive_avg_pool2d, output_size)
