"""Operators that models write out in several calls, recognised by how their operands came about.

A gated MLP computes ``f(gate) * up``, CLIP's activation function is ``x * sigmoid(1.702 * x)``, and the normalisation of
Llama-like models ``weight * (x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))``. Each of these calls, taken by itself,
keeps something for backward. So they are noted as they are made, and the product at the end looks up what it is a
product of. Its value is the stock one, of the very tensors that the model hands it; only its gradient goes straight to
what the whole was computed of. Nobody then needs the gradients of the calls in between, and what they kept goes with
their results.

Everything else is computed as it is written.
"""

from typing import Any

import torch
from torch import Tensor

from .. import notes
from .activation import self_gated
from .common import is_activation
from .gated_activation import gated_activation
from .products import multiply
from .registry import handles
from .row_norm import rms_normalized
from .square import square


_SELF_GATED = {1.0: "silu", 1.702: "quick_gelu"}  # x * sigmoid(c * x)


def scaled(x: Tensor, scale: float) -> Any:
    """``scale * x``, noted, if that may be the beginning of something."""
    return notes.note("scaled", x * scale, x, scale) if scale in _SELF_GATED and _has_gradient(x) else NotImplemented


def converted(x: Tensor, result: Tensor) -> Tensor:
    """Note, and return, ``x`` in another dtype."""
    return notes.note("converted", result, x) if result.dtype.is_floating_point and result.dtype != x.dtype else result


def squared(mode, x: Tensor) -> Any:
    """``x ** 2``, noted."""
    if not _has_gradient(x):
        return NotImplemented
    return notes.note("squares", square(x, quantizer=mode.quantizer("gated_activation")), x)


def averaged(x: Tensor) -> Any:
    """The mean of ``x`` over the last dimension, which stays, noted if they are squares."""
    note = notes.found(x, "squares")
    return NotImplemented if note is None else _instead(note, "mean", x.mean(-1, keepdim=True))


def offset(x: Tensor, eps: float) -> Any:
    """``x + eps``, noted if it is a mean of squares."""
    note = notes.found(x, "mean")
    return NotImplemented if note is None else _instead(note, "variance", x + eps, eps)


def inverted(x: Tensor) -> Any:
    """``rsqrt(x)``, noted if it is one over a root mean square."""
    note = notes.found(x, "variance")
    return NotImplemented if note is None else _instead(note, "deviation", x.rsqrt(), note.detail)


def _has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _instead(note: notes.Note, kind: str, result: Tensor, detail: Any = None) -> Tensor:
    notes.forget(note.result)
    return notes.note(kind, result, note.x, detail)


def product(mode, a: Tensor, b: Tensor) -> Tensor | None:
    """``a * b`` of two tensors with gradients, if it ends one of these operators."""
    for x, other in ((b, a), (a, b)):
        for operator in (_gated, _normalized, _weighted):
            result = operator(mode, x, other)
            if result is not None:
                return result
    return None


def _gated(mode, activation: Tensor, other: Tensor) -> Tensor | None:
    """``f(x) * other``."""
    note = notes.found(activation, "activation")
    if note is None or other is activation or other.dtype != activation.dtype:
        return None
    x, (name, params) = note.x, note.detail
    if name == "sigmoid" and (own := _scale_of(x, other)) is not None:
        notes.forget(activation)
        return self_gated(other, activation.detach(), _SELF_GATED[own], quantizer=mode.quantizer("activation"))
    if x.shape != other.shape or x.dim() == 0:
        return None
    notes.forget(activation)
    quantizer = mode.quantizer("gated_activation")
    return gated_activation(x, other, name, activated=activation.detach(), quantizer=quantizer, **params)


def _scale_of(x: Tensor, other: Tensor) -> float | None:
    """The number that ``x`` is times ``other``, if that is known."""
    if x is other:
        return 1.0
    note = notes.found(x, "scaled")
    return note.detail if note is not None and note.x is other else None


def _normalized(mode, factor: Tensor, x: Tensor) -> Tensor | None:
    """``x / rms(x)``, the root mean square having been computed of ``x`` or of ``x`` in another dtype."""
    note = notes.found(factor, "deviation")
    if note is None:
        return None
    if note.x is not x:
        changed = notes.found(note.x, "converted")
        if changed is None or changed.x is not x:
            return None
    notes.forget(factor)
    eps = note.detail
    result = rms_normalized(x, factor.detach(), eps, quantizer=mode.quantizer("norm"))
    return notes.note("normalized", result, x, eps)


def _weighted(mode, normalized: Tensor, weight: Tensor) -> Tensor | None:
    """``weight * (x / rms(x))`` of a trained weight."""
    changed = notes.found(normalized, "converted")
    note = notes.found(normalized if changed is None else changed.x, "normalized")
    if note is None or not weight.is_leaf or weight.shape != note.x.shape[-1:]:
        return None
    quantizer = mode.quantizer("norm")
    return rms_normalized(note.x, normalized.detach(), note.detail, weight, quantizer=quantizer)


@handles(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _mul(mode, input, other, out=None):
    if isinstance(other, float):
        return scaled(input, other)
    both = all(isinstance(t, Tensor) and t.requires_grad for t in (input, other))
    if not both or not (is_activation(input) or is_activation(other)):
        return NotImplemented
    result = product(mode, input, other)
    if result is None:
        result = multiply(input, other, quantizer=mode.quantizer("gated_activation"))
    return notes.note("squares", result, input) if input is other else result


@handles(torch.pow, Tensor.pow)
def power(mode, input, exponent, out=None):
    return squared(mode, input) if isinstance(exponent, (int, float)) and exponent == 2 else NotImplemented


@handles(torch.square, Tensor.square)
def _square(mode, input):
    return squared(mode, input)


@handles(torch.mean, Tensor.mean)
def _mean(mode, input, dim=None, keepdim=False, *, dtype=None, out=None):
    dims = [dim] if isinstance(dim, int) else dim
    if not keepdim or dtype is not None or not dims or [d % input.dim() for d in dims] != [input.dim() - 1]:
        return NotImplemented
    return averaged(input)


@handles(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(mode, input, other, *deprecated, alpha=1, out=None):
    return offset(input, other) if isinstance(other, float) and alpha == 1 and not deprecated else NotImplemented


@handles(torch.rsqrt, Tensor.rsqrt)
def _rsqrt(mode, input):
    return inverted(input)


@handles(Tensor.to)
def _to(mode, input, *args, **kwargs):
    return converted(input, input.to(*args, **kwargs)) if input.requires_grad else NotImplemented


@handles(Tensor.float)
def _float(mode, input, **kwargs):
    return converted(input, input.float(**kwargs)) if input.requires_grad else NotImplemented
