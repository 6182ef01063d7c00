"""What operators have in common: whether anything is kept at all, what is refused, codes of rows, orders of memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import compat
from ..quantizer import Quantizer


def recording(*tensors: Tensor | None) -> bool:
    """Whether autograd records and some of the tensors needs a gradient.

    Raises:
        RuntimeError: if it records under a transform of torch.func or forward-mode differentiation.
    """
    records = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if records and not torch.compiler.is_compiling():
        _refuse_transforms()
    return records


def _refuse_transforms() -> None:
    if compat.transform_in_force():
        raise RuntimeError(
            "transforms of torch.func (grad, vmap, vjp, jvp, ...) and forward-mode differentiation do not go through "
            "quantised activations, whose derivatives are kept as codes; use restore_activations(model) before them"
        )


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward (create_graph=True) through quantised activations is not supported: their derivatives "
            "are kept as codes; use restore_activations(model) before taking higher-order gradients"
        )


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of devices."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes with ``x``; None where it does not."""
    if not autocasts(x.device.type) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


def cast(dtype: torch.dtype | None, *tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None or dtype is None else t.to(dtype) for t in tensors]


def is_activation(x: object) -> bool:
    """Whether ``x`` is a tensor that was computed from something trained: neither a parameter nor a constant."""
    return isinstance(x, Tensor) and x.requires_grad and not x.is_leaf


def told_apart(*tensors: Tensor) -> list[Tensor]:
    """The tensors; under torch.compile, whose autograd functions refuse one tensor twice, with views for repetitions."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    return [x.view_as(x) if any(x is other for other in tensors[:i]) else x for i, x in enumerate(tensors)]


def encode_rows(rows: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    return quantizer.ops.encode_groups(rows, quantizer.bits, quantizer.group_size, quantizer.draw_seed())


def decode_rows(packed: Tensor, scales: Tensor, quantizer: Quantizer, count: int, dtype: torch.dtype) -> Tensor:
    return quantizer.ops.decode_groups(packed, scales, quantizer.bits, quantizer.group_size, count, dtype)


def not_a_view(result: Tensor) -> Tensor:
    """``result`` of a stock operator inside an autograd function as a tensor of its own, which whoever gets it may change
    in place: autograd refuses that for views made inside (of linear layers' results, for example)."""
    is_view = torch.compiler.is_compiling() or result._is_view()  # which a graph has no way to ask
    return torch.ops.aten._unsafe_view(result, result.shape) if is_view else result


def memory_order(x: Tensor) -> list[int] | None:
    """The permutation of dimensions that makes a dense tensor contiguous; None where it is already."""
    if x.is_contiguous():
        return None
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda d: -strides[d])


def ordered(x: Tensor, order: list[int] | None) -> Tensor:
    return x if order is None else x.permute(order)


def reordered(x: Tensor, order: list[int] | None) -> Tensor:
    """What `ordered` makes of the result, undone."""
    return x if order is None else x.permute(sorted(range(len(order)), key=order.__getitem__))


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def per_channel(x: Tensor | None, like: Tensor) -> Tensor | None:
    """``x`` (``[C]``) shaped to broadcast against ``like`` (``[B, C, ...]``)."""
    return None if x is None else x.view(1, -1, *[1] * (like.dim() - 2))


def not_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]
