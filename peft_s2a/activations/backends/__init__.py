"""Implementations of the ops declared in `peft_s2a.activations.ops`, one module a backend.

`reference` implements all of them in plain PyTorch, on any device; the others implement those that pay and are checked
against it: `compiled` on CPUs, `triton` on CUDA devices.
"""

import functools
import warnings
from types import ModuleType

import torch

from . import compiled, reference


BACKENDS = ("auto", "reference", "compiled", "triton")


def select(backend: str, device: torch.device, op: str) -> ModuleType:
    """The backend module that runs ``op`` on ``device`` when the user asked for ``backend``."""
    fused = _fused(backend, device.type)
    return fused if fused is not None and hasattr(fused, op) else reference


@functools.cache
def _fused(backend: str, device: str) -> ModuleType | None:
    """The module of fused kernels to use on a device type; None, after one warning where the user expects another, for
    none."""
    if backend == "auto":
        backend = {"cpu": "compiled", "cuda": "triton"}.get(device, "reference")
    if backend == "compiled":
        if device == "cpu":
            return compiled if compiled.library() is not None else None
        _warn(
            f'backend="compiled" runs on the CPU, not on {device}', 'Pass backend="auto" to take what fits the device.'
        )
    if backend == "triton":
        try:
            from . import triton
        except ImportError as error:
            _warn(
                f"Triton cannot be imported ({error})",
                'Install it (pip install triton), or pass backend="reference" to silence this.',
            )
            return None
        if triton.runs_on(device):
            return triton
        _warn(
            f"The Triton kernels do not run on {device} here",
            "They run on CUDA devices and, for tests, on the CPU in Triton's interpreter: set TRITON_INTERPRET=1 "
            "before "
            'Triton is imported for the one, unset it for the other. Pass backend="auto" to take what fits the device.',
        )
    return None


def _warn(problem: str, remedy: str) -> None:
    warnings.warn(f"{problem}; quantised activations fall back to the slow reference backend. {remedy}", stacklevel=4)
