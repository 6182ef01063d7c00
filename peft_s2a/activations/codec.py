"""How values become b-bit codes and codes become bytes: plain PyTorch, any device, the ground truth of every backend.

Layout. A tensor is coded as rows ``[R, C]``. With ``k = 8 // bits`` codes a byte, a row takes ``W = ceil(C / k)``
bytes, and byte ``j`` holds the codes of elements ``j, j + W, j + 2W, ...`` from its lowest bits upwards: whole vectors
of neighbours are packed by one shift and one or, which interleaved neighbours would not allow. Three bits are two low
bits a code, packed four a byte, followed by the high bits, packed eight a byte: eight codes in three bytes.

Groups. `encode_groups` codes runs of ``group_size`` values of a row on even steps between their minimum and maximum
(as the min-max group quantisation of ActNN, Chen et al. 2021, section 4.1). Four groups share a unit, the smallest
power of two that their largest magnitude holds at most 127 times (one byte, the exponent of a float32); minima and
maxima are whole multiples of it (one signed byte each). That they come back nearly as they were matters more than how
fine the steps are: on real weights, formats that moved them by half a step doubled the gradient's error. A group with a
value that is not finite has -128 for both, and comes back as NaN; the others that share its unit do not notice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


WIDTHS = (1, 2, 3, 4, 8)
LARGEST_GROUP = 2**31 - 1  # values; one that is larger than a row takes the row


def packed_width(count: int, bits: int) -> int:
    """Bytes that one row of ``count`` codes of ``bits`` bits takes."""
    if bits == 3:
        return packed_width(count, 2) + packed_width(count, 1)
    per_byte = 8 // bits
    return -(-count // per_byte)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (uint8 ``[R, C]``, values below ``2 ** bits``) into uint8 ``[R, packed_width(C, bits)]``."""
    if bits == 8:
        return codes.clone()
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], dim=1)
    rows, count = codes.shape
    width = packed_width(count, bits)
    packed = codes.new_zeros(rows, width)
    for start in range(0, count, width or 1):
        part = codes[:, start : start + width]
        packed[:, : part.shape[1]] |= part << (start // width * bits)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes (uint8 ``[R, count]``) that `pack` packed."""
    if bits == 8:
        return packed
    if bits == 3:
        low = packed_width(count, 2)
        return unpack(packed[:, :low], 2, count) | unpack(packed[:, low:], 1, count) << 2
    rows, width = packed.shape
    codes = packed.new_empty(rows, count)
    for start in range(0, count, width or 1):
        part = codes[:, start : start + width]
        torch.bitwise_and(packed[:, : part.shape[1]] >> (start // width * bits), 2**bits - 1, out=part)
    return codes


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are quantised: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def uniform(seed: int, count: int, device: torch.device) -> Tensor:
    """``count`` float32 numbers in [0, 1), a function of ``seed`` and the position alone, equal on every backend.

    The position plus a word of the seed goes through the 32-bit integer hash `lowbias32` (Wellons, "Prospecting for
    hash functions", 2018), is xored with the other word and hashed again; the top 24 bits are used.
    """
    position = torch.arange(count, dtype=torch.int32, device=device)
    low, high = (_as_int32(seed & 0xFFFFFFFF), _as_int32(seed >> 32 & 0xFFFFFFFF))
    mixed = _hash32(_hash32(position.add_(low)).bitwise_xor_(high))
    return (mixed >> 8 & 0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def _hash32(x: Tensor) -> Tensor:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None)):
        x = x ^ (x >> shift & (1 << 32 - shift) - 1)
        if factor is not None:
            x = x * _as_int32(factor)
    return x


def _as_int32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def round_codes(values: Tensor, bits: int, seed: int | None) -> Tensor:
    """Round ``values`` (``[R, C]``, in code units) to codes of ``bits`` bits: to nearest, or up with the probability
    of the fraction when a ``seed`` is given."""
    if seed is None:
        values = values + 0.5
    else:
        values = values + uniform(seed, values.numel(), values.device).view(values.shape)
    return values.floor_().clamp_(0, 2**bits - 1).to(torch.uint8)


FLOAT16_MAX = torch.finfo(torch.float16).max
_UNIT_GROUPS = 4  # groups that share a unit
_NOT_FINITE = -128  # the bounds of groups with a value that is not finite
_LARGEST_EXPONENT = 248  # of units: 127 of them are 3.38e38


def scales_width(count: int, group_size: int) -> int:
    """Bytes that the scales of one row of ``count`` values take: units, then minima, then maxima."""
    if not 1 <= group_size <= LARGEST_GROUP:
        raise RuntimeError(f"group_size must be between 1 and {LARGEST_GROUP}, not {group_size}")
    groups = -(-count // group_size)
    return -(-groups // _UNIT_GROUPS) + 2 * groups


def encode_groups(x: Tensor, bits: int, group_size: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Code ``x`` (``[R, C]``) in groups of ``group_size`` along its rows; the last group of a row may be shorter.

    Returns the packed codes and the scales, uint8 ``[R, scales_width(C, group_size)]``. A value comes back within half
    a step (nearest rounding) or one step (stochastic) plus the rounding of the bounds, 1/127 of the unit's largest
    magnitude.
    """
    rows, count = x.shape
    scales_width(count, group_size)  # refuses sizes out of range
    group_size = min(group_size, max(count, 1))
    x = x.to(math_dtype(x.dtype))
    groups = -(-count // group_size)
    padding = groups * group_size - count
    if padding:
        x = torch.cat([x, x[:, -1:].expand(rows, padding)], dim=1)
    grouped = x.reshape(rows, groups, group_size)
    scales = _encode_bounds(grouped.amin(-1).float(), grouped.amax(-1).float())
    low, step, unit = (part.to(x.dtype).unsqueeze(2) for part in _decode_bounds(scales, groups, bits))
    # in units, where nothing overflows
    steps = (grouped / torch.where(unit == 0, 1, unit) - low) * torch.where(step == 0, 0, 1 / step)
    steps = torch.where(low.isnan(), 0, steps)
    codes = round_codes(steps.flatten(1)[:, :count], bits, seed)
    return pack(codes, bits), scales


def decode_groups(
    packed: Tensor, scales: Tensor, bits: int, group_size: int, count: int, dtype: torch.dtype
) -> Tensor:
    """The values (``[R, count]``, ``dtype``) that `encode_groups` coded: NaN in groups with one that was not finite, and
    finite elsewhere."""
    codes = unpack(packed, bits, count).to(math_dtype(dtype))
    scales_width(count, group_size)  # refuses sizes out of range
    group_size = min(group_size, max(count, 1))
    low, step, unit = (
        part.to(codes.dtype).repeat_interleave(group_size, dim=1)[:, :count]
        for part in _decode_bounds(scales, -(-count // group_size), bits)
    )
    values = codes.mul_(step).add_(low).mul_(unit)
    if dtype == torch.float16:  # bounds are rounded, perhaps beyond its largest number
        values.clamp_(-FLOAT16_MAX, FLOAT16_MAX)
    return values.to(dtype)


def step_sizes(scales: Tensor, bits: int, group_size: int, count: int) -> Tensor:
    """How far apart the values are that each value of a row may come back as, float32 ``[R, count]``; ``scales`` are
    `encode_groups`'."""
    scales_width(count, group_size)  # refuses sizes out of range
    group_size = min(group_size, max(count, 1))
    _, step, unit = _decode_bounds(scales, -(-count // group_size), bits)
    return (step * unit).repeat_interleave(group_size, dim=1)[:, :count]


def _encode_bounds(low: Tensor, high: Tensor) -> Tensor:
    """The scales of groups between ``low`` and ``high`` (float32 ``[R, groups]``)."""
    rows, groups = low.shape
    finite = low.isfinite() & high.isfinite()
    low, high = (torch.where(finite, bound, 0) for bound in (low, high))
    largest = torch.maximum(low.abs(), high.abs())
    padding = -groups % _UNIT_GROUPS
    shared = F.pad(largest, (0, padding)).view(rows, (groups + padding) // _UNIT_GROUPS, _UNIT_GROUPS).amax(-1)
    # the exponent, rounded up, but not so far that a bound overflows
    exponents = ((shared / 127).view(torch.int32) + 0x7FFFFF >> 23).clamp_max(_LARGEST_EXPONENT)
    units = _units(exponents, groups)
    units = torch.where(units == 0, 1, units)
    bounds = (
        torch.where(finite, (bound / units).round().clamp_(-127, 127), _NOT_FINITE).to(torch.int8)
        for bound in (low, high)
    )
    return torch.cat([exponents.to(torch.uint8), *(bound.view(torch.uint8) for bound in bounds)], dim=1)


def _decode_bounds(scales: Tensor, groups: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Minimum and step of groups in units, and the units, float32 ``[R, groups]``."""
    exponents, low, high = scales.split([scales.shape[1] - 2 * groups, groups, groups], dim=1)
    low, high = (bound.contiguous().view(torch.int8).float() for bound in (low, high))
    step = (high - low) / (2**bits - 1)
    return torch.where(low == _NOT_FINITE, torch.nan, low), step, _units(exponents, groups)


def _units(exponents: Tensor, groups: int) -> Tensor:
    units = (exponents.to(torch.int32) << 23).view(torch.float32)
    return units.repeat_interleave(_UNIT_GROUPS, dim=1)[:, :groups]


_SAMPLED_ROWS = 128


def column_statistics(x: Tensor, eps: float, center: bool) -> Tensor:
    """Mean and deviation of the columns of the normalised rows of ``x`` (``[R, C]``), bfloat16 ``[2, C]``.

    At most 128 rows are looked at, see `sampled_rows`. The channels of a transformer's norms differ by orders of magnitude and keep
    their own level over tokens; standardised columns share one scale a row. Deviations far below the typical one are
    raised, since rows left out may have larger values. Rows that are not finite do not count.
    """
    sample = x[sampled_rows(x.shape[0], x.device)].to(math_dtype(x.dtype))
    if center:
        sample = sample - sample.mean(1, keepdim=True)
    sample = sample * (sample.square().mean(1, keepdim=True) + eps).rsqrt()
    finite = sample.isfinite().all(1, keepdim=True)
    count = finite.sum().clamp_min(1)
    mean = torch.where(finite, sample, 0).sum(0) / count
    var = torch.where(finite, sample - mean, 0).square().sum(0) / count
    return torch.stack([mean, (var + 0.05**2).sqrt()]).to(torch.bfloat16)


def sampled_rows(rows: int, device: torch.device) -> Tensor:
    """The indices (int64, ascending) of the rows that `column_statistics` looks at: all of them up to 128, else one in
    every 128th of them.

    Where in its 128th a row is taken goes by the fractional part of ``i * i`` times the golden ratio, in 16 bits. Such
    a sequence is spread evenly (Weyl 1916) and, being quadratic, falls into step with no period of the rows: tokens
    are as frequent among the sampled rows as among all, whatever their number and that of the samples.
    """
    if rows <= _SAMPLED_ROWS:
        return torch.arange(rows, device=device)
    part = torch.arange(_SAMPLED_ROWS, device=device)
    within = part * part * 40503 & 0xFFFF
    return ((part << 16) + within) * rows >> 23
