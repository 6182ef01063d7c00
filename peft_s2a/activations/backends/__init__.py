"""Implementations of the ops declared in `peft_s2a.activations.ops`, one module a backend.

`reference` implements all of them in plain PyTorch, on any device; the others implement those that pay and are checked
against it: `compiled` on CPUs, `triton` on CUDA devices.
"""

import functools
import os
import warnings
from types import ModuleType

import torch

from . import compiled


BACKENDS = ("auto", "reference", "compiled", "triton")


def triton_on(device: str) -> ModuleType | None:
    """The Triton kernels for devices of a type; None, after one warning where the user expects them, for none."""
    return _triton() if device == "cuda" and not is_interpreted() else None


@functools.cache
def check(backend: str) -> bool:
    """Whether the kernels that the user asked for by name ("compiled", "triton") run on this machine; a warning if
    not."""
    if backend == "compiled":
        return compiled.library() is not None
    if not is_interpreted() and not torch.cuda.is_available():
        _warn(
            "There is no CUDA device for the Triton kernels",
            "For tests they run on the CPU in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported. "
            'Pass backend="auto" to take what fits the device.',
        )
        return False
    return _triton() is not None


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter: on the CPU, for tests, and not on CUDA devices."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton() -> ModuleType | None:
    try:
        from . import triton
    except ImportError as error:
        _warn(
            f"Triton cannot be imported ({error})",
            'Install it (pip install triton), or pass backend="reference" to silence this.',
        )
        return None
    return triton


def _warn(problem: str, remedy: str) -> None:
    warnings.warn(f"{problem}; quantised activations fall back to the slow reference backend. {remedy}", stacklevel=4)
