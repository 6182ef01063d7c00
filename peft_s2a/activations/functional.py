"""Operators that keep b-bit codes for backward instead of full-precision tensors.

Each computes the stock operator's result with the stock operator, keeps codes of what its *derivative* needs, and only
does so when autograd records and some input needs them; otherwise it is the stock call. Everything kept goes through
``ctx.save_for_backward``, so saved-tensor hooks, ``save_on_cpu`` and activation checkpointing see it. Double backward
is refused.
"""

import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import compat
from .activation_functions import activation_function
from .backends import BACKENDS
from .codec import LARGEST_GROUP, WIDTHS, math_dtype, pack, unpack
from .levels import CodeTable, code_table
from .masks import Recipe
from .ops import op_set, op_set_name


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
    group_size: int = 32
    rounding: str = "nearest"
    center_attention: bool = True
    levels: tuple[float, ...] | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (("bits", WIDTHS), ("rounding", ROUNDINGS), ("backend", BACKENDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        if not 1 <= self.group_size <= LARGEST_GROUP:
            raise ValueError(f"group_size must be between 1 and {LARGEST_GROUP}, not {self.group_size!r}")
        if self.levels is not None:
            object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))
            if len(self.levels) != 2**self.bits or not all(map(math.isfinite, self.levels)):
                raise ValueError(
                    f"levels must be {2**self.bits} finite numbers at {self.bits} bits, not {self.levels}"
                )

        object.__setattr__(self, "_op_set", op_set_name(self.backend))

    @property
    def ops(self):
        """The ops, as attributes, that ``backend`` stands for; see `ops.op_set`."""
        return getattr(torch.ops, self._op_set)

    def draw_seed(self) -> Tensor | None:
        """A fresh seed for stochastic rounding, None for rounding to nearest."""
        if self.rounding == "nearest":
            return None
        return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device="cpu")


def _recording(*tensors: Tensor | None) -> bool:
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


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes with ``x``; None where it does not."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward (create_graph=True) through quantised activations is not supported: their derivatives "
            "are kept as codes; use restore_activations(model) before taking higher-order gradients"
        )


def _not_a_view(result: Tensor) -> Tensor:
    """``result`` of a stock operator inside an autograd function as a tensor of its own, which whoever gets it may change
    in place: autograd refuses that for views made inside (of linear layers' results, for example)."""
    return torch.ops.aten._unsafe_view(result, result.shape) if result._is_view() else result


def _memory_order(x: Tensor) -> list[int] | None:
    """The permutation of dimensions that makes a dense tensor contiguous; None where it is already."""
    if x.is_contiguous():
        return None
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda d: -strides[d])


def _ordered(x: Tensor, order: list[int] | None) -> Tensor:
    return x if order is None else x.permute(order)


def _reordered(x: Tensor, order: list[int] | None) -> Tensor:
    """What `_ordered` makes of the result, undone."""
    return x if order is None else x.permute(sorted(range(len(order)), key=order.__getitem__))


def _encode_derivative(x: Tensor, name: str, params: dict, table: CodeTable, quantizer: Quantizer) -> Tensor:
    """Codes of the derivative of activation function ``name`` at every value of ``x``."""
    function = activation_function(name)
    if quantizer.rounding == "stochastic" and function.derivative is not None:
        derivative = function.derivative_torch(x if x.dtype == torch.float64 else x.float(), **params)
        return quantizer.ops.encode_levels(derivative, table.levels, table.bits, quantizer.draw_seed())
    return quantizer.ops.encode_steps(x, table.thresholds, table.codes, table.bits)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, name, params, table, quantizer, inplace, gate=None):
        function = activation_function(name)
        ctx.order = _memory_order(x)
        ctx.table, ctx.quantizer = table, quantizer
        ctx.save_for_backward(_encode_derivative(_ordered(x, ctx.order), name, params, table, quantizer))
        if gate is not None:
            return x * gate
        if inplace:
            ctx.mark_dirty(x)
            return function.forward_(x, **params)
        return function.forward(x, **params)

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        (packed,) = ctx.saved_tensors
        ordered = _ordered(grad, ctx.order)
        d_x = ctx.quantizer.ops.scale_by_levels(ordered, packed, ctx.table.levels, ctx.table.bits)
        return _reordered(d_x, ctx.order), None, None, None, None, None, None


