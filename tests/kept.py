"""What autograd keeps for the backward pass, in tests of the claim that little is kept."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Kept:
    """Entered for a forward pass, notes what autograd keeps of it: each piece of memory once, and nothing that belongs to
    the modules and tensors in `given`.

    Attributes:
        tensors: The first tensor that was kept of each piece of memory.
    """

    def __init__(self, *given: nn.Module | Tensor) -> None:
        self._given: set[int] = set()
        for own in given:
            tensors = (*own.parameters(), *own.buffers()) if isinstance(own, nn.Module) else (own,)
            self._given.update(tensor.untyped_storage().data_ptr() for tensor in tensors)
        self._found: dict[int, Tensor] = {}
        self._hooks = saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._given:
            self._found.setdefault(place, tensor.detach())
        return tensor

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    @property
    def tensors(self) -> list[Tensor]:
        return list(self._found.values())

    @property
    def bytes_of(self) -> Counter[torch.dtype]:
        """Bytes of the pieces of memory, by the type of the first tensor kept of each."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.tensors:
            sizes[tensor.dtype] += tensor.untyped_storage().nbytes()
        return sizes

    @property
    def nbytes(self) -> int:
        return self.bytes_of.total()
