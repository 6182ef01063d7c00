"""L2 norms: codes of the values, and the norms."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..quantizer import Quantizer
from .common import recording, refuse_double_backward
from .products import KeptFactor
from .registry import handles


class _VectorNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, keepdim, quantizer):
        norm = torch.linalg.vector_norm(x, 2, dim, keepdim=True)
        ctx.kept = KeptFactor(x, True, True, quantizer)
        ctx.save_for_backward(*ctx.kept.tensors, norm)
        ctx.kept.tensors = None
        ctx.dim, ctx.keepdim = dim, keepdim
        return norm.clone() if keepdim else norm.sum(dim)  # of one value each: a tensor of its own, not a view

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        *codes, norm = ctx.saved_tensors
        x = ctx.kept.restore(*codes)
        if not ctx.keepdim:
            for d in sorted(d % x.dim() for d in ctx.dim):
                grad = grad.unsqueeze(d)
        return (grad / norm).masked_fill_(norm == 0, 0) * x, None, None, None


def vector_norm(x: Tensor, dim: Sequence[int] | None, keepdim: bool, *, quantizer: Quantizer) -> Tensor:
    """`torch.linalg.vector_norm` of order two; keeps b-bit values and the norm. dX = dY X / norm, or 0 at 0."""
    dim = tuple(dim or range(x.dim()))
    if not recording(x) or not x.numel() or x.dim() == 0:
        return torch.linalg.vector_norm(x, 2, dim, keepdim)
    return _VectorNorm.apply(x, dim, keepdim, quantizer)


@handles(torch.linalg.vector_norm)
def _vector_norm(mode, input, ord=2, dim=None, keepdim=False, *, dtype=None, out=None):
    if ord != 2 or dtype is not None:
        return NotImplemented
    return vector_norm(input, [dim] if isinstance(dim, int) else dim, keepdim, quantizer=mode.quantizer("norm"))


@handles(torch.norm)  # and `Tensor.norm`, see `interception`
def norm(mode, input, p="fro", dim=None, keepdim=False, out=None, dtype=None):
    """Both are deprecated, and call `torch.linalg.vector_norm` past function modes, as global response norms in timm do."""
    dims = [dim] if isinstance(dim, int) else dim
    is_frobenius = p == "fro" and (dims is None or 0 < len(dims) <= 2)
    if dtype is not None or not (is_frobenius or (not isinstance(p, str) and p == 2)):
        return NotImplemented
    return vector_norm(input, dims, keepdim, quantizer=mode.quantizer("norm"))
