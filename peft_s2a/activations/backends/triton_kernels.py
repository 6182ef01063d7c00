"""The Triton kernels behind `triton.py`. Not yet measured on a GPU.

Rows. Kernels on rows of ``count`` values hold whole rows in registers, ``ROWS`` of them at a time, in ``SLOTS`` slots
each: group ``g`` of ``GROUP`` values takes the ``GROUP_SLOTS`` slots (a power of two) from ``g * GROUP_SLOTS`` on, so
that groups of any size are reduced and broadcast by reshaping. ``GROUP`` is 0 where one group is the whole row.
Arithmetic is in float32, whatever is loaded.

Sizes that change with the batch are no tuning key, and of them only whether they are multiples of 16 is specialised
on, where it widens loads: a smaller last batch tunes nothing, and compiles nothing at the widths of real models.
"""

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


# Whether these kernels, and those of Triton's own library that they call, run in the interpreter.
INTERPRETED = triton.knobs.runtime.interpret and isinstance(tl.sum, InterpretedFunction)


def _seconds(call, quantiles) -> list[float]:
    """Time of a kernel, for the autotuner: `triton.testing.do_bench` allocates 256 MB to flush the caches, which a
    program that counts its bytes may not have."""
    call()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return torch.tensor(times).quantile(torch.tensor(quantiles)).tolist()


def _tuned(key: list[str], *configs: triton.Config):
    """Autotuning over ``configs`` for every ``key`` (and dtype), kept on disk; the first alone in the interpreter."""
    return triton.autotune(
        list(configs[:1] if INTERPRETED else configs), key=key, do_bench=_seconds, cache_results=True
    )


def _config(warps: int, stages: int = 2, **sizes: int) -> triton.Config:
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


_BLOCKS = (_config(4, BLOCK=1024), _config(4, BLOCK=512), _config(8, BLOCK=2048))
_TILES = (_config(4, TILE=2048), _config(4, TILE=1024), _config(8, TILE=4096), _config(16, TILE=8192))


# ---- random numbers: `codec.uniform`


