"""For operators of this package that offer themselves to function modes as torch's own do."""

import torch
from torch import Tensor
from torch.overrides import _is_torch_function_mode_enabled, has_torch_function


def is_overridden(tensors: tuple[Tensor, ...]) -> bool:
    # torch.compile's has_torch_function knows of subclasses of tensors only, not of modes
    return has_torch_function(tensors) or (torch.compiler.is_compiling() and _is_torch_function_mode_enabled())
