"""What is kept of a constant, such as an attention mask: what it was made of, where that takes less room, and otherwise
the constant itself.

The masks and position biases of window attention are as large as its scores, but are made of little: of a frozen
table, of numbers, of one mask for all samples. The weights of some convolutions are standardised in every call, from
parameters that exist in any case. While a module runs under `interception.OperatorMode`, `call` notes of
every tensor how it was made if that takes less room than the tensor, and `Recipe` repeats those steps in backward.
They are exact for any values, and no value is looked at. A tensor that was changed in place since, or made of one that
was, is kept as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from ..compat import TreeSpec, guard_or_false, tree_flatten, tree_unflatten


_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
# Functions whose results may be larger than what they are made of, whatever that is.
_ENLARGING = _SUMS | {Tensor.__getitem__, Tensor.expand, Tensor.repeat}
# Functions of constants: their results are constants. All are deterministic and none writes to its arguments.
FUNCTIONS = _ENLARGING | {
    torch.arange, torch.zeros, torch.ones, torch.full, torch.cat, torch.stack, torch.where, torch.meshgrid,
    Tensor.view, Tensor.view_as, Tensor.reshape, Tensor.reshape_as, torch.reshape,
    Tensor.permute, torch.permute, Tensor.transpose, torch.transpose,
    Tensor.contiguous, Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze, Tensor.flatten, torch.flatten,
    Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.long, Tensor.int, Tensor.bool, Tensor.type_as,
    torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__,
    Tensor.__eq__, Tensor.__ne__, Tensor.__lt__, Tensor.__le__, Tensor.__gt__, Tensor.__ge__, Tensor.__invert__,
    Tensor.eq, Tensor.ne, Tensor.lt, Tensor.le, Tensor.gt, Tensor.ge, torch.eq, torch.ne, torch.lt, torch.gt,
    Tensor.masked_fill, torch.masked_fill, Tensor.sigmoid, torch.sigmoid, nn.functional.interpolate,
}  # fmt: skip
# What `call_compiled` looks at: what masks and position biases end in.
COMPILED_FUNCTIONS = _SUMS | {Tensor.__getitem__, Tensor.contiguous}


def call_compiled(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`call` for `torch.compile`, one of `COMPILED_FUNCTIONS`: what is made of less is computed again in backward.

    A compiler weighs that by itself for operators that it fuses, which those that keep masks are not; so it is told, by
    a checkpoint around the one call.
    """
    result = function(*args, **kwargs)
    if kwargs or not isinstance(result, Tensor) or result.requires_grad:
        return result
    tensors = [x for x in args if isinstance(x, Tensor)]
    if function is Tensor.contiguous:
        again = not tensors[0].is_contiguous()  # what it is made of may itself be made again
    elif len(tensors) != 2:
        again = False
    else:
        again = guard_or_false(sum(_bytes(x) for x in tensors if not isinstance(x, nn.Parameter)) < _bytes(result))
    return checkpoint(function, *args, use_reentrant=False) if again else result


def _bytes(x: Tensor) -> Any:
    """`Tensor.nbytes`, which sizes that are symbols do not have."""
    return x.numel() * x.element_size()


@dataclass(frozen=True)
class _Made:
    """How a tensor was made: by a function, of ``leaves``, whose versions were ``versions``."""

    function: Callable[..., Tensor]
    leaves: list[Any]
    spec: TreeSpec
    versions: list[int | None]
    version: int  # of the tensor itself
    nbytes: int  # of what it was made of in the end, apart from parameters


_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def call(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``function(*args, **kwargs)``, one of `FUNCTIONS`; its result is noted if it is made of little."""
    result = function(*args, **kwargs)
    if not isinstance(result, Tensor) or result.requires_grad or result.is_inference():
        return result
    leaves, spec = tree_flatten((tuple(args), kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(tensor is result or tensor.is_inference() for tensor in tensors) or "out" in kwargs:
        return result
    sources = [made or tensor for tensor in tensors if (made := _how(tensor)) or not isinstance(tensor, nn.Parameter)]
    if function in _ENLARGING or not any(isinstance(source, Tensor) for source in sources):
        nbytes = sum(source.nbytes for source in sources)
        if nbytes < result.nbytes:
            versions = [leaf._version if isinstance(leaf, Tensor) else None for leaf in leaves]
            _made[result] = _Made(function, leaves, spec, versions, result._version, nbytes)
    return result


def _how(tensor: Tensor) -> _Made | None:
    """How ``tensor`` was made, if that is known and still gives the tensor."""
    made = _made.get(tensor)
    if made is None or made.version != tensor._version:
        return None
    unchanged = all(v is None or v == leaf._version for leaf, v in zip(made.leaves, made.versions))
    return made if unchanged else None


@dataclass(frozen=True)
class _Place:
    """Which of the sources, or which step's result."""

    index: int
    is_source: bool


class Recipe:
    """How to make a tensor again.

    Attributes:
        sources: what it is made of; to be kept, and passed to `make`.
    """

    def __init__(self, tensor: Tensor | None) -> None:
        self.sources: list[Tensor] = []
        self._steps: list[tuple[Callable[..., Tensor], list[Any], TreeSpec]] = []
        self._result = None if tensor is None else self._place(tensor, {})

    def _place(self, tensor: Tensor, known: dict[int, _Place]) -> _Place:
        if id(tensor) not in known:
            made = _how(tensor)
            if made is None:
                known[id(tensor)] = _Place(len(self.sources), True)
                self.sources.append(tensor)
            else:
                leaves = [self._place(leaf, known) if isinstance(leaf, Tensor) else leaf for leaf in made.leaves]
                known[id(tensor)] = _Place(len(self._steps), False)
                self._steps.append((made.function, leaves, made.spec))
        return known[id(tensor)]

    def take_sources(self) -> list[Tensor]:
        """The sources, which are then no longer held here."""
        sources, self.sources = self.sources, []
        return sources

    def make(self, sources: Sequence[Tensor]) -> Tensor | None:
        """The tensor, of its sources; None if it is a recipe for None."""
        if self._result is None:
            return None
        results: list[Tensor] = []

        def found(leaf: Any) -> Any:
            if not isinstance(leaf, _Place):
                return leaf
            return sources[leaf.index] if leaf.is_source else results[leaf.index]

        with torch.no_grad():
            for function, leaves, spec in self._steps:
                args, kwargs = tree_unflatten([found(leaf) for leaf in leaves], spec)
                results.append(function(*args, **kwargs))
        return found(self._result)
