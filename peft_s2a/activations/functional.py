"""Operators that keep b-bit codes for backward instead of full-precision tensors.

Each computes the stock operator's result with the stock operator, keeps codes of what its *derivative* needs, and only does so
when autograd records and some input needs them; otherwise it is the stock call. Everything kept goes through
``ctx.save_for_backward``, so saved-tensor hooks, ``save_on_cpu`` and activation checkpointing see it. Double backward is
refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .activation_functions import activation_function
from .backends import BACKENDS
from .codec import WIDTHS
from .levels import CodeTable, code_table


ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class Quantizer:
    """How one operator is quantised.

    Attributes:
        bits: width of a code: 1, 2, 3, 4 or 8.
        group_size: values that share a scale, where the operator's codes have scales.
        rounding: "nearest", or "stochastic" (unbiased; seeded by torch's default CPU generator).
        center_attention: subtract their mean over tokens from queries, keys and values before coding them.
        levels: derivative levels of an activation function, ``2 ** bits`` numbers; None for the shipped ones.
        backend: "auto", "reference", "compiled" or "triton".
    """

    bits: int = 4
    group_size: int = 64
    rounding: str = "nearest"
    center_attention: bool = True
    levels: tuple[float, ...] | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (("bits", WIDTHS), ("rounding", ROUNDINGS), ("backend", BACKENDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, not {self.group_size!r}")
        if self.levels is not None:
            object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))
            if len(self.levels) != 2**self.bits or not all(map(math.isfinite, self.levels)):
                raise ValueError(
                    f"levels must be {2**self.bits} finite numbers at {self.bits} bits, not {self.levels}"
                )

    def draw_seed(self) -> Tensor | None:
        """A fresh seed for stochastic rounding, None for rounding to nearest."""
        if self.rounding == "nearest":
            return None
        return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device="cpu")


def _recording(*tensors: Tensor | None) -> bool:
    """Whether autograd records and some of the tensors needs a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward (create_graph=True) through quantised activations is not supported: their derivatives are kept "
            "as codes; use restore_activations(model) before taking higher-order gradients"
        )


def _memory_order(x: Tensor) -> list[int] | None:
    """The permutation of dimensions that makes a dense tensor contiguous; None where it is already."""
    if x.is_contiguous():
        return None
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda d: -strides[d])


def _flat(x: Tensor, order: list[int] | None) -> Tensor:
    return (x if order is None else x.permute(order)).reshape(-1)


def _unflat(flat: Tensor, shape: Sequence[int], order: list[int] | None) -> Tensor:
    if order is None:
        return flat.view(shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([shape[d] for d in order]).permute(inverse)


def _encode_derivative(x: Tensor, name: str, params: dict, table: CodeTable, quantizer: Quantizer) -> Tensor:
    """Codes of the derivative of activation function ``name`` at every value of ``x`` (1-D)."""
    function = activation_function(name)
    if quantizer.rounding == "stochastic" and function.derivative is not None:
        derivative = function.derivative_torch(x if x.dtype == torch.float64 else x.float(), **params)
        return ops.encode_levels(derivative, table.levels, table.bits, quantizer.draw_seed(), quantizer.backend)
    return ops.encode_steps(x, table.thresholds, table.codes, table.bits, quantizer.backend)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, name, params, table, quantizer, inplace):
        function = activation_function(name)
        ctx.order = _memory_order(x)
        ctx.table, ctx.backend = table, quantizer.backend
        ctx.save_for_backward(_encode_derivative(_flat(x, ctx.order), name, params, table, quantizer))
        if inplace:
            ctx.mark_dirty(x)
            return function.forward_(x, **params)
        return function.forward(x, **params)

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        (packed,) = ctx.saved_tensors
        flat = _flat(grad, ctx.order)
        d_x = ops.scale_by_levels(flat, packed, ctx.table.levels, ctx.table.bits, ctx.backend)
        return _unflat(d_x, grad.shape, ctx.order), None, None, None, None, None


def activation(x: Tensor, name: str, *, quantizer: Quantizer, inplace: bool = False, **params: float) -> Tensor:
    """Activation function ``name`` of ``x``; keeps ``quantizer.bits`` bits a value (1 bit, exact, if piecewise linear).

    Args:
        x: any shape, floating.
        name: a key of `activation_functions.ACTIVATION_FUNCTIONS`.
        inplace: write the result over ``x``. Only where nothing else reads ``x``; autograd raises if its old value was kept.
            Functions without an in-place form ignore it.
        params: the function's own parameters (``negative_slope``, ``alpha``, ...).

    Source: derivative codes as in S2A (arXiv:2503.08154) and fewbit (Novikov et al. 2022); see `levels` for the tables.
    """
    function = activation_function(name)
    inplace = inplace and function.forward_ is not None
    if not _recording(x):
        return (function.forward_ if inplace else function.forward)(x, **params)
    items = tuple(sorted(params.items()))
    table = code_table(name, items, quantizer.bits, quantizer.levels, x.dtype == torch.float64)
    return _Activation.apply(x, name, params, table, quantizer, inplace)


