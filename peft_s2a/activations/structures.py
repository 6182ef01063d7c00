"""The two computations of S2A's structures that would keep full-precision tensors, stock and quantised.

The stock forms offer themselves to function modes as torch's own functions do, so that `interception.OperatorMode`
replaces them wherever a tuner's layer calls them inside a quantised module.
"""

import torch
from torch import Tensor
from torch.overrides import _is_torch_function_mode_enabled, handle_torch_function, has_torch_function

from .activation_functions import activation_function
from .backends import reference
from .functional import Quantizer, _encode_query, _recording, _refuse_double_backward


def _is_overridden(tensors: tuple[Tensor, ...]) -> bool:
    # torch.compile's has_torch_function knows of subclasses of tensors only, not of modes
    return has_torch_function(tensors) or (torch.compiler.is_compiling() and _is_torch_function_mode_enabled())


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
    if _is_overridden(tensors):
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
    if not _recording(attended, query, key, value, gate):
        return add_prompt_attention(attended, query, key, value, gate, num_heads)
    return _AddPromptAttention.apply(attended, query, key, value, gate, num_heads, quantizer)


def _with_heads(x: Tensor, num_heads: int) -> Tensor:
    """[..., tokens, heads * d] as [samples, heads, tokens, d]."""
    tokens, width = x.shape[-2:]
    return x.reshape(-1, tokens, num_heads, width // num_heads).transpose(1, 2)


def _scale(heads: Tensor) -> float:
    return heads.shape[-1] ** -0.5


class _AddPromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attended, query, key, value, gate, num_heads, quantizer):
        heads = _with_heads(query, num_heads)
        ctx.save_for_backward(*_encode_query(heads, quantizer), key, value, gate)
        ctx.quantizer, ctx.scale = quantizer, _scale(heads)
        ctx.query_like = query.shape, query.dtype
        rows = attended.reshape(heads.shape[0], heads.shape[2], -1)
        return quantizer.ops.prompt_attention(rows, heads, key, value, gate, ctx.scale).view(attended.shape)

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        packed, scales, mean, *parameters = ctx.saved_tensors
        samples, _, tokens, _ = packed.shape
        shape, dtype = ctx.query_like
        d_query, *grads = ctx.quantizer.ops.prompt_attention_backward(
            grad.reshape(samples, tokens, -1), [packed, scales, mean], *parameters, ctx.scale, ctx.quantizer.bits,
            ctx.quantizer.group_size,
        )  # fmt: skip
        d_query = d_query.view(shape).to(dtype) if ctx.needs_input_grad[1] else None
        return grad, d_query, *(d.to(parameter.dtype) for d, parameter in zip(grads, parameters)), None, None


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
    if _is_overridden(tensors):
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
    if not _recording(base, hidden, up):
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
        _refuse_double_backward()
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
