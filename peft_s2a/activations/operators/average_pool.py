"""Average pooling, which keeps nothing but shapes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import recording, refuse_double_backward
from .registry import handles


class _AveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, backward, pool, *settings):
        ctx.shape, ctx.dtype, ctx.backward_of, ctx.settings = input.shape, input.dtype, backward, settings
        return pool(input, *settings)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
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
    if not recording(input):
        return F.avg_pool2d(input, *settings)
    return _AveragePool.apply(input, _avg_pool2d_backward, F.avg_pool2d, *settings)


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d`; keeps nothing."""
    if not recording(input):
        return F.adaptive_avg_pool2d(input, output_size)
    return _AveragePool.apply(input, _adaptive_avg_pool2d_backward, F.adaptive_avg_pool2d, output_size)


@handles(F.avg_pool2d)
def _avg_pool2d(mode, input, *args, **kwargs):
    return avg_pool2d(input, *args, **kwargs)


@handles(F.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(mode, input, output_size):
    return adaptive_avg_pool2d(input, output_size)
