"""For operators of this package that offer themselves to function modes as torch's own do."""

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from ...compat import is_function_mode_enabled


def is_overridden(tensors: tuple[Tensor, ...]) -> bool:
    # torch.compile's has_torch_function knows of subclasses of tensors only, not of modes
    return has_torch_function(tensors) or (torch.compiler.is_compiling() and is_function_mode_enabled())
