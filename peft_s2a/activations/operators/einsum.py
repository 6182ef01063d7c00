"""Sums of products of two activations in Einstein's notation: codes of both."""

import torch
from torch import Tensor

from ..quantizer import Quantizer
from .common import autocast_dtype, is_activation, not_a_view, recording, refuse_double_backward, told_apart
from .products import keep_factors
from .registry import handles


class _Einsum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, terms, quantizer):
        ctx.terms = terms
        keep_factors(ctx, a, b, (True, True), quantizer)
        return not_a_view(torch.einsum("{},{}->{}".format(*terms), a, b))

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        saved = ctx.saved_tensors
        of_a, of_b, of_result = ctx.terms
        d_a = d_b = None
        if ctx.needs_input_grad[1]:
            d_b = torch.einsum(f"{of_result},{of_a}->{of_b}", grad, ctx.kept[0].restore(*saved[:3]))
        if ctx.needs_input_grad[0]:
            d_a = torch.einsum(f"{of_result},{of_b}->{of_a}", grad, ctx.kept[1].restore(*saved[3:]))
        return d_a, d_b, None, None


def einsum(terms: tuple[str, str, str], a: Tensor, b: Tensor, *, quantizer: Quantizer) -> Tensor:
    """`torch.einsum` of two activations that need a gradient; keeps b-bit codes of both.

    The gradient of either is the sum of products of the result's gradient and the other.

    Args:
        terms: of ``a``, of ``b`` and of the result, as `split_equation` gives them.
    """
    a, b = (t.to(autocast_dtype(t) or t.dtype) for t in (a, b))
    return _Einsum.apply(*told_apart(a, b), terms, quantizer)


def split_equation(equation: str, a: Tensor, b: Tensor) -> tuple[str, str, str] | None:
    """The terms of an equation of two operands; None for forms whose gradient is no such sum: an ellipsis, an index twice
    in a term, in one operand alone, or of size one on one side, which broadcasts."""
    operands, arrow, result = equation.replace(" ", "").partition("->")
    terms = [*operands.split(","), result]
    if not arrow or len(terms) != 3 or not all(term.isalpha() and len(set(term)) == len(term) for term in terms):
        return None
    of_a, of_b, of_result = terms
    if len(of_a) != a.dim() or len(of_b) != b.dim():
        return None
    if any(index not in of_b + of_result for index in of_a) or any(index not in of_a + of_result for index in of_b):
        return None
    sizes = dict(zip(of_a, a.shape))
    if any(sizes.get(index, size) != size for index, size in zip(of_b, b.shape)):
        return None
    return of_a, of_b, of_result


@handles(torch.einsum)
def _einsum(mode, equation, *operands):
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or not all(map(is_activation, operands)):
        return NotImplemented
    a, b = operands
    if a.dtype != b.dtype or not (recording(a, b) and a.numel() and b.numel()):
        return NotImplemented
    terms = split_equation(equation, a, b)
    return NotImplemented if terms is None else einsum(terms, a, b, quantizer=mode.quantizer("attention"))
