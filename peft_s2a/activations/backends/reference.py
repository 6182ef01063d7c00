"""Every op in plain PyTorch: any device, the ground truth of the other backends. Written to be read, not to be fast.

Ops made of others take the backend's own as ``encode`` and ``decode`` (`encode_groups` and `decode_groups`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import codec
from ..activation_functions import activation_function
from ..levels import code_table
from . import attention


def encode_steps(x: Tensor, thresholds: list[float], codes: list[int], bits: int) -> Tensor:
    edges = torch.tensor(thresholds, dtype=codec.math_dtype(x.dtype), device=x.device)
    interval = torch.bucketize(_nan_first(x.to(edges.dtype).contiguous()), edges, out_int32=True)
    chosen = torch.tensor(codes, dtype=torch.uint8, device=x.device)[interval]
    return codec.pack(chosen.view(1, -1), bits).view(-1)


def _nan_first(x: Tensor) -> Tensor:
    """NaN as minus infinity: it lies above no threshold."""
    return torch.where(x.isnan(), -torch.inf, x)


def encode_levels(values: Tensor, levels: list[float], bits: int, seed: int) -> Tensor:
    table = torch.tensor(levels, dtype=codec.math_dtype(values.dtype), device=values.device)
    values = values.to(table.dtype).contiguous().view(-1)
    below = torch.bucketize(_nan_first(values), table[1:-1].contiguous(), out_int32=True)
    low, high = table[below], table[below + 1]
    fraction = (values - low) / torch.where(high > low, high - low, 1)
    codes = below + (codec.uniform(seed, values.numel(), values.device) < fraction)
    return codec.pack(codes.to(torch.uint8).view(1, -1), bits).view(-1)


def scale_by_levels(grad: Tensor, packed: Tensor, levels: list[float], bits: int) -> Tensor:
    table = torch.tensor(levels, dtype=codec.math_dtype(grad.dtype), device=grad.device)
    codes = codec.unpack(packed.view(1, -1), bits, grad.numel()).view(grad.shape)
    return (grad.contiguous() * table[codes.to(torch.int32)]).to(grad.dtype)


def scale_by_levels_(grad: Tensor, packed: Tensor, levels: list[float], bits: int) -> None:
    grad.copy_(scale_by_levels(grad, packed, levels, bits))


def encode_groups(x: Tensor, bits: int, group_size: int, seed: int | None) -> tuple[Tensor, Tensor]:
    return codec.encode_groups(x, bits, group_size, seed)


def decode_groups(
    packed: Tensor, scales: Tensor, bits: int, group_size: int, count: int, dtype: torch.dtype
) -> Tensor:
    return codec.decode_groups(packed, scales, bits, group_size, count, dtype)


def encode_roots(
    p: Tensor, bits: int, group_size: int, seed: int | None, encode: Callable | None = None
) -> tuple[Tensor, Tensor]:
    return (encode or codec.encode_groups)(p.sqrt(), bits, group_size, seed)


def encode_channels(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bits: int,
    group_size: int,
    seed: int | None,
    encode: Callable | None = None,
) -> tuple[Tensor, Tensor]:
    x_hat = (x.to(codec.math_dtype(x.dtype)) - mean[:, None]).mul_(rstd[:, None])
    return (encode or codec.encode_groups)(x_hat.flatten(1), bits, group_size, seed)


def encode_norm(
    x: Tensor, eps: float, center: bool, by_column: bool, bits: int, group_size: int, seed: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.reshape(-1, x.shape[-1])
    columns = codec.column_statistics(x, eps, center) if by_column else x.new_empty(0, dtype=torch.bfloat16)
    x = x.to(codec.math_dtype(x.dtype))
    if center:
        x = x - x.mean(1, keepdim=True)
    rstd = (x.square().mean(1) + eps).rsqrt()
    x_hat = x * rstd[:, None]
    if by_column:
        mean, deviation = columns.to(x.dtype)
        x_hat = (x_hat - mean) / deviation
    packed, scales = codec.encode_groups(x_hat, bits, group_size, seed)
    return packed, scales, rstd, columns


def norm_backward(
    grad: Tensor,
    packed: Tensor,
    scales: Tensor,
    rstd: Tensor,
    columns: Tensor,
    weight: Tensor | None,
    center: bool,
    bits: int,
    group_size: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = codec.math_dtype(grad.dtype)
    x_hat = codec.decode_groups(packed, scales, bits, group_size, grad.shape[-1], dtype)
    if columns.numel():
        mean, deviation = columns.to(dtype)
        x_hat = x_hat * deviation + mean
    dy = grad.reshape(-1, grad.shape[-1]).to(dtype)
    empty = grad.new_empty(0)
    d_input = d_weight = d_bias = empty
    if wanted[0]:
        g = dy if weight is None else dy * weight.to(dtype)
        d_x = g - x_hat * (g * x_hat).mean(1, keepdim=True)
        if center:
            d_x -= g.mean(1, keepdim=True)
        d_input = d_x.mul_(rstd[:, None].to(dtype)).to(grad.dtype).view(grad.shape)
    if wanted[1]:
        d_weight = (dy * x_hat).sum(0)
    if wanted[2]:
        d_bias = dy.sum(0)
    return d_input, d_weight, d_bias


def batch_norm_backward(
    grad: Tensor,
    packed: Tensor,
    scales: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    live: bool,
    bits: int,
    group_size: int,
    wanted: list[bool],
    decode: Callable | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = codec.math_dtype(grad.dtype)
    samples, channels, size = grad.shape
    x_hat = (decode or codec.decode_groups)(packed, scales, bits, group_size, channels * size, dtype).view(grad.shape)
    dy = grad.to(dtype)
    d_bias, d_weight = dy.sum((0, 2)), (dy * x_hat).sum((0, 2))
    d_input, empty = grad.new_empty(0), dy.new_empty(0)
    if wanted[0]:
        d_x = dy
        if live:
            d_x = dy - d_bias[:, None] / (samples * size)
            d_x -= x_hat.mul_(d_weight[:, None] / (samples * size))
        scale = rstd if weight is None else rstd * weight
        d_input = (d_x * scale[:, None]).to(grad.dtype)
    return d_input, d_weight if wanted[1] else empty, d_bias if wanted[2] else empty.clone()


def softmax_backward(
    grad: Tensor, packed: Tensor, scales: Tensor, bits: int, group_size: int, decode: Callable | None = None
) -> Tensor:
    dtype = codec.math_dtype(grad.dtype)
    p = (decode or codec.decode_groups)(packed, scales, bits, group_size, grad.shape[1], dtype).square_()
    p /= p.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)  # so that the gradient sums to zero
    return torch._softmax_backward_data(grad.to(dtype), p, -1, dtype).to(grad.dtype)


def gated_backward(
    grad: Tensor,
    gate: list[Tensor],
    up: list[Tensor],
    name: str,
    keys: list[str],
    values: list[float],
    bits: int,
    group_size: int,
    decode: Callable | None = None,
) -> tuple[Tensor, Tensor]:
    dtype, params = codec.math_dtype(grad.dtype), dict(zip(keys, values))
    gate, up = ((decode or codec.decode_groups)(*x, bits, group_size, grad.shape[1], dtype) for x in (gate, up))
    d_up = (grad * activation_function(name).forward(gate, **params)).to(grad.dtype)
    d_gate = up.mul_(_derivative(gate, name, params)).mul_(grad)
    return d_gate.to(grad.dtype), d_up


def _derivative(x: Tensor, name: str, params: dict[str, float]) -> Tensor:
    function = activation_function(name)
    if function.derivative is not None:
        return function.derivative_torch(x, **params)
    table = code_table(name, tuple(sorted(params.items())), 1, None, x.dtype == torch.float64)
    packed = encode_steps(x.flatten(), table.thresholds, table.codes, table.bits)
    return scale_by_levels(torch.ones_like(x).flatten(), packed, table.levels, table.bits).view(x.shape)


def max_pool2d(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    bits: int,
) -> tuple[Tensor, Tensor]:
    y, index = F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
    place = 0
    for d, position in zip((0, 1), (index // x.shape[-1], index % x.shape[-1])):
        start = torch.arange(y.shape[d - 2], device=x.device) * stride[d] - padding[d]
        position -= start.view(-1, *[1] * (1 - d))
        place = place * kernel_size[d] + position.div_(dilation[d], rounding_mode="floor")
    return y, codec.pack(place.to(torch.uint8).reshape(1, -1), bits).view(-1)


def max_pool2d_backward(
    grad: Tensor,
    packed: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    height: int,
    width: int,
    bits: int,
) -> Tensor:
    place = codec.unpack(packed.view(1, -1), bits, grad.numel()).view(grad.shape)
    index = 0
    for d, part in zip((0, 1), (place // kernel_size[1], place % kernel_size[1])):
        start = torch.arange(grad.shape[d - 2], device=grad.device) * stride[d] - padding[d]
        index = index * width + part.to(torch.int64).mul_(dilation[d]).add_(start.view(-1, *[1] * (1 - d)))
    d_x = grad.new_zeros(*grad.shape[:-2], height * width, dtype=codec.math_dtype(grad.dtype))
    d_x.scatter_add_(-1, index.flatten(-2), grad.flatten(-2).to(d_x.dtype))
    return d_x.view(*grad.shape[:-2], height, width).to(grad.dtype)


def finite_mean(mean: Tensor) -> Tensor:
    """A mean as `encode_heads` subtracts it, in bfloat16: 0 where it is not finite, for the sake of the other tokens."""
    mean = mean.to(torch.bfloat16)
    return torch.where(mean.isfinite(), mean, 0)


def encode_heads(
    x: Tensor, bits: int, group_size: int, center: bool, keep_mean: bool, seed: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    samples, heads, tokens, _ = x.shape
    x = x.to(codec.math_dtype(x.dtype))
    mean = x.new_empty(0, dtype=torch.bfloat16)
    if center and tokens:
        mean = finite_mean(x.mean(2, keepdim=True))
        x = x - mean
        mean = mean if keep_mean else mean.new_empty(0)
    packed, scales = codec.encode_groups(x.flatten(0, 2), bits, group_size, seed)
    shape = (samples, heads, tokens, -1)
    return packed.view(*shape[:3], packed.shape[1]), scales.view(*shape[:3], *scales.shape[1:]), mean


def attention_backward(
    grad: Tensor,
    query: list[Tensor],
    key: list[Tensor],
    value: list[Tensor],
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    bits: int,
    group_size: int,
    dim: int,
    mask_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    coded = (query, key, value)
    dims = (dim, dim, grad.shape[3])

    def decode(which: int, samples: slice, heads: slice) -> Tensor:
        packed, scales = (part[samples, heads] for part in coded[which][:2])
        mean = coded[which][2]
        flat = codec.decode_groups(
            packed.flatten(0, 2), scales.flatten(0, 2), bits, group_size, dims[which], codec.math_dtype(grad.dtype)
        )
        x = flat.view(*packed.shape[:3], dims[which])
        return x + mean[samples, heads] if mean.numel() else x

    shapes = tuple((*parts[0].shape[:3], d) for parts, d in zip(coded, dims))
    return attention.attention_backward(grad, decode, shapes, mask, is_causal, scale, mask_wanted)


def gated_prompts(key: Tensor, value: Tensor, gate: Tensor, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and gated values, ``[H, P, size]``."""
    key, value = (tokens.view(len(tokens), heads, -1).transpose(0, 1) for tokens in (key, value))
    return key.to(dtype), (value * gate.tanh()[:, None, None]).to(dtype)


