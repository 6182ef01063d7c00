"""Products of two activations, as attention and gates written inline compute them, L2 norms and normalisation.

A product keeps both factors for backward. Here each is kept as codes minus its mean over tokens (rows), as queries,
keys and values are in `attention.scaled_dot_product_attention`. Parameters and tensors that need no gradient are kept
as they are: they exist in any case."""

import torch
from torch import Tensor

from ..codec import FLOAT16_MAX
from ..quantizer import Quantizer
from .common import autocast_dtype, is_activation, recording, refuse_double_backward, told_apart
from .registry import handles


class KeptFactor:
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
            if x.dtype == torch.float16:  # what is rounded up may overflow
                x = x.clamp_(-FLOAT16_MAX, FLOAT16_MAX)
        x = x.view(self.shape)
        return x.mT if self.transposed else x


def keep_factors(ctx, a: Tensor, b: Tensor, coded: tuple[bool, bool], quantizer: Quantizer) -> None:
    """Saves, of an autograd function's first two inputs, what the gradient of the other one needs: the first of `ctx.kept`
    is restored from the first three saved tensors, the second from the last three."""
    needs_a, needs_b = ctx.needs_input_grad[:2]
    ctx.kept = KeptFactor(a, coded[0], needs_b, quantizer), KeptFactor(b, coded[1], needs_a, quantizer)
    ctx.save_for_backward(*ctx.kept[0].tensors, *ctx.kept[1].tensors)
    for kept in ctx.kept:
        kept.tensors = None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, stock, coded, quantizer):
        ctx.stock, ctx.shapes = stock, (a.shape, b.shape)
        keep_factors(ctx, a, b, coded, quantizer)
        return stock(a, b)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        saved = ctx.saved_tensors
        d_a = d_b = None
        if ctx.needs_input_grad[1]:
            a = ctx.kept[0].restore(*saved[:3])
            d_b = (a.mT @ grad if ctx.stock is torch.matmul else grad * a).sum_to_size(ctx.shapes[1])
            del a
        if ctx.needs_input_grad[0]:
            b = ctx.kept[1].restore(*saved[3:])
            d_a = (grad @ b.mT if ctx.stock is torch.matmul else grad * b).sum_to_size(ctx.shapes[0])
        return d_a, d_b, None, None, None


def _are_coded(*factors: Tensor) -> tuple[bool, ...]:
    return tuple(is_activation(x) and x.dim() > 0 for x in factors)


def _product(a: Tensor, b: Tensor, stock, quantizer: Quantizer) -> Tensor:
    if not recording(a, b) or not (a.numel() and b.numel()):
        return stock(a, b)
    return _Product.apply(*told_apart(a, b), stock, _are_coded(a, b), quantizer)


def matmul(a: Tensor, b: Tensor, *, quantizer: Quantizer) -> Tensor:
    """`torch.matmul` of two tensors with at least two dimensions each; keeps b-bit codes of activations among them.

    dA = dY B^T and dB = A^T dY, summed over broadcast dimensions.
    """
    a, b = (t.to(autocast_dtype(t) or t.dtype) for t in (a, b))
    return _product(a, b, torch.matmul, quantizer)


def multiply(a: Tensor, b: Tensor, *, quantizer: Quantizer) -> Tensor:
    """``a * b``; keeps b-bit codes of those of the two that are activations of one dimension or more.

    dA = dY B and dB = A dY, summed over broadcast dimensions.
    """
    if a.dtype != b.dtype:
        dtype = torch.result_type(a, b)
        a, b = a.to(dtype), b.to(dtype)
    return _product(a, b, torch.mul, quantizer)


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, x, value, coded, quantizer):
        ctx.shapes, ctx.value = (a.shape, b.shape, x.shape), value
        keep_factors(ctx, a, b, coded, quantizer)
        return torch.addcmul(x, a, b, value=value)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad
        d_a = d_b = None
        if wanted[1]:
            d_b = (grad * ctx.kept[0].restore(*saved[:3]) * ctx.value).sum_to_size(ctx.shapes[1])
        if wanted[0]:
            d_a = (grad * ctx.kept[1].restore(*saved[3:]) * ctx.value).sum_to_size(ctx.shapes[0])
        return d_a, d_b, grad.sum_to_size(ctx.shapes[2]) if wanted[2] else None, None, None, None


def add_product(x: Tensor, a: Tensor, b: Tensor, value: float = 1, *, quantizer: Quantizer) -> Tensor:
    """`torch.addcmul`, ``x + value * a * b``, of tensors of one dtype; keeps of ``a`` and ``b`` what `multiply` does."""
    if not recording(a, b) or not (a.numel() and b.numel()):
        return torch.addcmul(x, a, b, value=value)
    return _AddProduct.apply(*told_apart(a, b, x), value, _are_coded(a, b), quantizer)


@handles(torch.addcmul, Tensor.addcmul)
def _addcmul(mode, input, tensor1, tensor2, *deprecated, value=1, out=None):
    if (
        deprecated
        or len({t.dtype for t in (input, tensor1, tensor2)}) > 1
        or not any(map(is_activation, (tensor1, tensor2)))
    ):
        return NotImplemented
    return add_product(input, tensor1, tensor2, value, quantizer=mode.quantizer("gated_activation"))


@handles(torch.bmm, Tensor.bmm)
def _bmm(mode, input, mat2, out_dtype=None, *, out=None):
    return _matmul(mode, input, mat2) if out_dtype is None else NotImplemented


@handles(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def _matmul(mode, input, other, out=None):
    if not (is_activation(input) and is_activation(other)) or min(input.dim(), other.dim()) < 2:
        return NotImplemented
    return matmul(input, other, quantizer=mode.quantizer("attention"))