def activation(x: Tensor, name: str, *, quantizer: Quantizer, inplace: bool = False, **params: float) -> Tensor:
    """Activation function ``name`` of ``x``; keeps ``quantizer.bits`` bits a value (1 bit, exact, if piecewise
    linear).

    Args:
        x: any shape, floating.
        name: a key of `activation_functions.ACTIVATION_FUNCTIONS`.
        inplace: write the result over ``x``. Only where nothing else reads ``x``; autograd raises if its old value was
            kept. Functions without an in-place form ignore it.
        params: the function's own parameters (``negative_slope``, ``alpha``, ...).

    Source: derivative codes as in S2A (arXiv:2503.08154) and fewbit (Novikov et al. 2022); see `levels` for the
    tables.
    """
    function = activation_function(name)
    inplace = inplace and function.forward_ is not None
    if not _recording(x):
        return (function.forward_ if inplace else function.forward)(x, **params)
    table = _code_table(x, name, params, quantizer)
    if inplace and torch.compiler.is_compiling():  # whose autograd functions cannot change their input
        return x.copy_(_Activation.apply(x, name, params, table, quantizer, False))
    return _Activation.apply(x, name, params, table, quantizer, inplace)


def _code_table(x: Tensor, name: str, params: dict[str, float], quantizer: Quantizer) -> CodeTable:
    items = tuple(sorted(params.items()))
    stochastic = quantizer.rounding == "stochastic"
    return code_table(name, items, quantizer.bits, quantizer.levels, x.dtype == torch.float64, stochastic)


def self_gated(x: Tensor, gate: Tensor, name: str, *, quantizer: Quantizer) -> Tensor:
    """``x * gate`` as a model writes activation function ``name``, SiLU or CLIP's QuickGELU, with ``gate = sigmoid(c * x)``
    without a gradient of its own. Keeps what `activation` does."""
    return _Activation.apply(x, name, {}, _code_table(x, name, {}, quantizer), quantizer, False, gate)


# rows from which on a norm's columns are standardised (bfloat16 mean and deviation each): there they weigh little
_ROWS_FOR_STATISTICS = 64


def _rows(x: Tensor, normalized_shape: Sequence[int]) -> Tensor:
    """``x`` with the trailing dimensions that are normalised as one."""
    return x if len(normalized_shape) == 1 else x.reshape(-1, math.prod(normalized_shape))


class _RowNorm(torch.autograd.Function):
    """LayerNorm and RMSNorm: the trailing dimensions are one row of ``count`` values."""

    @staticmethod
    def forward(ctx, x, weight, bias, normalized_shape, eps, center, quantizer, factor=None):
        if factor is not None:
            y = (x if weight is None else weight) * factor
        elif center:
            y = F.layer_norm(x, normalized_shape, weight, bias, eps)
        else:
            y = F.rms_norm(x, normalized_shape, weight, eps)
        count = math.prod(normalized_shape)
        if eps is None:
            eps = torch.finfo(x.dtype).eps
        # a bias alone needs nothing kept
        rows = _rows(x, normalized_shape)
        by_column = x.numel() >= count * _ROWS_FOR_STATISTICS
        group_size = count if by_column else quantizer.group_size
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            kept = quantizer.ops.encode_norm(
                rows, eps, center, by_column, quantizer.bits, group_size, quantizer.draw_seed()
            )
        else:
            kept = (None, None, None, None)
        ctx.save_for_backward(*kept, weight)
        ctx.settings = (center, quantizer.bits, group_size)
        ctx.quantizer, ctx.normalized_shape, ctx.x_dtype = quantizer, normalized_shape, x.dtype
        ctx.parameter_like = [None if p is None else (p.shape, p.dtype) for p in (weight, bias)]
        return y

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        packed, scales, rstd, columns, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        rows = _rows(grad, ctx.normalized_shape)
        if packed is None:
            d_x, d_weight, d_bias = None, None, rows.reshape(-1, rows.shape[-1]).sum(0)
        else:
            flat_weight = None if weight is None else weight.reshape(-1)
            d_x, d_weight, d_bias = ctx.quantizer.ops.norm_backward(
                rows, packed, scales, rstd, columns, flat_weight, *ctx.settings, list(wanted)
            )
        if wanted[0]:
            d_x = d_x.view(grad.shape).to(ctx.x_dtype)
        d_parameters = [
            d.view(like[0]).to(like[1]) if want else None
            for d, like, want in zip((d_weight, d_bias), ctx.parameter_like, wanted[1:])
        ]
        return (d_x if wanted[0] else None, *d_parameters, None, None, None, None, None)


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

    With 64 rows or more, the columns of the normalised values are standardised and each row shares one scale; with
    fewer rows there is a scale for every ``quantizer.group_size`` values. Our choice, for the outlying channels of
    transformers.

    Args: as the stock function. The gradients of ``weight`` and ``bias`` are computed from the codes when they are
    wanted.
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


