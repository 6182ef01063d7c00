"""Convolutions: codes of their input where the weight is trained, nothing where it is frozen."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import notes
from ..masks import Recipe
from ..quantizer import Quantizer
from .common import autocast_dtype, cast, decode_rows, encode_rows, pair, recording, refuse_double_backward
from .registry import handles


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups, quantizer):
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        codes = encode_rows(x.flatten(1), quantizer) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(*codes, weight)
        ctx.geometry = stride, padding, dilation, False, (0, 0), groups
        ctx.quantizer, ctx.shape = quantizer, x.shape
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        packed, scales, weight = ctx.saved_tensors
        if packed is None:
            x = grad.new_empty(1).expand(ctx.shape)  # only its shape is read
        else:
            x = decode_rows(packed, scales, ctx.quantizer, math.prod(ctx.shape[1:]), grad.dtype).view(ctx.shape)
        wanted = ctx.needs_input_grad[:3]
        bias_sizes = None if ctx.dtypes[2] is None else [weight.shape[0]]
        grads = torch.ops.aten.convolution_backward(
            grad, x, weight.to(grad.dtype), bias_sizes, *ctx.geometry, list(wanted)
        )
        grads = [d.to(dtype) if want else None for d, dtype, want in zip(grads, ctx.dtypes, wanted)]
        return (*grads, None, None, None, None, None)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    quantizer: Quantizer,
) -> Tensor:
    """`torch.nn.functional.conv2d` (input ``[B, C, H, W]``, padding in numbers) whose trained weight keeps b-bit
    inputs."""
    if not recording(x, weight, bias) or x.numel() == 0 or x.dim() != 4 or isinstance(padding, str):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _Conv2d.apply(x, weight, bias, pair(stride), pair(padding), pair(dilation), groups, quantizer)


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input, weight, recipe, bias, dtype, stride, padding, dilation, transposed, output_padding, groups
    ):
        ctx.recipe = recipe
        ctx.save_for_backward(*([weight] if recipe is None else recipe.take_sources()))
        ctx.size, ctx.dtype = input.shape[2:], dtype
        (weight,) = cast(dtype, weight)
        ctx.settings = stride, padding, dilation, transposed, groups
        return torch.convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        saved = ctx.saved_tensors
        (weight,) = cast(ctx.dtype, saved[0] if ctx.recipe is None else ctx.recipe.make(saved))
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
        if ctx.needs_input_grad[3]:
            d_bias = grad.sum([d for d in range(grad.dim()) if d != 1])
        return d_input, None, None, d_bias, None, None, None, None, None, None, None


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
    """`torch.convolution` with a weight that needs no gradient; keeps nothing but a reference to the weight, or to the
    parameters it was made of (`masks`).

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
    dtype = autocast_dtype(input)
    input, bias = cast(dtype, input, bias)
    if not recording(input, bias):
        return torch.convolution(input, *cast(dtype, weight), bias, *settings)
    is_made = not isinstance(weight, nn.Parameter) and not torch.compiler.is_compiling()
    return _FrozenConvolution.apply(input, weight, Recipe(weight) if is_made else None, bias, dtype, *settings)


@handles(F.conv1d, F.conv2d, F.conv3d)
def _convolution(mode, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    notes.forget(input)
    if input.dim() != weight.dim():
        return NotImplemented
    if isinstance(padding, str):
        padding = _padding(padding, weight.shape[2:], dilation)
        if padding is None:
            return NotImplemented
    if not weight.requires_grad:
        return frozen_convolution(input, weight, bias, stride, padding, dilation, False, 0, groups)
    if mode.config.compress_linear_inputs and weight.dim() == 4:
        return conv2d(input, weight, bias, stride, padding, dilation, groups, quantizer=mode.quantizer("linear"))
    return NotImplemented


def _padding(name: str, kernel: torch.Size, dilation: int | tuple[int, ...]) -> list[int] | None:
    """Numbers for "valid" and "same" padding; None where "same" is more on one side than on the other."""
    if name == "valid":
        return [0] * len(kernel)
    dilations = [dilation] * len(kernel) if isinstance(dilation, int) else dilation
    both_sides = [d * (k - 1) for d, k in zip(dilations, kernel)]
    return [total // 2 for total in both_sides] if all(total % 2 == 0 for total in both_sides) else None


@handles(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _transposed_convolution(
    mode, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    if input.dim() != weight.dim() or weight.requires_grad:
        return NotImplemented
    return frozen_convolution(input, weight, bias, stride, padding, dilation, True, output_padding, groups)
