"""Attention to prompts beside a layer's own: codes of the queries."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from ..backends import reference
from ..quantizer import Quantizer
from .attention import encode_query
from .common import recording, refuse_double_backward
from .offered import is_overridden
from .registry import handles


def add_prompt_attention(
    attended: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, num_heads: int
) -> Tensor:
    """`attended + tanh(gate) * softmax(q K_p^T / sqrt(d)) V_p`, per head (LLaMA-Adapter, Zhang et al. 2023, equations
    4 to 8).

    Args:
        attended: what the attention proper puts out, as many values as `query` in the same order.
        query: [..., tokens, num_heads * d].
        key, value: [prompts, num_heads * d].
        gate: [num_heads].
        num_heads: attention heads.

    Returns:
        Shape and dtype of `attended`.
    """
    tensors = (attended, query, key, value, gate)
    if is_overridden(tensors):
        return handle_torch_function(
            add_prompt_attention, tensors, attended, query, key, value, gate, num_heads=num_heads
        )
    heads = _with_heads(query, num_heads)
    return reference.prompt_attention(attended, heads, key, value, gate, _scale(heads))


def quantized_add_prompt_attention(
    attended: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, num_heads: int, *, quantizer: Quantizer
) -> Tensor:
    """`add_prompt_attention`; keeps b-bit queries (and their mean over tokens), and recomputes the rest in
    backward."""
    if not recording(attended, query, key, value, gate):
        return add_prompt_attention(attended, query, key, value, gate, num_heads)
    return _AddPromptAttention.apply(attended, query, key, value, gate, num_heads, quantizer)


def _with_heads(x: Tensor, num_heads: int) -> Tensor:
    """[..., tokens, heads * d] as [samples, heads, tokens, d]."""
    # reshaped as models do it, so that a compiler finds the query coded already
    x = x.reshape(*x.shape[:-1], -1, x.shape[-1] // num_heads)
    return (x if x.dim() == 4 else x.reshape(-1, *x.shape[-3:])).transpose(1, 2)


def _scale(heads: Tensor) -> float:
    return heads.shape[-1] ** -0.5


class _AddPromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attended, query, key, value, gate, num_heads, quantizer):
        heads = _with_heads(query, num_heads)
        ctx.save_for_backward(*encode_query(heads, quantizer), key, value, gate)
        ctx.quantizer, ctx.scale = quantizer, _scale(heads)
        ctx.query_like = query.shape, query.dtype
        rows = attended.reshape(heads.shape[0], heads.shape[2], -1)
        return quantizer.ops.prompt_attention(rows, heads, key, value, gate, ctx.scale).view(attended.shape)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        packed, scales, mean, *parameters = ctx.saved_tensors
        samples, _, tokens, _ = packed.shape
        shape, dtype = ctx.query_like
        d_query, *grads = ctx.quantizer.ops.prompt_attention_backward(
            grad.reshape(samples, tokens, -1), [packed, scales, mean], *parameters, ctx.scale, ctx.quantizer.bits,
            ctx.quantizer.group_size,
        )  # fmt: skip
        d_query = d_query.view(shape).to(dtype) if ctx.needs_input_grad[1] else None
        return grad, d_query, *(d.to(parameter.dtype) for d, parameter in zip(grads, parameters)), None, None


@handles(add_prompt_attention)
def _add_prompt_attention(mode, attended, query, key, value, gate, num_heads):
    quantizer = mode.quantizer("attention", query.shape[-1] // num_heads)
    return quantized_add_prompt_attention(attended, query, key, value, gate, num_heads, quantizer=quantizer)