def rms_normalized(
    x: Tensor, factor: Tensor, eps: float, weight: Tensor | None = None, *, quantizer: Quantizer
) -> Tensor:
    """RMSNorm over the last dimension as a model writes it: ``x * factor`` with ``factor = rsqrt(mean(x ** 2) + eps)``, or
    ``weight * factor`` with ``factor`` what is normalised already; without gradients of its own, either. Keeps what
    `rms_norm` does."""
    return _RowNorm.apply(x, weight, None, x.shape[-1:], eps, False, quantizer, factor)


_last_query = threading.local()


def _encode_query(query: Tensor, quantizer: Quantizer) -> list[Tensor]:
    """Codes of ``query`` (``[B, H, N, D]``) with its token mean; those made last, while they are kept and if they were
    made of the same memory. So the attention of a layer and the prompts it attends to beside keep one set of codes."""
    settings = quantizer.bits, quantizer.group_size, quantizer.center_attention, True
    if torch.compiler.is_compiling() or quantizer.rounding != "nearest":
        return list(quantizer.ops.encode_heads(query, *settings, quantizer.draw_seed()))
    storage = StorageWeakRef(query.untyped_storage())
    layout = query.shape, query.stride(), query.storage_offset(), query.dtype, query._version, quantizer
    last = getattr(_last_query, "value", None)
    if last is not None and last[0] == storage and not last[0].expired() and last[1] == layout:
        codes = [reference() for reference in last[2]]
        if all(code is not None for code in codes):
            return codes
    codes = list(quantizer.ops.encode_heads(query, *settings, None))
    _last_query.value = storage, layout, [weakref.ref(code) for code in codes]
    return codes


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, recipe, dropout_p, is_causal, scale, quantizer):
        # the random stream is kept, not the mask: backward draws the same mask again
        random_state = _random_state(query.device) if dropout_p else None
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, scale=scale)
        # A constant added to all keys, or to all values, cancels in dS = P * (dP - rowsum(P * dP)), in dQ = dS K (the
        # rows of dS sum to zero) and in P: only the query's mean has to be kept. With dropout the values' does not
        # cancel.
        codes = [
            _encode_query(_with_heads(query), quantizer),
            *(
                quantizer.ops.encode_heads(
                    _with_heads(x),
                    quantizer.bits,
                    quantizer.group_size,
                    quantizer.center_attention,
                    dropout_p > 0,
                    quantizer.draw_seed(),
                )
                for x in (key, value)
            ),
        ]
        ctx.recipe, sources = recipe, [mask] if recipe is None else recipe.take_sources()
        ctx.save_for_backward(*codes[0], *codes[1], *codes[2], random_state, *sources)
        ctx.dropout_p, ctx.is_causal, ctx.scale, ctx.dim = dropout_p, is_causal, scale, query.shape[-1]
        ctx.quantizer = quantizer
        ctx.shapes = [x.shape for x in (query, key, value)]
        ctx.dtypes = [x.dtype for x in (query, key, value)]
        return out

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        saved = ctx.saved_tensors
        codes, random_state, sources = saved[:9], saved[9], saved[10:]
        mask = sources[0] if ctx.recipe is None else ctx.recipe.make(sources)
        if random_state is not None:
            return (*_replay(ctx, grad, codes, mask, random_state), None, None, None, None, None)
        mask_wanted = ctx.needs_input_grad[3]
        scale = 1 / math.sqrt(ctx.dim) if ctx.scale is None else ctx.scale
        additive = mask is not None and mask.dtype != torch.bool
        # of these the stock operator computes the composite form, with a softmax that rounds otherwise than the fused
        composite = len(ctx.shapes[0]) < 4 or ctx.dim != ctx.shapes[2][-1]
        *grads, d_mask = ctx.quantizer.ops.attention_backward(
            _with_heads(grad),
            codes[0:3],
            codes[3:6],
            codes[6:9],
            _with_heads(mask.to(math_dtype(mask.dtype))) if additive else None if mask is None else _with_heads(mask),
            ctx.is_causal,
            scale,
            ctx.quantizer.bits,
            ctx.quantizer.group_size,
            ctx.dim,
            mask_wanted or (additive and composite),
        )
        grads = [
            d.reshape(shape).to(dtype) if wanted else None
            for d, shape, dtype, wanted in zip(grads, ctx.shapes, ctx.dtypes, ctx.needs_input_grad)
        ]
        d_mask = d_mask.view(mask.shape).to(mask.dtype) if mask_wanted else None
        return (*grads, d_mask, None, None, None, None, None)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _replay(ctx, grad: Tensor, codes: list[Tensor], mask: Tensor | None, random_state: Tensor) -> list[Tensor | None]:
    """Gradients of attention with dropout: the stock operator again, whole, on the decoded tensors and the same
    mask."""
    inputs = []
    for which, (shape, dtype) in enumerate(zip(ctx.shapes, ctx.dtypes)):
        packed, scales, mean = codes[3 * which : 3 * which + 3]
        settings = ctx.quantizer.bits, ctx.quantizer.group_size, shape[-1], dtype
        x = ctx.quantizer.ops.decode_groups(packed.flatten(0, 2), scales.flatten(0, 2), *settings)
        x = x.view(*packed.shape[:3], shape[-1])
        inputs.append((x.add_(mean) if mean.numel() else x).view(shape))
    inputs.append(mask)
    devices = [grad.device] if grad.is_cuda else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.cuda.set_rng_state(random_state, grad.device) if devices else torch.set_rng_state(random_state)
        inputs = [None if x is None else x.detach() for x in inputs]
        wanted = [x.requires_grad_() for x, want in zip(inputs, ctx.needs_input_grad) if want]
        out = F.scaled_dot_product_attention(*inputs, ctx.dropout_p, ctx.is_causal, scale=ctx.scale)
        grads = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype)))
    return [next(grads) if want else None for want in ctx.needs_input_grad[:4]]


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
    """`torch.nn.functional.scaled_dot_product_attention`; keeps b-bit queries, keys and values and recomputes the rest
    in backward, a few samples, heads or query rows at a time. Nothing of size L x S is kept, but the mask: as a
    reference, or as what it was made of if that is smaller (`masks`).

    Args: as the stock function, without grouped-query head counts. An additive ``attn_mask`` that needs a gradient
    gets one. Dropout is replayed in backward from the kept state of the random generator, in one piece. With five or
    more dimensions, or batch dimensions that broadcast against each other, this is the stock call in full precision.

    The token mean subtracted from queries, keys and values before coding is exact for any constant (see the derivation
    in the code) and removes the outlying channels that a shared scale would spend its codes on, as in SageAttention's
    smoothing of keys (Zhang et al. 2024).
    """
    tensors = (query, key, value)
    batched = query.dim() <= 4 and len({x.shape[:-2] for x in tensors}) == 1
    if not _recording(*tensors, attn_mask) or not batched:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    recipe = None if torch.compiler.is_compiling() else Recipe(attn_mask)
    return _Attention.apply(query, key, value, attn_mask, recipe, dropout_p, is_causal, scale, quantizer)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, quantizer):
        p = F.softmax(x, dim)
        rows = p.movedim(dim, -1)
        ctx.dim, ctx.dtype, ctx.quantizer = dim, x.dtype, quantizer
        # square roots: most probabilities are small, and an even grid would code them all as zero
        rows = rows.reshape(-1, rows.shape[-1])
        seed = quantizer.draw_seed()
        ctx.save_for_backward(*quantizer.ops.encode_roots(rows, quantizer.bits, quantizer.group_size, seed))
        return p

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        rows = grad.movedim(ctx.dim, -1)
        settings = ctx.quantizer.bits, ctx.quantizer.group_size
        d_x = ctx.quantizer.ops.softmax_backward(rows.reshape(-1, rows.shape[-1]), *ctx.saved_tensors, *settings)
        return d_x.view(rows.shape).movedim(-1, ctx.dim).to(ctx.dtype), None, None


