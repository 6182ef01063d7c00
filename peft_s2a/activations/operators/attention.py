"""Scaled dot-product attention: codes of queries, keys and values."""

import functools
import math
import threading
import weakref
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import sharpness
from ..codec import math_dtype
from ..masks import Recipe
from ..quantizer import Quantizer
from .common import recording, refuse_double_backward, told_apart
from .registry import handles


_last_query = threading.local()


def encode_query(query: Tensor, quantizer: Quantizer) -> list[Tensor]:
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
            encode_query(_with_heads(query), quantizer),
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
        if sharpness.is_looking():
            of_logits = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
            sharpness.look(codes[0], codes[1], of_logits, quantizer.bits, quantizer.group_size, query.shape[-1])
        ctx.recipe, sources = recipe, [mask] if recipe is None else recipe.take_sources()
        ctx.save_for_backward(*codes[0], *codes[1], *codes[2], random_state, *sources)
        ctx.dropout_p, ctx.is_causal, ctx.scale, ctx.dim = dropout_p, is_causal, scale, query.shape[-1]
        ctx.quantizer = quantizer
        ctx.shapes = [x.shape for x in (query, key, value)]
        ctx.dtypes = [x.dtype for x in (query, key, value)]
        return out

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        saved = ctx.saved_tensors
        codes, random_state, sources = saved[:9], saved[9], saved[10:]
        mask = sources[0] if ctx.recipe is None else ctx.recipe.make(sources)
        if random_state is not None:
            return (*_replay(ctx, grad, codes, mask, random_state), None, None, None, None, None)
        mask_wanted = ctx.needs_input_grad[3]
        scale = 1 / math.sqrt(ctx.dim) if ctx.scale is None else ctx.scale
        additive = mask is not None and mask.dtype != torch.bool
        # of these the stock operator computes the composite form, with a softmax that rounds otherwise than the fused
        composite = len(ctx.shapes[0]) != 4 or ctx.dim != ctx.shapes[2][-1]
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
    """``x`` (``[..., N, D]``) with four dimensions."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x.flatten(0, -4)


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
    gets one. Dropout is replayed in backward from the kept state of the random generator, in one piece. With batch
    dimensions that broadcast against each other, or that a mask tells apart beyond the heads where there are more than
    one, this is the stock call in full precision.

    The token mean subtracted from queries, keys and values before coding is exact for any constant (see the derivation
    in the code) and removes the outlying channels that a shared scale would spend its codes on, as in SageAttention's
    smoothing of keys (Zhang et al. 2024).
    """
    tensors = (query, key, value)
    shared = attn_mask is None or attn_mask.dim() <= 3  # by all samples
    batched = (query.dim() <= 4 or shared) and len({x.shape[:-2] for x in tensors}) == 1
    if not recording(*tensors, attn_mask) or not batched:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    recipe = None if torch.compiler.is_compiling() else Recipe(attn_mask)
    return _Attention.apply(*told_apart(query, key, value), attn_mask, recipe, dropout_p, is_causal, scale, quantizer)


@handles(F.scaled_dot_product_attention)
def _attention(mode, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(repeats, dim=-3) for t in (key, value))
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        quantizer=mode.quantizer("attention", query.shape[-1]),
    )


def _open(function: FunctionType) -> FunctionType:
    """A copy of a composite function of `torch.nn.functional` that does not offer itself to function modes, so that
    the operators it consists of are."""
    body = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(function.__code__, body, function.__name__, function.__defaults__, function.__closure__)
    return functools.update_wrapper(copy, function)


_multi_head_attention_forward = _open(F.multi_head_attention_forward)


@handles(F.multi_head_attention_forward)
def _multi_head_attention(mode, *args, **kwargs):
    with mode:
        return _multi_head_attention_forward(*args, **kwargs)
