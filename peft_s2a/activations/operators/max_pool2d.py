"""Max pooling: the place of each maximum in its window."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codec import WIDTHS
from ..quantizer import Quantizer
from .common import pair, recording, refuse_double_backward
from .registry import handles


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel_size, stride, padding, dilation, ceil_mode, quantizer):
        ctx.bits = next(bits for bits in WIDTHS if 2**bits >= kernel_size[0] * kernel_size[1])
        ctx.geometry, ctx.size, ctx.quantizer = (kernel_size, stride, padding, dilation), x.shape[-2:], quantizer
        y, packed = quantizer.ops.max_pool2d(x, *ctx.geometry, ceil_mode, ctx.bits)
        ctx.save_for_backward(packed)
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        d_x = ctx.quantizer.ops.max_pool2d_backward(grad, *ctx.saved_tensors, *ctx.geometry, *ctx.size, ctx.bits)
        return d_x, None, None, None, None, None, None


def max_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    quantizer: Quantizer,
) -> Tensor:
    """`torch.nn.functional.max_pool2d`, exactly; keeps each maximum's place in its window, 2 bits for 2 x 2, 4 for 3 x
    3.

    Windows of more than 256 places run in full precision.
    """
    kernel, step = pair(kernel_size), pair(kernel_size if stride in (None, [], ()) else stride)
    if not recording(x) or x.numel() == 0 or kernel[0] * kernel[1] > 256:
        return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    return _MaxPool2d.apply(x, kernel, step, pair(padding), pair(dilation), ceil_mode, quantizer)


@handles(F.max_pool2d)
def _max_pool2d(mode, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    if return_indices:
        return NotImplemented
    return max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, quantizer=mode.quantizer("activation"))