def _encode_rows(rows: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    return quantizer.ops.encode_groups(rows, quantizer.bits, quantizer.group_size, quantizer.draw_seed())


def _decode_rows(packed: Tensor, scales: Tensor, quantizer: Quantizer, count: int, dtype: torch.dtype) -> Tensor:
    return quantizer.ops.decode_groups(packed, scales, quantizer.bits, quantizer.group_size, count, dtype)


def softmax(x: Tensor, dim: int, *, quantizer: Quantizer) -> Tensor:
    """`torch.nn.functional.softmax`; keeps b-bit square roots of the probabilities, in groups along ``dim``.

    dx = p (dy - sum(dy p)), with the decoded p scaled to sum to one. Coding the square root is our choice.
    """
    if not _recording(x) or x.dim() == 0:
        return F.softmax(x, dim)
    return _Softmax.apply(x, dim, quantizer)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, name, params, quantizer, activated):
        ctx.activation, ctx.params, ctx.quantizer = name, params, quantizer
        ctx.dtypes = gate.dtype, up.dtype
        ctx.save_for_backward(
            *(part for x in (gate, up) for part in _encode_rows(x.reshape(-1, x.shape[-1]), quantizer))
        )
        return (activation_function(name).forward(gate, **params) if activated is None else activated) * up

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
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
    if not _recording(gate, up) or gate.shape != up.shape or gate.dim() == 0:
        return function.forward(gate, **params) * up
    return _GatedActivation.apply(gate, up, name, params, quantizer, activated)


