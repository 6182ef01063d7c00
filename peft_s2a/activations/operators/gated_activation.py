"""Gated activation functions (SwiGLU, GEGLU): codes of both factors."""

import torch
from torch import Tensor

from ..activation_functions import activation_function
from ..quantizer import Quantizer
from .common import encode_rows, recording, refuse_double_backward


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, name, params, quantizer, activated):
        ctx.activation, ctx.params, ctx.quantizer = name, params, quantizer
        ctx.dtypes = gate.dtype, up.dtype
        ctx.save_for_backward(
            *(part for x in (gate, up) for part in encode_rows(x.reshape(-1, x.shape[-1]), quantizer))
        )
        return (activation_function(name).forward(gate, **params) if activated is None else activated) * up

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        rows = grad.reshape(-1, grad.shape[-1])
        saved, quantizer = ctx.saved_tensors, ctx.quantizer
        function = ctx.activation, list(ctx.params), [float(value) for value in ctx.params.values()]
        settings = quantizer.bits, quantizer.group_size
        grads = quantizer.ops.gated_backward(rows, saved[:2], saved[2:], *function, *settings)
        d_gate, d_up = (d.view(grad.shape).to(dtype) for d, dtype in zip(grads, ctx.dtypes))
        return d_gate, d_up, None, None, None, None


def gated_activation(
    gate: Tensor, up: Tensor, name: str, *, activated: Tensor | None = None, quantizer: Quantizer, **params: float
) -> Tensor:
    """``f(gate) * up`` of gated MLPs (SwiGLU, GEGLU: Shazeer 2020), two tensors of one shape; keeps b-bit codes of
    both. ``activated``: f(gate), where it has been computed, without a gradient of its own.

    d gate = dy up f'(gate), d up = dy f(gate), with the decoded factors. Factors that broadcast run in full precision.
    """
    function = activation_function(name)
    if not recording(gate, up) or gate.shape != up.shape or gate.dim() == 0:
        return function.forward(gate, **params) * up
    return _GatedActivation.apply(gate, up, name, params, quantizer, activated)
