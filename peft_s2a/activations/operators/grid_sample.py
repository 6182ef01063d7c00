"""Sampling at given places, as deformable attention does: codes of the values."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantizer import Quantizer
from .common import is_activation, recording, refuse_double_backward
from .products import KeptFactor
from .registry import handles


_MODES = {"bilinear": 0, "nearest": 1, "bicubic": 2}
_PADDINGS = {"zeros": 0, "border": 1, "reflection": 2}


class _GridSample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grid, mode, padding_mode, align_corners, coded, quantizer):
        ctx.options = _MODES[mode], _PADDINGS[padding_mode], align_corners
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, grid.dtype)
        # The values only say where their slope points: what moves the places they are read at.
        ctx.kept = KeptFactor(x.flatten(2), coded, ctx.needs_input_grad[1], quantizer)
        ctx.save_for_backward(*ctx.kept.tensors, grid)
        ctx.kept.tensors = None
        return F.grid_sample(x, grid, mode, padding_mode, align_corners)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        *codes, grid = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:2])
        x = ctx.kept.restore(*codes).view(ctx.shape) if wanted[1] else grad.new_empty(ctx.shape)
        d_x, d_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad, x.to(grad.dtype), grid.to(grad.dtype), *ctx.options, wanted
        )
        d_x, d_grid = (
            d.to(dtype) if is_wanted else None for d, dtype, is_wanted in zip((d_x, d_grid), ctx.dtypes, wanted)
        )
        return d_x, d_grid, None, None, None, None, None


def grid_sample(
    x: Tensor, grid: Tensor, mode: str, padding_mode: str, align_corners: bool, *, quantizer: Quantizer
) -> Tensor:
    """`torch.nn.functional.grid_sample` of images (``[B, C, H, W]``); keeps the places (``grid``) and, if these need a
    gradient, b-bit codes of ``x``.

    The gradient of ``x`` is read off the places alone, exactly; that of the places needs the slope of ``x`` there.
    """
    if not recording(x, grid) or x.dim() != 4 or not (x.numel() and grid.numel()):
        return F.grid_sample(x, grid, mode, padding_mode, align_corners)
    return _GridSample.apply(x, grid, mode, padding_mode, align_corners, is_activation(x), quantizer)


@handles(F.grid_sample)
def _grid_sample(quantizing, input, grid, mode="bilinear", padding_mode="zeros", align_corners=None):
    if align_corners is None:  # which torch warns of
        return NotImplemented
    return grid_sample(input, grid, mode, padding_mode, align_corners, quantizer=quantizing.quantizer("attention"))