def _per_channel(x: Tensor | None, like: Tensor) -> Tensor | None:
    """``x`` (``[C]``) shaped to broadcast against ``like`` (``[B, C, ...]``)."""
    return None if x is None else x.view(1, -1, *[1] * (like.dim() - 2))


def _not_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps, quantizer):
        y = F.group_norm(x, num_groups, weight, bias, eps)
        kept = (None, None, None, None)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            rows = x.reshape(x.shape[0] * num_groups, -1)
            kept = quantizer.ops.encode_norm(
                rows, eps, True, False, quantizer.bits, quantizer.group_size, quantizer.draw_seed()
            )
        ctx.save_for_backward(*kept, weight)
        ctx.num_groups, ctx.quantizer, ctx.dtype = num_groups, quantizer, x.dtype
        ctx.parameter_dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        return y

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        packed, scales, rstd, columns, weight = ctx.saved_tensors
        quantizer, others = ctx.quantizer, _not_channels(grad)
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            g = grad if weight is None else grad * _per_channel(weight, grad).to(grad.dtype)
            d_x, _, _ = quantizer.ops.norm_backward(
                g.reshape(rstd.shape[0], -1), packed, scales, rstd, columns, None, True, quantizer.bits, quantizer.group_size,
                [True, False, False],
            )  # fmt: skip
            d_x = d_x.view(grad.shape).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            count = grad.numel() // max(rstd.shape[0], 1)
            x_hat = _decode_rows(packed, scales, quantizer, count, grad.dtype).view(grad.shape)
            d_weight = x_hat.mul_(grad).sum(others).to(ctx.parameter_dtypes[0])
        if ctx.needs_input_grad[2]:
            d_bias = grad.sum(others).to(ctx.parameter_dtypes[1])
        return d_x, d_weight, d_bias, None, None, None


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    quantizer: Quantizer,
) -> Tensor:
    """`torch.nn.functional.group_norm`; keeps b-bit normalised values and one reciprocal deviation a group."""
    if not _recording(x, weight, bias) or x.numel() == 0:
        return F.group_norm(x, num_groups, weight, bias, eps)
    return _GroupNorm.apply(x, weight, bias, num_groups, eps, quantizer)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, live, momentum, eps, quantizer):
        # what F.batch_norm calls; it gives the statistics besides
        y, mean, rstd, *_ = torch._batch_norm_impl_index(
            x, weight, bias, running_mean, running_var, live, momentum, eps, torch.backends.cudnn.enabled
        )
        if not live:
            mean, rstd = running_mean, (running_var.to(math_dtype(x.dtype)) + eps).rsqrt()
        codes = (None, None)
        # with frozen statistics dx = dy * weight * rstd needs nothing of x
        if ctx.needs_input_grad[1] or (live and ctx.needs_input_grad[0]):
            codes = quantizer.ops.encode_channels(
                x.flatten(2) if x.dim() > 2 else x.unsqueeze(2), mean, rstd, quantizer.bits, quantizer.group_size,
                quantizer.draw_seed(),
            )  # fmt: skip
        ctx.save_for_backward(*codes, rstd, weight)
        ctx.live, ctx.quantizer, ctx.dtype = live, quantizer, x.dtype
        ctx.parameter_dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        return y

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        packed, scales, rstd, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if packed is None:
            scale = rstd if weight is None else rstd * weight
            d_x = grad * _per_channel(scale, grad) if wanted[0] else None
            d_weight, d_bias = None, grad.sum(_not_channels(grad)) if wanted[2] else None
        else:
            rows = grad.flatten(2) if grad.dim() > 2 else grad.unsqueeze(2)
            settings = ctx.live, ctx.quantizer.bits, ctx.quantizer.group_size, list(wanted)
            d_x, d_weight, d_bias = ctx.quantizer.ops.batch_norm_backward(
                rows, packed, scales, rstd, weight, *settings
            )
        d_x = d_x.view(grad.shape).to(ctx.dtype) if wanted[0] else None
        d_parameters = (
            d.to(dtype) if want else None
            for d, dtype, want in zip((d_weight, d_bias), ctx.parameter_dtypes, wanted[1:])
        )
        return d_x, *d_parameters, None, None, None, None, None, None


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    quantizer: Quantizer,
) -> Tensor:
    """`torch.nn.functional.batch_norm`.

    With live statistics (``training``, or no running ones) keeps b-bit normalised values; with frozen statistics one
    number a channel, and the codes only if ``weight`` is trained.
    """
    live = training or running_mean is None
    refused = live and x.numel() == x.shape[1]  # one value a channel
    if not _recording(x, weight, bias) or x.numel() == 0 or refused:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return _BatchNorm.apply(x, weight, bias, running_mean, running_var, live, momentum, eps, quantizer)


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel_size, stride, padding, dilation, ceil_mode, quantizer):
        ctx.bits = next(bits for bits in WIDTHS if 2**bits >= kernel_size[0] * kernel_size[1])
        ctx.geometry, ctx.size, ctx.quantizer = (kernel_size, stride, padding, dilation), x.shape[-2:], quantizer
        y, packed = quantizer.ops.max_pool2d(x, *ctx.geometry, ceil_mode, ctx.bits)
        ctx.save_for_backward(packed)
        return y

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        d_x = ctx.quantizer.ops.max_pool2d_backward(grad, *ctx.saved_tensors, *ctx.geometry, *ctx.size, ctx.bits)
        return d_x, None, None, None, None, None, None


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def max_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    quantizer: Quantizer,
) -> Tensor:
    """`torch.nn.functional.max_pool2d`, exactly; keeps each maximum's place in its window, 2 bits for 2 x 2, 4 for 3 x
    3.

    Windows of more than 256 places run in full precision.
    """
    kernel, step = _pair(kernel_size), _pair(kernel_size if stride in (None, [], ()) else stride)
    if not _recording(x) or x.numel() == 0 or kernel[0] * kernel[1] > 256:
        return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    return _MaxPool2d.apply(x, kernel, step, _pair(padding), _pair(dilation), ceil_mode, quantizer)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        # the stock operator on ones draws the very mask it would draw for x
        noise = F.dropout(torch.ones_like(x), p)
        ctx.order, ctx.p = _memory_order(x), p
        ctx.save_for_backward(op_set("auto").encode_steps(_ordered(noise, ctx.order), (0.0,), (0, 1), 1))
        return noise * x  # selective checkpoints may keep the noise

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        (packed,) = ctx.saved_tensors
        d_x = op_set("auto").scale_by_levels(_ordered(grad, ctx.order), packed, (0.0, 1 / (1 - ctx.p)), 1)
        return _reordered(d_x, ctx.order), None


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """`torch.nn.functional.dropout` with the same random numbers; keeps one bit a value."""
    if not _recording(x) or not training or not 0 < p < 1:
        return F.dropout(x, p, training)
    return _Dropout.apply(x, p)