def ungated_prompts(d_key: Tensor, d_value: Tensor, value: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gated_prompts`' keys, values and gate, from those of its results."""
    opening = gate.to(d_value.dtype).tanh()
    d_key, d_value = (d.transpose(0, 1).flatten(1) for d in (d_key, d_value))
    d_gate = (d_value * value).sum(0).view(len(gate), -1).sum(1) * (1 - opening**2)
    return d_key.contiguous(), d_value * opening.repeat_interleave(value.shape[1] // len(gate)), d_gate


def prompt_attention(
    attended: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scale: float
) -> Tensor:
    wide = codec.math_dtype(query.dtype)  # float16's scores may overflow
    key, value = (x.to(wide) for x in gated_prompts(key, value, gate, query.shape[1], query.dtype))
    scores = query.to(wide) @ key.transpose(-1, -2) * scale
    prompts = (scores.softmax(-1) @ value).transpose(1, 2)
    return (attended.to(wide) + prompts.reshape(attended.shape)).to(attended.dtype)


def prompt_attention_backward(
    grad: Tensor,
    query: list[Tensor],
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    scale: float,
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed, scales, mean = query
    samples, heads, tokens, _ = packed.shape
    dtype = codec.math_dtype(grad.dtype)
    keys, values = (x.to(dtype) for x in gated_prompts(key, value, gate, heads, grad.dtype))
    dim = keys.shape[-1]
    q = codec.decode_groups(packed.flatten(0, 2), scales.flatten(0, 2), bits, group_size, dim, dtype)
    q = q.view(samples, heads, tokens, dim)
    if mean.numel():
        q = q + mean
    d_out = grad.to(dtype).view(samples, tokens, heads, values.shape[-1]).transpose(1, 2)
    p = (q @ keys.transpose(-1, -2) * scale).softmax(-1)
    d_s = torch._softmax_backward_data(d_out @ values.transpose(-1, -2), p, -1, dtype).mul_(scale)
    d_query = (d_s @ keys).transpose(1, 2).flatten(2).to(grad.dtype)
    d_keys, d_values = (d_s.transpose(-1, -2) @ q).sum(0), (p.transpose(-1, -2) @ d_out).sum(0)
    return d_query, *ungated_prompts(d_keys, d_values, value.to(dtype), gate)
