"""The ops on CUDA devices in fused Triton kernels (`triton_kernels`). Not yet measured on a GPU.

Every kernel reads its input from memory once and writes codes, or reads codes and writes gradients; nothing else is
allocated but the token means of `encode_heads`, partial sums for parameters (`norm_backward`,
`prompt_attention_backward`) and two numbers a query (`attention_backward`). Float64, rows of more than 16384 values,
heads of more than 256 and attention whose mask wants a gradient are left to the reference, and so is max pooling;
softmax, batch normalisation and gated activations are the reference's with codes by the kernels here. On the CPU the
kernels run in Triton's interpreter, for tests: set TRITON_INTERPRET=1 before Triton is imported.
"""

import functools
import logging
import time

import torch
import triton
from torch import Tensor

from .. import codec
from . import reference
from . import triton_kernels as kernels


logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_SLOTS = 16384  # values of a row that a program holds in registers
_LEAST_DOT, _MAX_HEAD_SLOTS = 16, 256  # sizes of heads that `tl.dot` takes, and that fit beside their tiles
_SLOW_LAUNCH = 0.5  # seconds; a launch takes microseconds unless something is compiled


def runs_on(device: str) -> bool:
    """Whether the kernels run on devices of this type: CUDA, or the CPU in Triton's interpreter."""
    return kernels.INTERPRETED if device == "cpu" else device == "cuda" and not kernels.INTERPRETED


def _launch(kernel, grid, *args, **constants) -> None:
    start = time.perf_counter()
    with torch.cuda.device_of(args[0]):
        # without fused multiply-adds codes are the reference's, but for the order of sums
        kernel[grid](*args, **constants, enable_fp_fusion=False)
    seconds = time.perf_counter() - start
    if seconds > _SLOW_LAUNCH and not kernels.INTERPRETED:
        logger.warning(
            "Compiled and tuned the Triton kernel %s in %.1f s; kept in Triton's cache.", kernel.fn.__name__, seconds
        )