class _DropPath(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        keep = 1 - p
        kept = torch.rand(x.shape[0], dtype=x.dtype, device=x.device).add_(keep).floor_()
        ctx.keep, ctx.samples = keep, x.shape[0]
        ctx.save_for_backward(pack(kept.to(torch.uint8).view(1, -1), 1))
        return x.div(keep).mul_(kept.view(-1, *[1] * (x.dim() - 1)))

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        (packed,) = ctx.saved_tensors
        kept = unpack(packed, 1, ctx.samples).view(-1, *[1] * (grad.dim() - 1))
        return grad.div(ctx.keep).mul_(kept), None


def drop_path(x: Tensor, p: float = 0.0, training: bool = True) -> Tensor:
    """Stochastic depth (Huang et al. 2016): drops whole samples (first dimension), as the DropPath modules of
    `transformers` do, with the same random numbers; keeps one bit a sample."""
    if not training or p == 0:
        return x
    return _DropPath.apply(x, p)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, quantizer):
        y = _not_a_view(F.linear(x, weight, bias))
        codes = (None, None)
        if ctx.needs_input_grad[1]:
            codes = _encode_rows(x.reshape(-1, x.shape[-1]), quantizer)
        ctx.save_for_backward(*codes, weight if ctx.needs_input_grad[0] else None)
        ctx.quantizer, ctx.count = quantizer, x.shape[-1]
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        return y

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        packed, scales, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = (grad @ weight.to(grad.dtype)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            x = _decode_rows(packed, scales, ctx.quantizer, ctx.count, grad.dtype)
            d_weight = (rows.T @ x).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            d_bias = rows.sum(0).to(ctx.dtypes[2])
        return d_x, d_weight, d_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, quantizer: Quantizer) -> Tensor:
    """`torch.nn.functional.linear` whose trained weight (``[out, in]``) keeps b-bit inputs: dW = dy^T x with the
    decoded x."""
    if not _recording(x, weight, bias) or x.numel() == 0 or weight.dim() != 2:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, quantizer)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups, quantizer):
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        codes = _encode_rows(x.flatten(1), quantizer) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(*codes, weight)
        ctx.geometry = stride, padding, dilation, False, (0, 0), groups
        ctx.quantizer, ctx.shape = quantizer, x.shape
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        return y

    @staticmethod
    def backward(ctx, grad):
        _refuse_double_backward()
        packed, scales, weight = ctx.saved_tensors
        if packed is None:
            x = grad.new_empty(1).expand(ctx.shape)  # only its shape is read
        else:
            x = _decode_rows(packed, scales, ctx.quantizer, math.prod(ctx.shape[1:]), grad.dtype).view(ctx.shape)
        wanted = ctx.needs_input_grad[:3]
        bias_sizes = None if ctx.dtypes[2] is None else [weight.shape[0]]
        grads = torch.ops.aten.convolution_backward(
            grad, x, weight.to(grad.dtype), bias_sizes, *ctx.geometry, list(wanted)
        )
        grads = [d.to(dtype) if want else None for d, dtype, want in zip(grads, ctx.dtypes, wanted)]
        return (*grads, None, None, None, None, None)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    quantizer: Quantizer,
) -> Tensor:
    """`torch.nn.functional.conv2d` (input ``[B, C, H, W]``, padding in numbers) whose trained weight keeps b-bit
    inputs."""
    if not _recording(x, weight, bias) or x.numel() == 0 or x.dim() != 4 or isinstance(padding, str):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _Conv2d.apply(x, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups, quantizer)
