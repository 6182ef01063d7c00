"""The output of a low-rank branch, added to what it stands beside: codes of the hidden values."""

import math

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from ..activation_functions import activation_function
from ..quantizer import Quantizer
from .common import decode_rows, encode_rows, ordered, recording, refuse_double_backward, reordered
from .offered import is_overridden
from .registry import handles


def add_low_rank(
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    scaling: float,
    activation: str | None = None,
    channels_first: bool = False,
) -> Tensor:
    """`base + scaling * U f(hidden)`, in one product that needs no room for the branch's output.

    Args:
        base: [..., width], or [batch, width, ...] with `channels_first`.
        hidden: [..., rank], or [batch, rank, ...].
        up: U, [width, rank], dtype of `base`.
        scaling: a number.
        activation: f, a key of `ACTIVATION_FUNCTIONS`; None: the identity.
        channels_first: which dimension holds the channels.
    """
    tensors = (base, hidden, up)
    if is_overridden(tensors):
        return handle_torch_function(
            add_low_rank, tensors, base, hidden, up, scaling, activation=activation, channels_first=channels_first
        )
    if activation is not None:
        hidden = activation_function(activation).forward(hidden)
    hidden = hidden.to(base.dtype)
    order = _channels_last(base) if channels_first else None
    base, hidden = ordered(base, order), ordered(hidden, order)
    if channels_first and order is None:
        y = torch.baddbmm(base.flatten(2), up.expand(base.shape[0], -1, -1), hidden.flatten(2), alpha=scaling)
    else:
        rows, hidden = (x.reshape(-1, x.shape[-1]) for x in (base, hidden))
        y = torch.addmm(rows, hidden, up.t(), alpha=scaling)
    # No view: models write into what a module returned, and autograd lets nobody write into a function's view.
    if order is None:
        return torch.ops.aten._unsafe_view(y, base.shape)
    y = reordered(y.view(base.shape), order)
    return torch.ops.aten._unsafe_view(y, y.shape)


def _channels_last(x: Tensor) -> list[int] | None:
    """The permutation of dimensions that makes a tensor in `torch.channels_last` contiguous; None for any other."""
    is_it = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return [0, 2, 3, 1] if is_it else None


def quantized_add_low_rank(
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    scaling: float,
    activation: str | None = None,
    channels_first: bool = False,
    *,
    quantizer: Quantizer,
) -> Tensor:
    """`add_low_rank`; keeps b-bit `hidden`, of which backward computes f and its derivative."""
    if not recording(base, hidden, up):
        return add_low_rank(base, hidden, up, scaling, activation, channels_first)
    return _AddLowRank.apply(base, hidden, up, scaling, activation, channels_first, quantizer)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, hidden, up, scaling, activation, channels_first, quantizer):
        kept = (None, None)
        if ctx.needs_input_grad[2] or (ctx.needs_input_grad[1] and activation is not None):
            kept = encode_rows(
                hidden.flatten(1) if channels_first else hidden.reshape(-1, hidden.shape[-1]), quantizer
            )
        ctx.save_for_backward(*kept, up)
        ctx.scaling, ctx.channels_first, ctx.quantizer = scaling, channels_first, quantizer
        ctx.function = None if activation is None else activation_function(activation)
        ctx.hidden_like = hidden.shape, hidden.dtype
        return add_low_rank(base, hidden, up, scaling, activation, channels_first)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        packed, scales, up = ctx.saved_tensors
        shape, dtype = ctx.hidden_like
        hidden = d_hidden = d_up = None
        if packed is not None:
            count = math.prod(shape[1:]) if ctx.channels_first else shape[-1]
            hidden = decode_rows(packed, scales, ctx.quantizer, count, grad.dtype)
        if ctx.channels_first:
            outer = grad.flatten(2)
            hidden = None if hidden is None else hidden.view(outer.shape[0], up.shape[1], outer.shape[2])
        else:
            outer = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            inner = up.t().expand(outer.shape[0], -1, -1).bmm(outer) if ctx.channels_first else outer @ up
            d_hidden = inner.mul_(ctx.scaling)
            if ctx.function is not None:
                d_hidden = ctx.function.gradient(d_hidden, hidden)
            d_hidden = d_hidden.view(shape).to(dtype)
        if ctx.needs_input_grad[2]:
            features = hidden if ctx.function is None else ctx.function.forward(hidden)
            if ctx.channels_first:
                d_up = outer.bmm(features.transpose(1, 2)).sum(0).mul_(ctx.scaling)
            else:
                d_up = (outer.t() @ features).mul_(ctx.scaling)
        return grad, d_hidden, d_up, None, None, None, None


@handles(add_low_rank)
def _add_low_rank(mode, base, hidden, up, scaling, activation=None, channels_first=False):
    quantizer = mode.quantizer("linear")
    return quantized_add_low_rank(base, hidden, up, scaling, activation, channels_first, quantizer=quantizer)
