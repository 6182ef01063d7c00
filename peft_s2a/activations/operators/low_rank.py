"""The output of a low-rank branch, added to what it stands beside: codes of the hidden values."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from ..activation_functions import activation_function
from ..quantizer import Quantizer
from .common import recording, refuse_double_backward
from .offered import is_overridden
from .registry import handles


def add_low_rank(base: Tensor, hidden: Tensor, up: Tensor, scaling: float, activation: str | None = None) -> Tensor:
    """`base + scaling * f(hidden) @ up.T`, in one product that needs no room for the branch's output.

    Args:
        base: [..., width].
        hidden: [..., rank].
        up: [width, rank], dtype of `base`.
        scaling: a number.
        activation: f, a key of `ACTIVATION_FUNCTIONS`; None: the identity.
    """
    tensors = (base, hidden, up)
    if is_overridden(tensors):
        return handle_torch_function(add_low_rank, tensors, base, hidden, up, scaling=scaling, activation=activation)
    if activation is not None:
        hidden = activation_function(activation).forward(hidden)
    rows, hidden = (x.reshape(-1, x.shape[-1]) for x in (base, hidden.to(base.dtype)))
    # No view: models write into what a module returned, and autograd lets nobody write into a function's view.
    return torch.ops.aten._unsafe_view(torch.addmm(rows, hidden, up.t(), alpha=scaling), base.shape)


def quantized_add_low_rank(
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    scaling: float,
    activation: str | None = None,
    *,
    quantizer: Quantizer,
) -> Tensor:
    """`add_low_rank`; keeps b-bit `hidden`, of which backward computes f and its derivative."""
    if not recording(base, hidden, up):
        return add_low_rank(base, hidden, up, scaling, activation)
    return _AddLowRank.apply(base, hidden, up, scaling, activation, quantizer)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, hidden, up, scaling, activation, quantizer):
        kept = (None, None)
        if ctx.needs_input_grad[2] or (ctx.needs_input_grad[1] and activation is not None):
            rows = hidden.reshape(-1, hidden.shape[-1])
            kept = quantizer.ops.encode_groups(rows, quantizer.bits, quantizer.group_size, quantizer.draw_seed())
        ctx.save_for_backward(*kept, up)
        ctx.scaling, ctx.activation, ctx.quantizer = scaling, activation, quantizer
        ctx.hidden_like = hidden.shape, hidden.dtype
        return add_low_rank(base, hidden, up, scaling, activation)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        packed, scales, up = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        function = None if ctx.activation is None else activation_function(ctx.activation)
        hidden = d_hidden = d_up = None
        if packed is not None:
            hidden = ctx.quantizer.ops.decode_groups(
                packed, scales, ctx.quantizer.bits, ctx.quantizer.group_size, up.shape[1], grad.dtype
            )  # fmt: skip
        if ctx.needs_input_grad[1]:
            d_hidden = (rows @ up).mul_(ctx.scaling)
            if function is not None:
                d_hidden = function.gradient(d_hidden, hidden)
            shape, dtype = ctx.hidden_like
            d_hidden = d_hidden.view(shape).to(dtype)
        if ctx.needs_input_grad[2]:
            d_up = (rows.t() @ (hidden if function is None else function.forward(hidden))).mul_(ctx.scaling)
        return grad, d_hidden, d_up, None, None, None


@handles(add_low_rank)
def _add_low_rank(mode, base, hidden, up, scaling, activation=None):
    return quantized_add_low_rank(base, hidden, up, scaling, activation, quantizer=mode.quantizer("linear"))
