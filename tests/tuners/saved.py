"""What autograd keeps for backward, in tests of the claim that little is kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def saved_tensors(run: Callable[[], torch.Tensor], model: nn.Module) -> list[torch.Tensor]:
    """The tensors kept for the backward pass of what `run` computes, except parameters, buffers and views of them."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return list(kept.values())