def _slots(count: int, group_size: int, prefix: str = "", least: int = 1) -> dict[str, int]:
    """How rows of ``count`` values in groups are laid out in a kernel, in at least ``least`` slots; see
    `triton_kernels`."""
    group_slots = max(triton.next_power_of_2(min(group_size, count)), least if group_size >= count else 1)
    slots = max(group_slots * triton.next_power_of_2(-(-count // group_size)), least)
    group = 0 if group_size >= count else group_size
    return {f"{prefix}GROUP": group, f"{prefix}GROUP_SLOTS": group_slots, f"{prefix}SLOTS": slots}


def _row_tiles(rows: int):
    return lambda meta: (triton.cdiv(rows, max(meta["TILE"] // meta["SLOTS"], 1)),)


def _fits(count: int, group_size: int) -> bool:
    return _slots(count, group_size)["SLOTS"] <= _MAX_SLOTS


def _words(seed: int | None) -> tuple[int, int]:
    """The two 32-bit words of a seed, as signed numbers: of one type to Triton, whatever the seed."""
    seed = seed or 0
    return tuple((seed >> shift & 0xFFFFFFFF ^ 1 << 31) - (1 << 31) for shift in (0, 32))


@functools.lru_cache(maxsize=1024)
def _table(
    values: tuple[float, ...], device: torch.device, thresholds: tuple[float, ...] = (), steps: int | None = None
):
    """``values`` on the device; after ``2 ** steps`` thresholds, infinite where there are none, if ``steps`` is
    given."""
    padding = () if steps is None else (torch.inf,) * (2**steps - len(thresholds))
    return torch.tensor((*thresholds, *padding, *values), dtype=torch.float32, device=device)


def _encode_values(x: Tensor, thresholds: list[float], values: list[float], bits: int, seed: int | None) -> Tensor:
    x = x.contiguous()
    packed = x.new_empty(codec.packed_width(x.numel(), bits), dtype=torch.uint8)
    steps = len(thresholds).bit_length()
    width = codec.packed_width(x.numel(), 1 if bits == 3 else bits)
    _launch(
        kernels.encode_values, lambda meta: (triton.cdiv(width, meta["BLOCK"]),),
        x, _table(tuple(values), x.device, tuple(thresholds), steps), packed, x.numel(), width, *_words(seed),
        STEPS=steps, STOCHASTIC=seed is not None, BITS=bits,
    )  # fmt: skip
    return packed


def encode_steps(x: Tensor, thresholds: list[float], codes: list[int], bits: int) -> Tensor:
    if x.dtype not in _DTYPES or not x.numel():
        return reference.encode_steps(x, thresholds, codes, bits)
    return _encode_values(x, thresholds, codes, bits, None)


def encode_levels(values: Tensor, levels: list[float], bits: int, seed: int) -> Tensor:
    if values.dtype not in _DTYPES or not values.numel():
        return reference.encode_levels(values, levels, bits, seed)
    return _encode_values(values, levels[1:-1], levels, bits, seed)


def scale_by_levels(grad: Tensor, packed: Tensor, levels: list[float], bits: int) -> Tensor:
    if grad.dtype not in _DTYPES or not grad.numel():
        return reference.scale_by_levels(grad, packed, levels, bits)
    grad = grad.contiguous()
    scaled = torch.empty_like(grad)
    _scale(grad, packed.contiguous(), levels, bits, scaled)
    return scaled


def scale_by_levels_(grad: Tensor, packed: Tensor, levels: list[float], bits: int) -> None:
    if grad.dtype not in _DTYPES or not grad.numel() or not grad.is_contiguous():
        reference.scale_by_levels_(grad, packed, levels, bits)
    else:
        _scale(grad, packed.contiguous(), levels, bits, grad)


def _scale(grad: Tensor, packed: Tensor, levels: list[float], bits: int, scaled: Tensor) -> None:
    """Write the gradient times the levels into ``scaled``, which may be ``grad``."""
    parts = 8 if bits == 3 else 8 // bits
    width = -(-grad.numel() // parts)
    _launch(
        kernels.scale_values, lambda meta: (triton.cdiv(width, meta["BLOCK"]),),
        grad, packed, _table(tuple(levels), grad.device), scaled, grad.numel(), width,
        PARTS=parts, BITS=bits,
    )  # fmt: skip


def _encode_rows(
    x: Tensor, norm: int, eps: float, columns: Tensor | None, mean: Tensor | None, bits: int, group_size: int,
    seed: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Code the rows of ``x`` (``[samples, heads, tokens, C]``, any strides): packed codes, scales and, of a norm,
    ``rstd``, a row each."""
    samples, heads, tokens, count = x.shape
    rows, groups = samples * heads * tokens, -(-count // group_size)
    packed = x.new_empty(rows, codec.packed_width(count, bits), dtype=torch.uint8)
    scales = x.new_empty(rows, codec.scales_width(count, group_size), dtype=torch.uint8)
    rstd = x.new_empty(rows if norm else 0, dtype=torch.float32)
    _launch(
        kernels.encode_rows, _row_tiles(rows),
        x, scales if mean is None else mean, scales if columns is None else columns, packed, scales, rstd,
        rows, count, groups, heads, tokens, *x.stride(), eps, *_words(seed),
        BITS=bits, **_slots(count, group_size), NORM=norm, BY_COLUMN=columns is not None, MEAN=mean is not None,
        STOCHASTIC=seed is not None,
    )  # fmt: skip
    return packed, scales, rstd


def encode_groups(x: Tensor, bits: int, group_size: int, seed: int | None) -> tuple[Tensor, Tensor]:
    if x.dtype not in _DTYPES or not x.numel() or not _fits(x.shape[1], group_size):
        return reference.encode_groups(x, bits, group_size, seed)
    return _encode_rows(x[None, None], 0, 0.0, None, None, bits, group_size, seed)[:2]


def decode_groups(
    packed: Tensor, scales: Tensor, bits: int, group_size: int, count: int, dtype: torch.dtype
) -> Tensor:
    rows = packed.shape[0]
    if dtype not in _DTYPES or not rows * count or not _fits(count, group_size):
        return reference.decode_groups(packed, scales, bits, group_size, count, dtype)
    values = packed.new_empty(rows, count, dtype=dtype)
    _launch(
        kernels.decode_rows, _row_tiles(rows),
        packed.contiguous(), scales.contiguous(), values, rows, count, -(-count // group_size),
        BITS=bits, **_slots(count, group_size),
    )  # fmt: skip
    return values


encode_roots = functools.partial(reference.encode_roots, encode=encode_groups)
encode_channels = functools.partial(reference.encode_channels, encode=encode_groups)
batch_norm_backward = functools.partial(reference.batch_norm_backward, decode=decode_groups)
softmax_backward = functools.partial(reference.softmax_backward, decode=decode_groups)
gated_backward = functools.partial(reference.gated_backward, decode=decode_groups)


def encode_norm(
    x: Tensor, eps: float, center: bool, by_column: bool, bits: int, group_size: int, seed: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.dtype not in _DTYPES or not x.numel() or not _fits(x.shape[-1], group_size):
        return reference.encode_norm(x, eps, center, by_column, bits, group_size, seed)
    x = x.reshape(-1, x.shape[-1])
    columns = codec.column_statistics(x, eps, center) if by_column else None
    coded = _encode_rows(x[None, None], 1 if center else 2, eps, columns, None, bits, group_size, seed)
    return *coded, x.new_empty(0, dtype=torch.bfloat16) if columns is None else columns


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
    rows, count = rstd.shape[0], grad.shape[-1]
    if grad.dtype not in _DTYPES or rstd.dtype != torch.float32 or not grad.numel() or not _fits(count, group_size):
        return reference.norm_backward(grad, packed, scales, rstd, columns, weight, center, bits, group_size, wanted)
    grad, packed, scales, rstd, columns = (t.contiguous() for t in (grad, packed, scales, rstd, columns))
    d_x = torch.empty_like(grad) if wanted[0] else grad.new_empty(0)
    summed = wanted[1] or wanted[2]
    programs = min(_programs(grad.device), rows)
    d_weight, d_bias = (grad.new_empty(programs if want else 0, count, dtype=torch.float32) for want in wanted[1:])
    _launch(
        kernels.norm_backward, (programs,) if summed else _row_tiles(rows),
        grad, packed, scales, rstd, columns, rstd if weight is None else weight.contiguous(), d_x, d_weight, d_bias,
        rows, count, -(-count // group_size),
        CENTER=center, BITS=bits, **_slots(count, group_size), BY_COLUMN=columns.numel() > 0,
        WEIGHTED=weight is not None, WANT_X=wanted[0], WANT_WEIGHT=wanted[1], WANT_BIAS=wanted[2],
    )  # fmt: skip
    d_weight, d_bias = (d.sum(0) if want else d.view(-1) for d, want in zip((d_weight, d_bias), wanted[1:]))
    return d_x, d_weight, d_bias


@functools.cache
def _programs(device: torch.device) -> int:
    """Programs that keep a device busy, where each takes many rows and leaves its own sums over them."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def encode_heads(
    x: Tensor, bits: int, group_size: int, center: bool, keep_mean: bool, seed: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    samples, heads, tokens, count = x.shape
    if x.dtype not in _DTYPES or not x.numel() or not _fits(count, group_size):
        return reference.encode_heads(x, bits, group_size, center, keep_mean, seed)
    mean = reference.finite_mean(x.mean(2, keepdim=True, dtype=torch.float32)).contiguous() if center else None
    packed, scales, _ = _encode_rows(x, 0, 0.0, None, mean, bits, group_size, seed)
    kept = mean if center and keep_mean else x.new_empty(0, dtype=torch.bfloat16)
    return packed.view(samples, heads, tokens, -1), scales.view(samples, heads, tokens, -1), kept


def _precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: as PyTorch's own."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


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
    samples, heads, length, value_dim = grad.shape
    keys = key[0].shape[2]
    q_slots, v_slots = (_slots(d, group_size, p, _LEAST_DOT) for d, p in ((dim, "Q_"), (value_dim, "V_")))
    wide = max(q_slots["Q_SLOTS"], v_slots["V_SLOTS"]) > _MAX_HEAD_SLOTS
    if grad.dtype not in _DTYPES or not grad.numel() * keys * dim or mask_wanted or wide:
        return reference.attention_backward(
            grad, query, key, value, mask, is_causal, scale, bits, group_size, dim, mask_wanted
        )
    d_query, d_key, d_value = (
        grad.new_empty(samples, n, heads, d).transpose(1, 2)
        for n, d in ((length, dim), (keys, dim), (keys, value_dim))
    )
    log_sums, deltas = (grad.new_empty(samples, heads, length, dtype=torch.float32) for _ in range(2))
    coded = [part.contiguous() if part.numel() else query[0] for x in (query, key, value) for part in x]
    kind, strides = 0, (0, 0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask.view(torch.uint8) if kind == 1 else mask
        strides = tuple(stride if size > 1 else 0 for stride, size in zip(mask.stride(), mask.shape))
    arguments = (
        heads, length, keys, scale, min(triton.next_power_of_2(max(length, keys)), 1024), *grad.stride(),
        *strides,
    )  # fmt: skip
    constants = {
        "BITS": bits, "Q_DIM": dim, **q_slots, "V_DIM": value_dim, **v_slots, "Q_MEAN": query[2].numel() > 0,
        "K_MEAN": key[2].numel() > 0, "V_MEAN": value[2].numel() > 0, "MASK": kind, "CAUSAL": is_causal,
        "PRECISION": _precision(grad.dtype),
    }  # fmt: skip
    _launch(
        kernels.attention_queries, lambda meta: (samples * heads * triton.cdiv(length, meta["QUERIES"]),),
        grad, *coded, query[0] if mask is None else mask, d_query, log_sums, deltas, *arguments, **constants,
    )  # fmt: skip
    _launch(
        kernels.attention_keys, lambda meta: (samples * heads * triton.cdiv(keys, meta["KEYS"]),),
        grad, *coded, query[0] if mask is None else mask, d_key, d_value, log_sums, deltas, *arguments, **constants,
    )  # fmt: skip
    return d_query, d_key, d_value, grad.new_empty(0, dtype=torch.float32)


def _prompt_slots(count: int, group_size: int, dim: int, value_dim: int) -> dict[str, int] | None:
    """How ``count`` prompts and heads are laid out; None where they are too large."""
    slots = {**_slots(dim, group_size, "Q_", _LEAST_DOT), **_slots(value_dim, value_dim, "V_", _LEAST_DOT)}
    slots["PROMPTS"] = max(triton.next_power_of_2(count), _LEAST_DOT)
    return slots if max(slots["Q_SLOTS"], slots["V_SLOTS"], slots["PROMPTS"]) <= _MAX_HEAD_SLOTS else None


def prompt_attention(
    attended: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scale: float
) -> Tensor:
    samples, heads, length, dim = query.shape
    count, value_dim = len(value), value.shape[1] // heads
    slots = _prompt_slots(count, dim, dim, value_dim)
    if query.dtype not in _DTYPES or attended.dtype not in _DTYPES or not attended.numel() * key.numel() or not slots:
        return reference.prompt_attention(attended, query, key, value, gate, scale)
    keys, values = reference.gated_prompts(key, value, gate, heads, query.dtype)
    out = torch.empty_like(attended, memory_format=torch.contiguous_format)
    _launch(
        kernels.prompt_attention, lambda meta: (samples * heads * triton.cdiv(length, meta["QUERIES"]),),
        attended.contiguous(), query, keys.contiguous(), values.contiguous(), out, samples, heads, length, count, scale,
        *query.stride(),
        Q_DIM=dim, Q_SLOTS=slots["Q_SLOTS"], V_DIM=value_dim, V_SLOTS=slots["V_SLOTS"], PROMPTS=slots["PROMPTS"],
        PRECISION=_precision(query.dtype),
    )  # fmt: skip
    return out


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
    samples, heads, length, _ = query[0].shape
    count, dim, value_dim = len(key), key.shape[1] // heads, value.shape[1] // heads
    slots = _prompt_slots(count, group_size, dim, value_dim)
    if grad.dtype not in _DTYPES or not grad.numel() * key.numel() or not slots:
        return reference.prompt_attention_backward(grad, query, key, value, gate, scale, bits, group_size)
    keys, values = reference.gated_prompts(key, value, gate, heads, grad.dtype)
    grad, packed, scales, mean = (part.contiguous() for part in (grad, *query))
    d_query = grad.new_empty(samples, length, heads * dim)
    shares = min(-(-_programs(grad.device) // heads), samples * length)  # programs a head
    d_key, d_value = (grad.new_empty(shares, heads, count, d, dtype=torch.float32) for d in (dim, value_dim))
    _launch(
        kernels.prompt_attention_backward, (shares * heads,),
        grad, packed, scales, mean if mean.numel() else packed, keys.contiguous(), values.contiguous(), d_query, d_key,
        d_value, samples, heads, length, count, scale,
        BITS=bits, Q_DIM=dim, V_DIM=value_dim, Q_MEAN=mean.numel() > 0, PRECISION=_precision(grad.dtype),
        **{name: size for name, size in slots.items() if name not in ("V_GROUP", "V_GROUP_SLOTS")},
    )  # fmt: skip
    return d_query, *reference.ungated_prompts(d_key.sum(0), d_value.sum(0), value, gate)
