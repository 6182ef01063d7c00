"""What the package uses of torch, peft and transformers that these do not promise to keep, in one place.

Checked against torch 2.13.0, peft 0.21.2 and transformers 5.23.0.
"""

from __future__ import annotations

from torch.nn.modules import module as torch_module


def has_global_module_hooks() -> bool:
    """Whether a hook on the calls of all modules has been registered, `torch.nn.modules.module.register_module_*`."""
    return torch_module._has_any_global_hook()
