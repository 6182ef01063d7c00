"""Products of two activations, as attention and gates written inline compute them, L2 norms and normalisation.

A product keeps both factors for backward. Here each is kept as codes minus its mean over tokens (rows), as queries,
keys and values are in `functional.scaled_dot_product_attention`. Parameters and tensors that need no gradient are kept
as they are: they exist in any case.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .codec import math_dtype
from .functional import Quantizer, _autocast_dtype, _recording, _refuse_double_backward


def is_activation(x: object) -> bool:
    """Whether ``x`` is a tensor that was computed from something trained: neither a parameter nor a constant."""
    return isinstance(x, Tensor) and x.requires_grad and not x.is_leaf


class _Kept:
    """How one factor is kept: as it is, as codes, or (its partner needs no gradient) not at all."""

    def __init__(self, x: Tensor, coded: bool, needed: bool, quantizer: Quantizer) -> None:
        self.quantizer, self.dtype, self.coded = quantizer, x.dtype, coded and needed
        if not self.coded:
            self.tensors = (x if needed else None, None, None)
            return
        self.transposed = x.dim() > 1 and x.stride(-1) > x.stride(-2)
        rows = x.mT if self.transposed else x
        self.shape = rows.shape
        while rows.dim() < 4:
            rows = rows.unsqueeze(0)
        rows = rows.flatten(0, -4)
        self.tensors = quantizer.ops.encode_heads(
            rows, quantizer.bits, quantizer.group_size, True, True, quantizer.draw_seed()
        )

    def restore(self, packed: Tensor | None, scales: Tensor | None, mean: Tensor | None) -> Tensor | None:
        if not self.coded:
            return packed
        x = self.quantizer.ops.decode_groups(
            packed.flatten(0, 2),
            scales.flatten(0, 2),
            self.quantizer.bits,
            self.quantizer.group_size,
            self.shape[-1],
            self.dtype,
        ).view(*packed.shape[:3], self.shape[-1])
        if mean.numel():
            x = x.add_(mean)
        x = x.view(self.shape)
        return x.mT if self.transposed else x


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, stock, coded_a, coded_b, quantizer):
        ctx.stock = stock
        ctx.kept = (
            _Kept(a, coded_a, ctx.needs_input_grad[1], quantizer),
            _Kept(b, coded_b, ctx.needs_input_grad[0], quantizer),
        )
        ctx.shapes = a.shape, b.shape
        ctx.save_for_backward(*ctx.kept[0].tensors, *ctx.kept[1].tensors)
        for kept in ctx.kept:
            kept.tensors = None
        return stock(a, b)

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        saved = ctx.saved_tensors
        d_a = d_b = None
        if ctx.needs_input_grad[1]:
            a = ctx.kept[0].restore(*saved[:3])
            d_b = (a.mT @ grad if ctx.stock is torch.matmul else grad * a).sum_to_size(ctx.shapes[1])
            del a
        if ctx.needs_input_grad[0]:
            b = ctx.kept[1].restore(*saved[3:])
            d_a = (grad @ b.mT if ctx.stock is torch.matmul else grad * b).sum_to_size(ctx.shapes[0])
        return d_a, d_b, None, None, None, None


def _product(a: Tensor, b: Tensor, stock, quantizer: Quantizer) -> Tensor:
    if not _recording(a, b) or not (a.numel() and b.numel()):
        return stock(a, b)
    coded = (is_activation(x) and x.dim() > 0 for x in (a, b))
    return _Product.apply(a, b, stock, *coded, quantizer)


def matmul(a: Tensor, b: Tensor, *, quantizer: Quantizer) -> Tensor:
    """`torch.matmul` of two tensors with at least two dimensions each; keeps b-bit codes of activations among them.

    dA = dY B^T and dB = A^T dY, summed over broadcast dimensions.
    """
    a, b = (t.to(_autocast_dtype(t) or t.dtype) for t in (a, b))
    return _product(a, b, torch.matmul, quantizer)


def multiply(a: Tensor, b: Tensor, *, quantizer: Quantizer) -> Tensor:
    """``a * b``; keeps b-bit codes of those of the two that are activations of one dimension or more.

    dA = dY B and dB = A dY, summed over broadcast dimensions.
    """
    if a.dtype != b.dtype:
        dtype = torch.result_type(a, b)
        a, b = a.to(dtype), b.to(dtype)
    if a is b and torch.compiler.is_compiling():  # whose autograd functions refuse one tensor twice
        b = b.view_as(b)
    return _product(a, b, torch.mul, quantizer)


class _VectorNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, keepdim, quantizer):
        norm = torch.linalg.vector_norm(x, 2, dim, keepdim=True)
        ctx.kept = _Kept(x, True, True, quantizer)
        ctx.save_for_backward(*ctx.kept.tensors, norm)
        ctx.kept.tensors = None
        ctx.dim, ctx.keepdim = dim, keepdim
        return norm.clone() if keepdim else norm.sum(dim)  # of one value each: a tensor of its own, not a view

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        *codes, norm = ctx.saved_tensors
        x = ctx.kept.restore(*codes)
        if not ctx.keepdim:
            for d in sorted(d % x.dim() for d in ctx.dim):
                grad = grad.unsqueeze(d)
        return (grad / norm).masked_fill_(norm == 0, 0) * x, None, None, None


def vector_norm(x: Tensor, dim: Sequence[int] | None, keepdim: bool, *, quantizer: Quantizer) -> Tensor:
    """`torch.linalg.vector_norm` of order two; keeps b-bit values and the norm. dX = dY X / norm, or 0 at 0."""
    dim = tuple(dim or range(x.dim()))
    if not _recording(x) or not x.numel() or x.dim() == 0:
        return torch.linalg.vector_norm(x, 2, dim, keepdim)
    return _VectorNorm.apply(x, dim, keepdim, quantizer)


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
        _refuse_double_backward()
        count = grad.shape[-1]
        bits, group_size = ctx.quantizer.bits, ctx.quantizer.group_size
        d_x, _, _ = ctx.quantizer.ops.norm_backward(
            grad.reshape(-1, count), *ctx.saved_tensors, None, False, bits, group_size, [True, False, False]
        )
        return d_x.view(grad.shape), None, None


def normalize(x: Tensor, eps: float = 1e-12, *, quantizer: Quantizer) -> Tensor:
    """`torch.nn.functional.normalize` over the last dimension; keeps b-bit directions and a reciprocal norm a row."""
    if not _recording(x) or not x.numel():
        return F.normalize(x, dim=-1, eps=eps)
    return _Normalize.apply(x, eps, quantizer)