@triton.jit
def _hash(x):
    x = x ^ (x >> 16)
    x = tl.mul(x, 0x7FEB352D, sanitize_overflow=False)
    x = x ^ (x >> 15)
    x = tl.mul(x, 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def _uniform(position, seed_low, seed_high):
    """`codec.uniform` at ``position``; the seed's words are int32 scalars."""
    mixed = tl.add(position.to(tl.uint32), seed_low.to(tl.uint32), sanitize_overflow=False)
    mixed = _hash(_hash(mixed) ^ seed_high.to(tl.uint32))
    return (mixed >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2 ** -24


# ---- the bounds of groups: `codec._encode_bounds`, `codec._decode_bounds`


@triton.jit
def _power_of_two(exponent):
    """The unit behind its byte (int32): the exponent of a float32; 0 for 0."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _multiple(bound, unit):
    """``bound`` as a whole number of units, to nearest, of two equally near ones the even one."""
    times = tl.div_rn(bound, tl.where(unit == 0, 1.0, unit))
    times = tl.minimum(tl.maximum(times, -127.0), 127.0)
    return ((times + 12582912.0) - 12582912.0).to(tl.int32)  # 1.5 * 2 ** 23: no fraction fits beside it


@triton.jit
def _low_and_step(low, high, BITS: tl.constexpr):
    """Minimum and step, in units, of groups from ``low`` to ``high`` units (int32); NaN for those that are not finite."""
    step = tl.div_rn((high - low).to(tl.float32), ((1 << BITS) - 1) * 1.0)
    return tl.where(low == -128, float("nan"), low.to(tl.float32)), step


@triton.jit
def _scales_width(groups):
    """`codec.scales_width`."""
    return (groups + 3) // 4 + 2 * groups


@triton.jit
def _load_scales(scales, group, mask, groups, BITS: tl.constexpr):
    """Minimum and step, in units, and unit of ``group`` in the rows of ``groups`` at ``scales``, where ``mask``."""
    bounds = scales + (groups + 3) // 4 + group
    exponent = tl.load(scales + group // 4, mask=mask, other=0).to(tl.int32)
    low = tl.load(bounds, mask=mask, other=0).to(tl.int32)
    high = tl.load(bounds + groups, mask=mask, other=0).to(tl.int32)
    low, step = _low_and_step((low ^ 128) - 128, (high ^ 128) - 128, BITS)
    return low, step, _power_of_two(exponent)


# ---- rows in slots


@triton.jit
def _elements(count, GROUP: tl.constexpr, GROUP_SLOTS: tl.constexpr, SLOTS: tl.constexpr):
    """The element of a row in every slot, and which slots hold one."""
    slot = tl.arange(0, SLOTS)
    within = slot % GROUP_SLOTS
    element = slot // GROUP_SLOTS * GROUP + within
    inside = element < count
    if GROUP != 0:
        inside = inside & (within < GROUP)
    return element, inside


@triton.jit
def _group_mask(count, GROUP: tl.constexpr, GROUP_SLOTS: tl.constexpr, SLOTS: tl.constexpr):
    """The groups of a row in slots, and which of them there are."""
    group = tl.arange(0, SLOTS // GROUP_SLOTS)
    return group, group * GROUP < count


@triton.jit
def _row_width(count, BITS: tl.constexpr):
    """`codec.packed_width`."""
    if BITS == 3:
        return (count + 3) // 4 + (count + 7) // 8
    else:
        return (count + 8 // BITS - 1) // (8 // BITS)


@triton.jit
def _plane(packed, element, mask, width, BITS: tl.constexpr):
    """The ``BITS`` bits of every element in a row of ``width`` bytes at ``packed``, where ``mask``."""
    if BITS == 8:
        return tl.load(packed + element, mask=mask, other=0).to(tl.int32)
    else:
        part = tl.zeros_like(element)
        for start in tl.static_range(1, 8 // BITS):
            part += (element >= start * width).to(part.dtype)
        byte = tl.load(packed + (element - part * width), mask=mask, other=0).to(tl.int32)
        return (byte >> (part * BITS).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def _unpack(packed, element, mask, count, BITS: tl.constexpr):
    """The codes (int32) of ``element`` in the rows of ``count`` codes at ``packed``, where ``mask``:
    `codec.unpack`."""
    if BITS == 3:
        low_width = _row_width(count, 2)
        low = _plane(packed, element, mask, low_width, 2)
        high = _plane(packed + low_width, element, mask, _row_width(count, 1), 1)
        return low | (high << 2)
    else:
        return _plane(packed, element, mask, _row_width(count, BITS), BITS)


@triton.jit
def _decode(
    packed, scales, mean, row, present, count, groups, BITS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_SLOTS: tl.constexpr, SLOTS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """The values (float32 ``[len(row), SLOTS]``, 0 in empty slots) of the rows ``row`` (int64) where ``present``;
    plus, with ``MEAN``, the row at ``mean``."""
    ROWS: tl.constexpr = row.shape[0]
    packed += row * _row_width(count, BITS)
    scales += row * _scales_width(groups)
    element, inside = _elements(count, GROUP, GROUP_SLOTS, SLOTS)
    mask = present[:, None] & inside[None, :]
    elements = tl.broadcast_to(element[None, :], (ROWS, SLOTS))
    codes = _unpack(packed[:, None], elements, mask, count, BITS)

    group, there = _group_mask(count, GROUP, GROUP_SLOTS, SLOTS)
    group_mask = present[:, None] & there[None, :]
    low, step, unit = _load_scales(scales[:, None], group[None, :], group_mask, groups, BITS)

    grouped = tl.reshape(codes.to(tl.float32), (ROWS, SLOTS // GROUP_SLOTS, GROUP_SLOTS))
    values = tl.reshape((grouped * step[:, :, None] + low[:, :, None]) * unit[:, :, None], (ROWS, SLOTS))
    if MEAN:
        values += tl.load(mean + element, mask=inside, other=0).to(tl.float32)[None, :]
    return tl.where(mask, values, 0.0)


# ---- codes and scales of single values


@triton.jit
def _interval(x, table, STEPS: tl.constexpr):
    """How many of the ``2 ** STEPS - 1`` ascending thresholds at ``table`` lie below ``x``, by bisection."""
    below = tl.zeros(x.shape, tl.int32)
    for step in tl.static_range(STEPS):
        half = 1 << (STEPS - 1 - step)
        below += tl.where(x > tl.load(table + (below + half - 1)), half, 0)
    return below


@triton.jit
def _byte(
    x, table, index, count, width, seed_low, seed_high, STEPS: tl.constexpr, STOCHASTIC: tl.constexpr,
    BITS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The bytes ``index`` of a packed row of ``width`` bytes; of every code the ``BITS`` bits from ``SHIFT``
    upwards."""
    packed = tl.zeros(index.shape, tl.int32)
    values = table + (1 << STEPS)
    for part in tl.static_range(8 // BITS):
        element = index + part * width
        mask = (index < width) & (element < count)
        v = tl.load(x + element, mask=mask, other=0).to(tl.float32)
        code = _interval(v, table, STEPS)
        if STOCHASTIC:
            low = tl.load(values + code)
            high = tl.load(values + code + 1)
            fraction = tl.div_rn(v - low, tl.where(high > low, high - low, 1.0))
            code += (_uniform(element, seed_low, seed_high) < fraction).to(tl.int32)
        else:
            code = tl.load(values + code).to(tl.int32)
        packed |= tl.where(mask, (code >> SHIFT) & ((1 << BITS) - 1), 0) << (part * BITS)
    return packed.to(tl.uint8)


@_tuned(["STEPS", "BITS", "STOCHASTIC"], *_BLOCKS)
@triton.jit(do_not_specialize=["count", "seed_low", "seed_high"])
def encode_values(
    x, table, packed, count, width, seed_low, seed_high, STEPS: tl.constexpr, STOCHASTIC: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Code ``count`` values by intervals. ``table`` holds ``2 ** STEPS`` thresholds (infinite where unused), then the
    intervals' codes or, to round stochastically between them, levels. ``width``: bytes of the row, at 3 bits of its
    high bits."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if BITS == 3:
        low_width = _row_width(count, 2)
        for half in tl.static_range(2):
            at = index + half * width
            low = _byte(x, table, at, count, low_width, seed_low, seed_high, STEPS, STOCHASTIC, 2, 0)
            tl.store(packed + at, low, mask=(index < width) & (at < low_width))
        high = _byte(x, table, index, count, width, seed_low, seed_high, STEPS, STOCHASTIC, 1, 2)
        tl.store(packed + low_width + index, high, mask=index < width)
    else:
        byte = _byte(x, table, index, count, width, seed_low, seed_high, STEPS, STOCHASTIC, BITS, 0)
        tl.store(packed + index, byte, mask=index < width)


@_tuned(["BITS"], *_BLOCKS)
@triton.jit(do_not_specialize=["count"])
def scale_values(
    grad, packed, levels, scaled, count, width, PARTS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``grad * levels[code]`` for the ``PARTS`` runs of ``width`` elements that share bytes (at 3 bits those of the
    high bits)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if BITS != 3:
        byte = tl.load(packed + index, mask=index < width, other=0).to(tl.int32)
    for part in tl.static_range(PARTS):
        element = index + part * width
        mask = (index < width) & (element < count)
        if BITS == 3:
            code = _unpack(packed, element, mask, count, BITS)
        else:
            code = (byte >> (part * BITS)) & ((1 << BITS) - 1)
        g = tl.load(grad + element, mask=mask, other=0).to(tl.float32)
        tl.store(scaled + element, (g * tl.load(levels + code)).to(scaled.dtype.element_ty), mask=mask)


# ---- rows


@triton.jit
def _load_values(x, start, stride_element, mean, element, mask, MEAN: tl.constexpr):
    """The values (float32) of ``element`` in the rows that begin at ``start``; with ``MEAN``, less those of the rows
    at ``mean``."""
    v = tl.load(x + start[:, None] + (element.to(tl.int64) * stride_element)[None, :], mask=mask, other=0)
    v = v.to(tl.float32)
    if MEAN:
        v -= tl.load(mean[:, None] + element[None, :], mask=mask, other=0).to(tl.float32)
    return v


@triton.jit
def _normalised(v, centre, scale, columns, count, element, NORM: tl.constexpr, BY_COLUMN: tl.constexpr):
    """Values less the ``centre`` and times the ``scale`` of their row, then standardised by column."""
    if NORM == 1:
        v -= centre[:, None]
    if NORM != 0:
        v *= scale[:, None]
    if BY_COLUMN:
        inside = element < count
        column_mean = tl.load(columns + element, mask=inside, other=0).to(tl.float32)
        deviation = tl.load(columns + count + element, mask=inside, other=0).to(tl.float32)
        v = tl.div_rn(v - column_mean[None, :], tl.where(inside, deviation, 1.0)[None, :])
    return v


@triton.jit
def _store_plane(
    x, start, stride_element, mean, columns, centre, scale, low, step, unit, scales, packed,
    row, present, count, groups, seed_low, seed_high, PLANE_BITS: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, NORM: tl.constexpr, BY_COLUMN: tl.constexpr, MEAN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Code the rows again from their statistics and bounds, in the order of their bytes, and pack ``PLANE_BITS`` bits
    from ``SHIFT`` upwards of every code; ``low``, ``step`` and ``unit`` are used where a row is one group, and those
    at ``scales`` elsewhere."""
    ROWS: tl.constexpr = row.shape[0]
    PARTS: tl.constexpr = 8 // PLANE_BITS
    BYTES: tl.constexpr = SLOTS // PARTS if SLOTS > PARTS else 1
    width = _row_width(count, PLANE_BITS)
    byte = tl.arange(0, BYTES)
    line = tl.zeros((ROWS, BYTES), tl.int32)
    for part in tl.static_range(PARTS):
        element = byte + part * width
        mask = present[:, None] & ((byte < width) & (element < count))[None, :]
        v = _load_values(x, start, stride_element, mean, element, mask, MEAN)
        v = _normalised(v, centre, scale, columns, count, element, NORM, BY_COLUMN)
        if GROUP != 0:
            low, step, unit = _load_scales(scales[:, None], (element // GROUP)[None, :], mask, groups, BITS)
        per_unit = tl.div_rn(1.0, tl.where(unit == 0, 1.0, unit))
        per_step = tl.where(step == 0, 0.0, tl.div_rn(1.0, tl.where(step == 0, 1.0, step)))
        code = (v * per_unit - low) * per_step
        code = tl.where(code == code, code, 0.0)  # of groups that are not finite
        if STOCHASTIC:
            code += _uniform((row * count)[:, None] + element[None, :], seed_low, seed_high)
        else:
            code += 0.5
        code = tl.minimum(tl.maximum(tl.floor(code), 0.0), ((1 << BITS) - 1) * 1.0).to(tl.int32)
        code = (code >> SHIFT) & ((1 << PLANE_BITS) - 1)
        line |= tl.where(mask, code, 0) << (part * PLANE_BITS)
    tl.store(packed[:, None] + byte[None, :], line.to(tl.uint8), mask=present[:, None] & (byte < width)[None, :])


@_tuned(["SLOTS", "GROUP_SLOTS", "BITS", "NORM"], *_TILES)
@triton.jit(do_not_specialize=["rows", "heads", "tokens", "seed_low", "seed_high"])
def encode_rows(
    x, mean, columns, packed, scales, rstd,
    rows, count, groups, heads, tokens, stride_sample, stride_head, stride_token, stride_element, eps, seed_low, seed_high,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUP_SLOTS: tl.constexpr, SLOTS: tl.constexpr, NORM: tl.constexpr,
    BY_COLUMN: tl.constexpr, MEAN: tl.constexpr, STOCHASTIC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Code rows ``[samples, heads, tokens]`` of ``count`` values in groups. ``NORM``: 1 layer norm, 2 root mean
    square, 0 none, and then ``BY_COLUMN`` standardised by the means and deviations at ``columns``. ``MEAN``: minus the
    row at ``mean`` of their head.

    Statistics and bounds are found in slots; then the elements that share bytes are read again, from the cache, and
    packed: to move codes between slots instead takes a shuffle for every pair of registers."""
    ROWS: tl.constexpr = TILE // SLOTS if TILE > SLOTS else 1
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    head = row // tokens
    start = (head // heads).to(tl.int64) * stride_sample + (head % heads).to(tl.int64) * stride_head
    start += (row % tokens).to(tl.int64) * stride_token
    mean += head.to(tl.int64) * count
    row = row.to(tl.int64)

    element, inside = _elements(count, GROUP, GROUP_SLOTS, SLOTS)
    mask = present[:, None] & inside[None, :]
    v = _load_values(x, start, stride_element, mean, element, mask, MEAN)
    centre = tl.zeros((ROWS,), tl.float32)
    scale = centre
    if NORM == 1:
        centre = tl.div_rn(tl.sum(v, 1), count * 1.0)
    if NORM != 0:
        centred = tl.where(mask, v - centre[:, None], 0.0)
        scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(centred * centred, 1), count * 1.0) + eps))
        tl.store(rstd + row, scale, mask=present)
    v = _normalised(v, centre, scale, columns, count, element, NORM, BY_COLUMN)

    GROUPS: tl.constexpr = SLOTS // GROUP_SLOTS
    group, there = _group_mask(count, GROUP, GROUP_SLOTS, SLOTS)
    group_mask = present[:, None] & there[None, :]
    v = tl.where(v == v, v, float("inf"))
    low = tl.min(tl.reshape(tl.where(mask, v, float("inf")), (ROWS, GROUPS, GROUP_SLOTS)), 2)
    high = tl.max(tl.reshape(tl.where(mask, v, -float("inf")), (ROWS, GROUPS, GROUP_SLOTS)), 2)
    finite = group_mask & (low > -float("inf")) & (high < float("inf"))
    low = tl.where(finite, low, 0.0)
    high = tl.where(finite, high, 0.0)
    SHARED: tl.constexpr = 4 if GROUPS > 4 else GROUPS
    UNITS: tl.constexpr = GROUPS // SHARED
    largest = tl.max(tl.reshape(tl.maximum(tl.abs(low), tl.abs(high)), (ROWS, UNITS, SHARED)), 2)
    word = tl.div_rn(largest, 127.0).to(tl.int32, bitcast=True)
    exponent = tl.minimum((word + 0x7FFFFF) >> 23, 248)  # rounded up, but not so far that a bound overflows
    unit = tl.broadcast_to(_power_of_two(exponent)[:, :, None], (ROWS, UNITS, SHARED))
    unit = tl.reshape(unit, (ROWS, GROUPS))
    low = tl.where(finite, _multiple(low, unit), -128)
    high = tl.where(finite, _multiple(high, unit), -128)
    scales += row * _scales_width(groups)
    shared = tl.arange(0, UNITS)
    unit_mask = present[:, None] & (shared * SHARED < groups)[None, :]
    tl.store(scales[:, None] + shared[None, :], exponent.to(tl.uint8), mask=unit_mask)
    bounds = scales[:, None] + (groups + 3) // 4 + group[None, :]
    tl.store(bounds, (low & 255).to(tl.uint8), mask=group_mask)
    tl.store(bounds + groups, (high & 255).to(tl.uint8), mask=group_mask)
    tl.debug_barrier()  # the bounds are read below by other threads

    # of a single group the bounds are here, in registers
    low, step = _low_and_step(low, high, BITS)
    packed += row * _row_width(count, BITS)
    if BITS == 3:
        _store_plane(
            x, start, stride_element, mean, columns, centre, scale, low, step, unit, scales, packed,
            row, present, count, groups, seed_low, seed_high, 2, 0, BITS, GROUP, SLOTS, NORM, BY_COLUMN, MEAN, STOCHASTIC,
        )  # fmt: skip
        _store_plane(
            x, start, stride_element, mean, columns, centre, scale, low, step, unit, scales, packed + _row_width(count, 2),
            row, present, count, groups, seed_low, seed_high, 1, 2, BITS, GROUP, SLOTS, NORM, BY_COLUMN, MEAN, STOCHASTIC,
        )  # fmt: skip
    else:
        _store_plane(
            x, start, stride_element, mean, columns, centre, scale, low, step, unit, scales, packed,
            row, present, count, groups, seed_low, seed_high, BITS, 0, BITS, GROUP, SLOTS, NORM, BY_COLUMN, MEAN, STOCHASTIC,
        )  # fmt: skip


@_tuned(["SLOTS", "GROUP_SLOTS", "BITS"], *_TILES)
@triton.jit(do_not_specialize=["rows"])
def decode_rows(
    packed, scales, values, rows, count, groups, BITS: tl.constexpr, GROUP: tl.constexpr, GROUP_SLOTS: tl.constexpr,
    SLOTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The values ``[rows, count]`` behind `encode_rows`' codes."""
    ROWS: tl.constexpr = TILE // SLOTS if TILE > SLOTS else 1
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    v = _decode(packed, scales, scales, row, present, count, groups, BITS, GROUP, GROUP_SLOTS, SLOTS, False)
    if values.dtype.element_ty == tl.float16:  # bounds are rounded, perhaps beyond its largest number
        v = tl.where(v > 65504.0, 65504.0, tl.where(v < -65504.0, -65504.0, v))
    element, inside = _elements(count, GROUP, GROUP_SLOTS, SLOTS)
    tl.store(
        values + (row * count)[:, None] + element[None, :],
        v.to(values.dtype.element_ty),
        mask=present[:, None] & inside[None, :],
    )


@_tuned(["SLOTS", "GROUP_SLOTS", "BITS", "WANT_WEIGHT"], *_TILES)
@triton.jit(do_not_specialize=["rows"])
def norm_backward(
    grad, packed, scales, rstd, columns, weight, d_x, d_weight, d_bias, rows, count, groups,
    CENTER: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, GROUP_SLOTS: tl.constexpr, SLOTS: tl.constexpr,
    BY_COLUMN: tl.constexpr, WEIGHTED: tl.constexpr, WANT_X: tl.constexpr, WANT_WEIGHT: tl.constexpr,
    WANT_BIAS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of a row normalisation; every program takes tiles of rows in turn and leaves its sums over them for
    weight and bias in its row of ``d_weight`` and ``d_bias``."""
    ROWS: tl.constexpr = TILE // SLOTS if TILE > SLOTS else 1
    element, inside = _elements(count, GROUP, GROUP_SLOTS, SLOTS)
    weight_sum = tl.zeros((SLOTS,), tl.float32)
    bias_sum = tl.zeros((SLOTS,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        present = row < rows
        mask = present[:, None] & inside[None, :]
        at = (row * count)[:, None] + element[None, :]
        g = tl.load(grad + at, mask=mask, other=0).to(tl.float32)
        if WANT_BIAS:
            bias_sum += tl.sum(g, 0)
        if WANT_X or WANT_WEIGHT:
            x_hat = _decode(
                packed, scales, scales, row, present, count, groups, BITS, GROUP, GROUP_SLOTS, SLOTS, False
            )
            if BY_COLUMN:
                column_mean = tl.load(columns + element, mask=inside, other=0).to(tl.float32)
                deviation = tl.load(columns + count + element, mask=inside, other=0).to(tl.float32)
                x_hat = x_hat * deviation[None, :] + column_mean[None, :]
            if WANT_WEIGHT:
                weight_sum += tl.sum(g * x_hat, 0)
            if WANT_X:
                if WEIGHTED:
                    g *= tl.load(weight + element, mask=inside, other=0).to(tl.float32)[None, :]
                v = g - x_hat * tl.div_rn(tl.sum(g * x_hat, 1), count * 1.0)[:, None]
                if CENTER:
                    v -= tl.div_rn(tl.sum(g, 1), count * 1.0)[:, None]
                v *= tl.load(rstd + row, mask=present, other=0)[:, None]
                tl.store(d_x + at, v.to(d_x.dtype.element_ty), mask=mask)
    own = tl.program_id(0).to(tl.int64) * count + element
    if WANT_WEIGHT:
        tl.store(d_weight + own, weight_sum, mask=inside)
    if WANT_BIAS:
        tl.store(d_bias + own, bias_sum, mask=inside)


# ---- attention, as derived in `attention.py`

_ATTENTION = (
    _config(4, QUERIES=64, KEYS=64), _config(8, QUERIES=128, KEYS=64), _config(8, QUERIES=64, KEYS=128),
    _config(4, QUERIES=32, KEYS=32),
)  # fmt: skip
_INTERPRETED = tl.constexpr(INTERPRETED)
_ATTENTION_KEY = ["Q_SLOTS", "V_SLOTS", "BITS", "PRECISION", "size_class"]


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if _INTERPRETED:  # there, bfloat16 operands are multiplied as the integers that hold them
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _coded_rows(
    packed, scales, mean, head, token, tokens, COUNT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_SLOTS: tl.constexpr, SLOTS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """The rows ``token`` of a head (float32 ``[len(token), SLOTS]``), 0 where there are none."""
    GROUPS: tl.constexpr = (COUNT + GROUP - 1) // GROUP if GROUP != 0 else 1
    row = head * tokens + token
    return _decode(
        packed, scales, mean + head * COUNT, row, token < tokens, COUNT, GROUPS, BITS, GROUP, GROUP_SLOTS, SLOTS, MEAN
    )


@triton.jit
def _masked(
    scores, query, key, length, keys, mask, stride_query, stride_key, MASK: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """Scores with the mask (1: boolean, 2: additive), -inf where there is nothing; ``query`` and ``key`` broadcast to
    them."""
    inside = (query < length) & (key < keys)
    if MASK != 0:
        at = query.to(tl.int64) * stride_query + key.to(tl.int64) * stride_key
        term = tl.load(mask + at, mask=inside, other=0)
        if MASK == 1:  # added, as in stock: a hidden key that is not a number still spoils its rows
            scores += tl.where(term != 0, 0.0, -float("inf"))
        else:
            scores += term.to(tl.float32)
    if CAUSAL:
        inside = inside & (key <= query)
    return tl.where(inside, scores, -float("inf"))


@triton.jit
def _against_keys(
    q, d_out, query, first, k_packed, k_scales, k_mean, v_packed, v_scales, v_mean, head, length, keys, scale,
    mask, mask_query, mask_key, BITS: tl.constexpr, Q_DIM: tl.constexpr, Q_GROUP: tl.constexpr,
    Q_GROUP_SLOTS: tl.constexpr, Q_SLOTS: tl.constexpr, V_DIM: tl.constexpr, V_GROUP: tl.constexpr,
    V_GROUP_SLOTS: tl.constexpr, V_SLOTS: tl.constexpr, K_MEAN: tl.constexpr, V_MEAN: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The tile of keys from ``first`` on, its scores and the gradient of its probabilities (``[QUERIES, KEYS]``)."""
    key = first + tl.arange(0, KEYS)
    k = _coded_rows(
        k_packed, k_scales, k_mean, head, key, keys, Q_DIM, BITS, Q_GROUP, Q_GROUP_SLOTS, Q_SLOTS, K_MEAN
    ).to(q.dtype)
    v = _coded_rows(
        v_packed, v_scales, v_mean, head, key, keys, V_DIM, BITS, V_GROUP, V_GROUP_SLOTS, V_SLOTS, V_MEAN
    ).to(q.dtype)
    scores = _dot(q, tl.trans(k), PRECISION) * scale
    scores = _masked(scores, query[:, None], key[None, :], length, keys, mask, mask_query, mask_key, MASK, CAUSAL)
    d_p = _dot(d_out, tl.trans(v), PRECISION)
    return k, scores, d_p


@_tuned(_ATTENTION_KEY, *_ATTENTION)
@triton.jit(do_not_specialize=["heads", "length", "keys", "size_class"])
def attention_queries(
    grad, q_packed, q_scales, q_mean, k_packed, k_scales, k_mean, v_packed, v_scales, v_mean, mask,
    d_query, log_sums, deltas,
    heads, length, keys, scale, size_class,
    grad_sample, grad_head, grad_token, grad_element, mask_sample, mask_head, mask_query, mask_key,
    BITS: tl.constexpr, Q_DIM: tl.constexpr, Q_GROUP: tl.constexpr, Q_GROUP_SLOTS: tl.constexpr, Q_SLOTS: tl.constexpr,
    V_DIM: tl.constexpr, V_GROUP: tl.constexpr, V_GROUP_SLOTS: tl.constexpr, V_SLOTS: tl.constexpr,
    Q_MEAN: tl.constexpr, K_MEAN: tl.constexpr, V_MEAN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The queries' gradient of one tile of queries of one head, in two passes over the keys: the first finds, for
    every query, the logarithm of its sum of exponentials and ``delta = sum(P * dP)`` (both kept for the keys' kernel),
    the second sums dQ."""
    tiles = tl.cdiv(length, QUERIES)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    query = (tl.program_id(0) % tiles) * QUERIES + tl.arange(0, QUERIES)
    dtype = grad.dtype.element_ty
    q = _coded_rows(
        q_packed, q_scales, q_mean, head, query, length, Q_DIM, BITS, Q_GROUP, Q_GROUP_SLOTS, Q_SLOTS, Q_MEAN
    ).to(dtype)
    feature, real = _elements(V_DIM, V_GROUP, V_GROUP_SLOTS, V_SLOTS)
    grad += (head // heads) * grad_sample + (head % heads) * grad_head
    d_out = tl.load(
        grad + query.to(tl.int64)[:, None] * grad_token + feature.to(tl.int64)[None, :] * grad_element,
        mask=(query < length)[:, None] & real[None, :],
        other=0,
    )
    mask += (head // heads) * mask_sample + (head % heads) * mask_head
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, (tl.program_id(0) % tiles + 1) * QUERIES)

    peak = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    weighted = tl.zeros((QUERIES,), tl.float32)
    for first in range(0, stop, KEYS):
        k, scores, d_p = _against_keys(
            q, d_out, query, first, k_packed, k_scales, k_mean, v_packed, v_scales, v_mean, head, length, keys, scale,
            mask, mask_query, mask_key, BITS, Q_DIM, Q_GROUP, Q_GROUP_SLOTS, Q_SLOTS, V_DIM, V_GROUP, V_GROUP_SLOTS,
            V_SLOTS, K_MEAN, V_MEAN, MASK, CAUSAL, PRECISION, KEYS,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        finite = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        p = tl.exp(scores - finite[:, None])
        shrink = tl.exp(peak - finite)
        total = total * shrink + tl.sum(p, 1)
        weighted = weighted * shrink + tl.sum(p * d_p, 1)
        peak = new_peak
    seen = total != 0  # a query that sees no key has no gradient; NaN goes on
    log_sum = tl.where(seen, tl.where(seen, peak, 0.0) + tl.log(tl.where(seen, total, 1.0)), float("inf"))
    delta = tl.where(seen, tl.div_rn(weighted, tl.where(seen, total, 1.0)), 0.0)
    tl.store(log_sums + head * length + query, log_sum, mask=query < length)
    tl.store(deltas + head * length + query, delta, mask=query < length)

    d_q = tl.zeros((QUERIES, Q_SLOTS), tl.float32)
    for first in range(0, stop, KEYS):
        k, scores, d_p = _against_keys(
            q, d_out, query, first, k_packed, k_scales, k_mean, v_packed, v_scales, v_mean, head, length, keys, scale,
            mask, mask_query, mask_key, BITS, Q_DIM, Q_GROUP, Q_GROUP_SLOTS, Q_SLOTS, V_DIM, V_GROUP, V_GROUP_SLOTS,
            V_SLOTS, K_MEAN, V_MEAN, MASK, CAUSAL, PRECISION, KEYS,
        )  # fmt: skip
        d_s = tl.exp(scores - log_sum[:, None]) * (d_p - delta[:, None])
        d_q += _dot(d_s.to(dtype), k, PRECISION)
    feature, real = _elements(Q_DIM, Q_GROUP, Q_GROUP_SLOTS, Q_SLOTS)
    at = ((head // heads * length + query) * heads + head % heads) * Q_DIM  # [B, L, H, D] in memory
    tl.store(
        d_query + at[:, None] + feature[None, :],
        (d_q * scale).to(dtype),
        mask=(query < length)[:, None] & real[None, :],
    )


@_tuned(_ATTENTION_KEY, *_ATTENTION)
@triton.jit(do_not_specialize=["heads", "length", "keys", "size_class"])
def attention_keys(
    grad, q_packed, q_scales, q_mean, k_packed, k_scales, k_mean, v_packed, v_scales, v_mean, mask,
    d_key, d_value, log_sums, deltas,
    heads, length, keys, scale, size_class,
    grad_sample, grad_head, grad_token, grad_element, mask_sample, mask_head, mask_query, mask_key,
    BITS: tl.constexpr, Q_DIM: tl.constexpr, Q_GROUP: tl.constexpr, Q_GROUP_SLOTS: tl.constexpr, Q_SLOTS: tl.constexpr,
    V_DIM: tl.constexpr, V_GROUP: tl.constexpr, V_GROUP_SLOTS: tl.constexpr, V_SLOTS: tl.constexpr,
    Q_MEAN: tl.constexpr, K_MEAN: tl.constexpr, V_MEAN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values of one head, over tiles of queries; everything transposed, ``[KEYS,
    QUERIES]``."""
    tiles = tl.cdiv(keys, KEYS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    key = (tl.program_id(0) % tiles) * KEYS + tl.arange(0, KEYS)
    dtype = grad.dtype.element_ty
    k = _coded_rows(
        k_packed, k_scales, k_mean, head, key, keys, Q_DIM, BITS, Q_GROUP, Q_GROUP_SLOTS, Q_SLOTS, K_MEAN
    ).to(dtype)
    v = _coded_rows(
        v_packed, v_scales, v_mean, head, key, keys, V_DIM, BITS, V_GROUP, V_GROUP_SLOTS, V_SLOTS, V_MEAN
    ).to(dtype)
    feature, real = _elements(V_DIM, V_GROUP, V_GROUP_SLOTS, V_SLOTS)
    grad += (head // heads) * grad_sample + (head % heads) * grad_head
    mask += (head // heads) * mask_sample + (head % heads) * mask_head
    start = 0
    if CAUSAL:
        start = (tl.program_id(0) % tiles) * KEYS // QUERIES * QUERIES
    d_k = tl.zeros((KEYS, Q_SLOTS), tl.float32)
    d_v = tl.zeros((KEYS, V_SLOTS), tl.float32)
    for first in range(start, length, QUERIES):
        query = first + tl.arange(0, QUERIES)
        q = _coded_rows(
            q_packed, q_scales, q_mean, head, query, length, Q_DIM, BITS, Q_GROUP, Q_GROUP_SLOTS, Q_SLOTS, Q_MEAN
        ).to(dtype)
        d_out = tl.load(
            grad + query.to(tl.int64)[:, None] * grad_token + feature.to(tl.int64)[None, :] * grad_element,
            mask=(query < length)[:, None] & real[None, :],
            other=0,
        )
        log_sum = tl.load(log_sums + head * length + query, mask=query < length, other=float("inf"))
        delta = tl.load(deltas + head * length + query, mask=query < length, other=0)
        scores = _dot(k, tl.trans(q), PRECISION) * scale
        scores = _masked(scores, query[None, :], key[:, None], length, keys, mask, mask_query, mask_key, MASK, CAUSAL)
        p = tl.exp(scores - log_sum[None, :])
        d_v += _dot(p.to(dtype), d_out, PRECISION)
        d_p = _dot(v, tl.trans(d_out), PRECISION)
        d_s = p * (d_p - delta[None, :])
        d_k += _dot(d_s.to(dtype), q, PRECISION)
    there = (key < keys)[:, None]
    at = (head // heads * keys + key) * heads + head % heads  # [B, S, H, D] in memory
    tl.store(d_value + (at * V_DIM)[:, None] + feature[None, :], d_v.to(dtype), mask=there & real[None, :])
    feature, real = _elements(Q_DIM, Q_GROUP, Q_GROUP_SLOTS, Q_SLOTS)
    tl.store(d_key + (at * Q_DIM)[:, None] + feature[None, :], (d_k * scale).to(dtype), mask=there & real[None, :])


# ---- attention to prompts: keys and values of their own for every head, the same for all samples and queries

_PROMPT_TILES = (_config(4, QUERIES=64), _config(4, QUERIES=32), _config(8, QUERIES=128))


@triton.jit
def _prompts(
    tokens, head, count, feature, real, COUNT: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """The keys or values of a head's prompts (``[COUNT, len(feature)]``), 0 beyond ``count``."""
    prompt = tl.arange(0, COUNT)
    at = (head * count + prompt)[:, None] * DIM + feature[None, :]
    return tl.load(tokens + at, mask=(prompt < count)[:, None] & real[None, :], other=0)


@triton.jit
def _attention_to(q, key, count, scale, PROMPTS: tl.constexpr, PRECISION: tl.constexpr):
    """Probabilities (float32 ``[len(q), PROMPTS]``) of ``count`` prompts."""
    scores = _dot(q, tl.trans(key), PRECISION) * scale
    scores = tl.where((tl.arange(0, PROMPTS) < count)[None, :], scores, -float("inf"))
    p = tl.exp(scores - tl.max(scores, 1)[:, None])
    return tl.div_rn(p, tl.broadcast_to(tl.sum(p, 1)[:, None], p.shape))


@_tuned(["Q_SLOTS", "V_SLOTS", "PROMPTS", "PRECISION"], *_PROMPT_TILES)
@triton.jit(do_not_specialize=["samples", "heads", "length", "count"])
def prompt_attention(
    attended, query, key, value, out, samples, heads, length, count, scale,
    query_sample, query_head, query_token, query_element,
    Q_DIM: tl.constexpr, Q_SLOTS: tl.constexpr, V_DIM: tl.constexpr, V_SLOTS: tl.constexpr, PROMPTS: tl.constexpr,
    PRECISION: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """``attended`` plus the attention of one tile of queries of one head to its prompts."""
    tiles = tl.cdiv(length, QUERIES)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    sample = (tl.program_id(0) // tiles // heads).to(tl.int64)
    token = (tl.program_id(0) % tiles) * QUERIES + tl.arange(0, QUERIES)
    feature, real = _elements(Q_DIM, 0, Q_SLOTS, Q_SLOTS)
    at = sample * query_sample + head * query_head + token.to(tl.int64) * query_token
    q = tl.load(
        query + at[:, None] + feature.to(tl.int64)[None, :] * query_element,
        mask=(token < length)[:, None] & real[None, :],
        other=0,
    )
    k = _prompts(key, head, count, feature, real, PROMPTS, Q_DIM).to(q.dtype)
    p = _attention_to(q, k, count, scale, PROMPTS, PRECISION)
    feature, real = _elements(V_DIM, 0, V_SLOTS, V_SLOTS)
    v = _prompts(value, head, count, feature, real, PROMPTS, V_DIM).to(q.dtype)
    mask = (token < length)[:, None] & real[None, :]
    at = (((sample * length + token) * heads + head) * V_DIM)[:, None] + feature[None, :]
    result = tl.load(attended + at, mask=mask, other=0).to(tl.float32) + _dot(p.to(q.dtype), v, PRECISION)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


@_tuned(["Q_SLOTS", "V_SLOTS", "PROMPTS", "BITS", "PRECISION"], *_PROMPT_TILES)
@triton.jit(do_not_specialize=["samples", "heads", "length", "count"])
def prompt_attention_backward(
    grad, packed, scales, mean, key, value, d_query, d_key, d_value, samples, heads, length, count, scale,
    BITS: tl.constexpr, Q_DIM: tl.constexpr, Q_GROUP: tl.constexpr, Q_GROUP_SLOTS: tl.constexpr, Q_SLOTS: tl.constexpr,
    V_DIM: tl.constexpr, V_SLOTS: tl.constexpr, Q_MEAN: tl.constexpr, PROMPTS: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """Gradients of attention to prompts; every program takes tiles of queries of one head in turn, and leaves its sums
    over them for the prompts in a row of its own of ``d_key`` and ``d_value``."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    tiles = tl.cdiv(length, QUERIES)
    dtype = grad.dtype.element_ty
    q_feature, q_real = _elements(Q_DIM, Q_GROUP, Q_GROUP_SLOTS, Q_SLOTS)
    v_feature, v_real = _elements(V_DIM, 0, V_SLOTS, V_SLOTS)
    k = _prompts(key, head, count, q_feature, q_real, PROMPTS, Q_DIM).to(dtype)
    v = _prompts(value, head, count, v_feature, v_real, PROMPTS, V_DIM).to(dtype)
    d_k = tl.zeros((PROMPTS, Q_SLOTS), tl.float32)
    d_v = tl.zeros((PROMPTS, V_SLOTS), tl.float32)
    for tile in range(tl.program_id(0) // heads, samples * tiles, tl.num_programs(0) // heads):
        sample = tile // tiles + tl.zeros((), tl.int64)
        token = (tile % tiles) * QUERIES + tl.arange(0, QUERIES)
        present = (token < length)[:, None]
        q = _coded_rows(
            packed, scales, mean, sample * heads + head, token, length, Q_DIM, BITS, Q_GROUP, Q_GROUP_SLOTS, Q_SLOTS,
            Q_MEAN,
        ).to(dtype)  # fmt: skip
        at = (sample * length + token) * heads + head  # [B, L, H, D] in memory
        d_out = tl.load(grad + (at * V_DIM)[:, None] + v_feature[None, :], mask=present & v_real[None, :], other=0)
        p = _attention_to(q, k, count, scale, PROMPTS, PRECISION)
        d_p = _dot(d_out, tl.trans(v), PRECISION)
        d_s = p * (d_p - tl.sum(p * d_p, 1)[:, None]) * scale
        d_q = _dot(d_s.to(dtype), k, PRECISION)
        tl.store(d_query + (at * Q_DIM)[:, None] + q_feature[None, :], d_q.to(dtype), mask=present & q_real[None, :])
        d_k += _dot(tl.trans(d_s.to(dtype)), q, PRECISION)
        d_v += _dot(tl.trans(p.to(dtype)), d_out, PRECISION)
    prompt = tl.arange(0, PROMPTS)
    own = tl.program_id(0).to(tl.int64) * count + prompt
    there = (prompt < count)[:, None]
    tl.store(d_key + (own * Q_DIM)[:, None] + q_feature[None, :], d_k, mask=there & q_real[None, :])
    tl.store(d_value + (own * V_DIM)[:, None] + v_feature[None, :], d_v, mask=there & v_real[None, :])
