"""Implementations of the ops declared in `peft_s2a.activations.ops`, one module a backend.

`reference` implements all of them in plain PyTorch, on any device; the others implement those that pay and are checked
against it.
"""

from types import ModuleType

import torch

from . import compiled, reference


BACKENDS = ("auto", "reference", "compiled", "triton")


def select(backend: str, device: torch.device, op: str) -> ModuleType:
    """The backend module that runs ``op`` on ``device`` when the user asked for ``backend``."""
    fused = {"cpu": compiled}.get(device.type) if backend in ("auto", "compiled") else None
    return fused if fused is not None and hasattr(fused, op) and fused.library() is not None else reference
