"""The two computations of S2A's structures that would keep full-precision tensors, stock and quantised.

The stock forms offer themselves to function modes as torch's own functions do, so that `interception.OperatorMode` replaces
them wherever a tuner's layer calls them inside a quantised module.
"""

import math

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import ops
from .functional import Quantizer, _encode_query, _recording, _refuse_double_backward


def gated_prompt_attention(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, num_heads: int) -> Tensor:
    """`tanh(gate) * softmax(q K_p^T / sqrt(d)) V_p`, per head (LLaMA-Adapter, Zhang et al. 2023, equations 4 to 8).

    Args:
        query: [..., tokens, num_heads * d].
        key, value: [prompts, num_heads * d].
        gate: [num_heads].
        num_heads: attention heads.

    Returns:
        [..., tokens, num_heads * d] in the dtype of `query`.
    """
    tensors = (query, key, value, gate)
    if has_torch_function(tensors):
        return handle_torch_function(gated_prompt_attention, tensors, query, key, value, gate, num_heads)
    return _prompt_attention(query, *_gated(query, key, value, gate, num_heads))


def quantized_prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, num_heads: int, *, quantizer: Quantizer
) -> Tensor:
    """`gated_prompt_attention`; keeps b-bit queries (and their mean over tokens), and recomputes the rest in backward."""
    if not _recording(query, key, value, gate):
        return _prompt_attention(query, *_gated(query, key, value, gate, num_heads))
    return _PromptAttention.apply(query, key, value, gate, num_heads, quantizer)


def _gated(like: Tensor, key: Tensor, value: Tensor, gate: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Keys and gated values, [num_heads, prompts, d] in the dtype of `like`."""
    key, value = (tokens.unflatten(-1, (num_heads, -1)).transpose(0, 1) for tokens in (key, value))
    return key.to(like.dtype), (value * gate.tanh()[:, None, None]).to(like.dtype)


def _with_heads(x: Tensor, num_heads: int) -> Tensor:
    """[..., tokens, heads * d] as [samples, heads, tokens, d]."""
    return x.reshape(-1, *x.shape[-2:]).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _prompt_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = _with_heads(query, len(key))
    scores = heads @ key.transpose(-1, -2) * heads.shape[-1] ** -0.5
    return (scores.softmax(-1) @ value).transpose(1, 2).reshape(query.shape)


class _PromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, gate, num_heads, quantizer):
        codes = _encode_query(_with_heads(query, num_heads), quantizer)
        ctx.save_for_backward(*codes, key, value, gate)
        ctx.quantizer, ctx.shape, ctx.dtype = quantizer, query.shape, query.dtype
        return _prompt_attention(query, *_gated(query, key, value, gate, num_heads))

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        packed, scales, mean, *parameters = ctx.saved_tensors
        heads = packed.shape[1]
        key, value = _gated(grad, *parameters, heads)
        dim = key.shape[-1]
        query = ops.decode_groups(
            packed.flatten(0, 2), scales.flatten(0, 2), ctx.quantizer.bits, ctx.quantizer.group_size, dim, grad.dtype,
            ctx.quantizer.backend,
        ).view(*packed.shape[:3], dim)  # fmt: skip
        if mean.numel():
            query += mean
        scale = 1 / math.sqrt(dim)
        grad = _with_heads(grad, heads)
        probabilities = (query @ key.transpose(-1, -2) * scale).softmax(-1)
        d_probabilities = grad @ value.transpose(-1, -2)
        d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, grad.dtype).mul_(scale)
        d_key = (d_scores.transpose(-1, -2) @ query).sum(0)
        d_value = (probabilities.transpose(-1, -2) @ grad).sum(0)
        d_query = None
        if ctx.needs_input_grad[0]:
            d_query = torch.matmul(d_scores, key).transpose(1, 2).reshape(ctx.shape).to(ctx.dtype)
        return d_query, *_ungated(d_key, d_value, *parameters), None, None


def _ungated(
    d_key: Tensor, d_value: Tensor, key: Tensor, value: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `_gated`'s arguments, from those of its results."""
    opening = gate.tanh()
    d_key, d_value = (d.transpose(0, 1).flatten(1) for d in (d_key.to(key.dtype), d_value.to(value.dtype)))
    d_gate = (d_value * value).sum(0).view(len(gate), -1).sum(1) * (1 - opening**2)
    return d_key, d_value * opening.repeat_interleave(value.shape[1] // len(gate)), d_gate.to(gate.dtype)


def add_low_rank(base: Tensor, hidden: Tensor, up: Tensor, scaling: float) -> Tensor:
    """`base + scaling * hidden @ up.T`, in one product that needs no room for the branch's output.

    Args:
        base: [..., width].
        hidden: [..., rank], dtype of `base`.
        up: [width, rank], dtype of `base`.
        scaling: a number.
    """
    tensors = (base, hidden, up)
    if has_torch_function(tensors):
        return handle_torch_function(add_low_rank, tensors, base, hidden, up, scaling)
    rows = base.reshape(-1, base.shape[-1])
    return torch.addmm(rows, hidden.reshape(-1, hidden.shape[-1]), up.t(), alpha=scaling).view(base.shape)


def quantized_add_low_rank(
    base: Tensor, hidden: Tensor, up: Tensor, scaling: float, *, quantizer: Quantizer
) -> Tensor:
    """`add_low_rank`; keeps b-bit `hidden` for the gradient of `up`."""
    if not _recording(base, hidden, up):
        return add_low_rank(base, hidden, up, scaling)
    return _AddLowRank.apply(base, hidden, up, scaling, quantizer)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, hidden, up, scaling, quantizer):
        kept = (None, None)
        if ctx.needs_input_grad[2]:
            rows = hidden.reshape(-1, hidden.shape[-1])
            kept = ops.encode_groups(
                rows, quantizer.bits, quantizer.group_size, quantizer.draw_seed(), quantizer.backend
            )
        ctx.save_for_backward(*kept, up)
        ctx.scaling, ctx.quantizer, ctx.hidden_shape = scaling, quantizer, hidden.shape
        return add_low_rank(base, hidden, up, scaling)

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        packed, scales, up = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        d_hidden = d_up = None
        if ctx.needs_input_grad[1]:
            d_hidden = (rows @ up).mul_(ctx.scaling).view(ctx.hidden_shape)
        if ctx.needs_input_grad[2]:
            hidden = ops.decode_groups(
                packed, scales, ctx.quantizer.bits, ctx.quantizer.group_size, up.shape[1], grad.dtype,
                ctx.quantizer.backend,
            )  # fmt: skip
            d_up = (rows.t() @ hidden).mul_(ctx.scaling)
        return grad, d_hidden, d_up, None, None