class _RowNorm(torch.autograd.Function):
    """LayerNorm and RMSNorm: the trailing dimensions are one row of ``count`` values."""

    @staticmethod
    def forward(ctx, x, weight, bias, normalized_shape, eps, center, quantizer):
        if center:
            y = F.layer_norm(x, normalized_shape, weight, bias, eps)
        else:
            y = F.rms_norm(x, normalized_shape, weight, eps)
        count = math.prod(normalized_shape)
        if eps is None:
            eps = torch.finfo(x.dtype).eps
        # a bias alone needs nothing kept
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            kept = ops.encode_norm(
                x.reshape(-1, count),
                eps,
                center,
                quantizer.bits,
                quantizer.group_size,
                quantizer.draw_seed(),
                quantizer.backend,
            )
        else:
            kept = (None, None, None)
        ctx.save_for_backward(*kept, weight)
        ctx.settings = (center, quantizer.bits, quantizer.group_size)
        ctx.backend, ctx.count, ctx.x_dtype = quantizer.backend, count, x.dtype
        ctx.parameter_like = [None if p is None else (p.shape, p.dtype) for p in (weight, bias)]
        return y

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        packed, scales, rstd, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        rows = grad.reshape(-1, ctx.count)
        if packed is None:
            d_x, d_weight, d_bias = None, None, rows.sum(0)
        else:
            flat_weight = None if weight is None else weight.reshape(-1)
            d_x, d_weight, d_bias = ops.norm_backward(
                rows, packed, scales, rstd, flat_weight, *ctx.settings, list(wanted), ctx.backend
            )
        if wanted[0]:
            d_x = d_x.view(grad.shape).to(ctx.x_dtype)
        d_parameters = [
            d.view(like[0]).to(like[1]) if want else None
            for d, like, want in zip((d_weight, d_bias), ctx.parameter_like, wanted[1:])
        ]
        return (d_x if wanted[0] else None, *d_parameters, None, None, None, None)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    quantizer: Quantizer,
) -> Tensor:
    """`torch.nn.functional.layer_norm`; keeps b-bit normalised values and one reciprocal deviation a row.

    Args: as the stock function. The gradients of ``weight`` and ``bias`` are computed from the codes when they are wanted.
    """
    if not _recording(x, weight, bias):
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    return _RowNorm.apply(x, weight, bias, tuple(normalized_shape), eps, True, quantizer)


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    quantizer: Quantizer,
) -> Tensor:
    """`torch.nn.functional.rms_norm`; keeps b-bit normalised values and one reciprocal root mean square a row."""
    if not _recording(x, weight):
        return F.rms_norm(x, normalized_shape, weight, eps)
    return _RowNorm.apply(x, weight, None, tuple(normalized_shape), eps, False, quantizer)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, is_causal, scale, quantizer):
        out = F.scaled_dot_product_attention(query, key, value, mask, 0.0, is_causal, scale=scale)
        # A constant added to all keys, or to all values, cancels in dS = P * (dP - rowsum(P * dP)), in dQ = dS K (the rows of
        # dS sum to zero) and in P: only the query's mean has to be kept.
        codes = [
            ops.encode_heads(
                _with_heads(x),
                quantizer.bits,
                quantizer.group_size,
                quantizer.center_attention,
                x is query,
                quantizer.draw_seed(),
                quantizer.backend,
            )
            for x in (query, key, value)
        ]
        ctx.save_for_backward(*codes[0], *codes[1], *codes[2], mask)
        ctx.is_causal, ctx.scale, ctx.dim = is_causal, scale, query.shape[-1]
        ctx.quantizer = quantizer
        ctx.shapes = [x.shape for x in (query, key, value)]
        ctx.dtypes = [x.dtype for x in (query, key, value)]
        return out

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        *codes, mask = ctx.saved_tensors
        mask_wanted = ctx.needs_input_grad[3]
        scale = 1 / math.sqrt(ctx.dim) if ctx.scale is None else ctx.scale
        *grads, d_mask = ops.attention_backward(
            _with_heads(grad),
            codes[0:3],
            codes[3:6],
            codes[6:9],
            None if mask is None else _with_heads(mask),
            ctx.is_causal,
            scale,
            ctx.quantizer.bits,
            ctx.quantizer.group_size,
            ctx.dim,
            mask_wanted,
            ctx.quantizer.backend,
        )
        grads = [
            d.reshape(shape).to(dtype) if wanted else None
            for d, shape, dtype, wanted in zip(grads, ctx.shapes, ctx.dtypes, ctx.needs_input_grad)
        ]
        return (*grads, d_mask.view(mask.shape).to(mask.dtype) if mask_wanted else None, None, None, None)


def _with_heads(x: Tensor) -> Tensor:
    """``x`` (``[..., N, D]``, up to four dimensions) with four."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    quantizer: Quantizer,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`; keeps b-bit queries, keys and values and recomputes the rest in
    backward, a few samples, heads or query rows at a time. Nothing of size L x S is kept; the mask is kept as a reference.

    Args: as the stock function, without grouped-query head counts. An additive ``attn_mask`` that needs a gradient gets one.
    With five or more dimensions, or batch dimensions that broadcast against each other, this is the stock call in full
    precision.

    The token mean subtracted from queries, keys and values before coding is exact for any constant (see the derivation in
    the code) and removes the outlying channels that a shared scale would spend its codes on, as in SageAttention's smoothing
    of keys (Zhang et al. 2024).
    """
    tensors = (query, key, value)
    batched = query.dim() <= 4 and len({x.shape[:-2] for x in tensors}) == 1
    if not _recording(*tensors, attn_mask) or not batched:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if dropout_p:
        raise NotImplementedError("dropout")
    return _Attention.apply(query, key, value, attn_mask, is_causal, scale, quantizer)
