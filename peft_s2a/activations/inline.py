"""Operators that models write out in several calls, recognised by how their operands came about.

A gated MLP computes ``f(gate) * up``, CLIP's activation function is ``x * sigmoid(1.702 * x)``, and the normalisation of
Llama-like models ``weight * (x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))``. Each of these calls, taken by itself,
keeps something for backward. So they are noted as they are made, and the product at the end looks up what it is a
product of. Its value is the stock one, of the very tensors that the model hands it; only its gradient goes straight to
what the whole was computed of. Nobody then needs the gradients of the calls in between, and what they kept goes with
their results.

A note holds for the very tensor that a call returned, inside the module that made the call or was handed the tensor, while
neither it nor what it was made of is changed in place and nobody asks for its gradient. Everything else is computed as it
is written.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional
from .activation_functions import activation_function


_MOST = 4  # notes at a time: each holds on to two tensors
_SELF_GATED = {1.0: "silu", 1.702: "quick_gelu"}  # x * sigmoid(c * x)
_IN_PLACE = {  # functions that write to a tensor
    getattr(owner, name): True
    for owner in (Tensor, torch, torch.nn.functional)
    for name in dir(owner)
    if (name.endswith("_") and not name.startswith("_"))
    or name == "__setitem__"
    or (name.startswith("__i") and hasattr(Tensor, name.replace("__i", "__", 1)))
}


class _Note(NamedTuple):
    """``result`` is ``kind`` of ``x``; the versions are those of the two tensors."""

    kind: str
    result: Tensor
    x: Tensor
    versions: tuple[int, int]
    detail: Any


class _Thread(threading.local):
    def __init__(self) -> None:
        self.notes: list[_Note] = []


_thread = _Thread()


def begin() -> list[_Note]:
    """Start without notes; returns those made so far, for `end`."""
    outer, _thread.notes = _thread.notes, []
    return outer


def end(outer: list[_Note], result: Any = None) -> None:
    """Go back to the notes ``outer``, with what has been noted about ``result`` since."""
    outer += [note for note in _thread.notes if note.result is result]
    _thread.notes = outer[-_MOST:]


def forget_all() -> None:
    """Drop all notes."""
    _thread.notes.clear()


def apart(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, with notes of its own."""
    outer = begin()
    try:
        return function(*args, **kwargs)
    finally:
        end(outer)


def _note(kind: str, result: Tensor, x: Tensor, detail: Any = None) -> Tensor:
    """Note, and return, a result."""
    if result.requires_grad and result is not x:
        notes = _thread.notes
        if len(notes) == _MOST:
            del notes[0]
        notes.append(_Note(kind, result, x, (_version(result), _version(x)), detail))
    return result


def forget(x: Tensor) -> None:
    """Drop what is noted about ``x``, which has gone where no product is."""
    notes = _thread.notes
    if notes:
        notes[:] = [note for note in notes if note.result is not x]


def before_call(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any] | None) -> None:
    """Drop all notes if a call changes a tensor in place, which may share memory with any."""
    notes = _thread.notes
    if notes and (
        _IN_PLACE.get(function)
        or any(x is True for x in args)
        or (kwargs and (kwargs.get("inplace") or kwargs.get("out") is not None))
    ):
        notes.clear()


def _version(x: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() else x._version


def _found(x: Any, *kinds: str) -> _Note | None:
    """What is noted about ``x``, if it is one of the ``kinds`` and still holds."""
    for note in reversed(_thread.notes):
        if note.result is x and note.kind in kinds:
            return note if _holds(note) else None
    return None


def _holds(note: _Note) -> bool:
    if torch.compiler.is_compiling():
        return True
    result = note.result
    watched = result.retains_grad or result._backward_hooks
    return not watched and note.versions == (result._version, note.x._version)


def activated(x: Tensor, result: Tensor, name: str, params: dict[str, float]) -> Tensor:
    """Note, and return, ``result`` of activation function ``name``. Those of piecewise-linear functions are not noted:
    their derivative is known exactly from one bit."""
    return result if activation_function(name).derivative is None else _note("activation", result, x, (name, params))


def cast(x: Tensor, result: Tensor) -> Tensor:
    """Note, and return, ``x`` in another dtype."""
    return _note("cast", result, x) if result.dtype.is_floating_point and result.dtype != x.dtype else result


def scaled(x: Tensor, scale: float) -> Any:
    """``scale * x``, noted, if that may be the beginning of something."""
    return _note("scaled", x * scale, x, scale) if scale in _SELF_GATED and _has_gradient(x) else NotImplemented


def squared(x: Tensor, result: Tensor | None = None) -> Any:
    """``x ** 2``, noted."""
    if not _has_gradient(x):
        return NotImplemented
    return _note("squares", x**2 if result is None else result, x)


def averaged(x: Tensor) -> Any:
    """The mean of ``x`` over the last dimension, which stays, noted if they are squares."""
    note = _found(x, "squares")
    return NotImplemented if note is None else _instead(note, "mean", x.mean(-1, keepdim=True))


def offset(x: Tensor, eps: float) -> Any:
    """``x + eps``, noted if it is a mean of squares."""
    note = _found(x, "mean")
    return NotImplemented if note is None else _instead(note, "variance", x + eps, eps)


def inverted(x: Tensor) -> Any:
    """``rsqrt(x)``, noted if it is one over a root mean square."""
    note = _found(x, "variance")
    return NotImplemented if note is None else _instead(note, "deviation", x.rsqrt(), note.detail)


def _has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _instead(note: _Note, kind: str, result: Tensor, detail: Any = None) -> Tensor:
    forget(note.result)
    return _note(kind, result, note.x, detail)


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
    note = _found(activation, "activation")
    if note is None or other is activation or other.dtype != activation.dtype:
        return None
    x, (name, params) = note.x, note.detail
    if name == "sigmoid" and (own := _scale_of(x, other)) is not None:
        forget(activation)
        return functional.self_gated(
            other, activation.detach(), _SELF_GATED[own], quantizer=mode.quantizer("activation")
        )
    if x.shape != other.shape or x.dim() == 0:
        return None
    forget(activation)
    quantizer = mode.quantizer("gated_activation")
    return functional.gated_activation(x, other, name, activated=activation.detach(), quantizer=quantizer, **params)


def _scale_of(x: Tensor, other: Tensor) -> float | None:
    """The number that ``x`` is times ``other``, if that is known."""
    if x is other:
        return 1.0
    note = _found(x, "scaled")
    return note.detail if note is not None and note.x is other else None


def _normalized(mode, factor: Tensor, x: Tensor) -> Tensor | None:
    """``x / rms(x)``, the root mean square having been computed of ``x`` or of ``x`` in another dtype."""
    note = _found(factor, "deviation")
    if note is None:
        return None
    if note.x is not x:
        changed = _found(note.x, "cast")
        if changed is None or changed.x is not x:
            return None
    forget(factor)
    eps = note.detail
    result = functional.rms_normalized(x, factor.detach(), eps, quantizer=mode.quantizer("norm"))
    return _note("normalized", result, x, eps)


def _weighted(mode, normalized: Tensor, weight: Tensor) -> Tensor | None:
    """``weight * (x / rms(x))`` of a trained weight."""
    changed = _found(normalized, "cast")
    note = _found(normalized if changed is None else changed.x, "normalized")
    if note is None or not weight.is_leaf or weight.shape != note.x.shape[-1:]:
        return None
    quantizer = mode.quantizer("norm")
    return functional.rms_normalized(note.x, normalized.detach(), note.detail, weight, quantizer=quantizer)
