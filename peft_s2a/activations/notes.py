"""How tensors came about, noted as operators are called, for those that models write out in several calls.

A note holds for the very tensor that a call returned, inside the module that made the call or was handed the tensor, while
neither it nor what it was made of is changed in place and nobody asks for its gradient.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


_MOST = 4  # notes at a time: each holds on to two tensors


_IN_PLACE = {  # functions that write to a tensor
    getattr(owner, name): True
    for owner in (Tensor, torch, torch.nn.functional)
    for name in dir(owner)
    if (name.endswith("_") and not name.startswith("_"))
    or name == "__setitem__"
    or (name.startswith("__i") and hasattr(Tensor, name.replace("__i", "__", 1)))
}


class Note(NamedTuple):
    """``result`` is ``kind`` of ``x``; the versions are those of the two tensors."""

    kind: str
    result: Tensor
    x: Tensor
    versions: tuple[int, int]
    detail: Any


class _Thread(threading.local):
    def __init__(self) -> None:
        self.notes: list[Note] = []


_thread = _Thread()


def begin() -> list[Note]:
    """Start without notes; returns those made so far, for `end`."""
    outer, _thread.notes = _thread.notes, []
    return outer


def end(outer: list[Note], result: Any = None) -> None:
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


def note(kind: str, result: Tensor, x: Tensor, detail: Any = None) -> Tensor:
    """Note, and return, a result."""
    if result.requires_grad and result is not x:
        notes = _thread.notes
        if len(notes) == _MOST:
            del notes[0]
        notes.append(Note(kind, result, x, (_version(result), _version(x)), detail))
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


def found(x: Any, *kinds: str) -> Note | None:
    """What is noted about ``x``, if it is one of the ``kinds`` and still holds."""
    for note in reversed(_thread.notes):
        if note.result is x and note.kind in kinds:
            return note if _holds(note) else None
    return None


def _holds(note: Note) -> bool:
    if torch.compiler.is_compiling():
        return True
    result = note.result
    watched = result.retains_grad or result._backward_hooks
    return not watched and note.versions == (result._version, note.x._version)
