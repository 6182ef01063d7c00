"""The ops on CPUs in fused C kernels (`kernels.c`), compiled once with the machine's C compiler and kept in a cache.

Without a compiler the reference runs instead, after one warning. Calls cost microseconds: arguments are plain pointers
and numbers, and nothing is compiled again for another shape.
"""

import ctypes
import functools
import hashlib
import itertools
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import codec
from . import reference


logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernels.c")
_SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Sums may be reordered, so that loops over them vectorise; unlike -ffast-math, this leaves the process's handling of
# denormal numbers and of NaN alone.
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
_FLAGS += ("-fno-signed-zeros", "-fassociative-math")


class CompilationError(RuntimeError):
    """The kernels could not be compiled."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, after one warning, where they cannot be had."""
    try:
        kernels = ctypes.CDLL(str(_build()))
    except (CompilationError, OSError) as error:
        warnings.warn(
            f"The fused CPU kernels are not available ({error}); quantised activations fall back to the slow "
            "reference "
            'backend. Install a C compiler (gcc or clang, or name one in CC), or pass backend="reference" to silence this.',
            stacklevel=2,
        )
        return None
    kernels.attention_workspace.restype = ctypes.c_long
    return kernels


def _build() -> Path:
    """Path of the shared library, compiled if the cache does not have it."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    if compiler is None:
        raise CompilationError("no C compiler found")
    identity = [_SOURCE.read_text(), compiler, _output_of(compiler, "--version"), *_FLAGS, platform.machine(), _cpu()]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_s2a"
    path = folder / f"kernels-{hashlib.sha256('|'.join(identity).encode()).hexdigest()[:16]}.so"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as work:
        output = Path(work) / path.name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(output), "-lm"]
        try:
            _output_of(*command, "-fopenmp")
        except CompilationError:
            _output_of(*command)  # a compiler without OpenMP: one thread
        output.replace(path)  # whole or not at all, whoever else compiles at the same time
    logger.warning("Compiled the fused CPU kernels in %.1f s; kept in %s.", time.perf_counter() - start, folder)
    return path


def _output_of(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilationError(f"{command[0]}: {error}") from error
    if result.returncode:
        raise CompilationError(f"{command[0]}: {result.stderr.strip()[-500:]}")
    return result.stdout


def _cpu() -> str:
    """What -march=native depends on, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    return next((line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), "")


def _kernel(name: str, dtype: torch.dtype):
    """The kernel for ``dtype``, or None where the reference has to do (float64; float16 on old compilers)."""
    kernels = library()
    suffix = _SUFFIXES.get(dtype)
    return getattr(kernels, f"{name}_{suffix}", None) if kernels is not None and suffix else None


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None or x.numel() == 0 else x.data_ptr())


class _Coded(ctypes.Structure):
    """The three results of `encode_heads`."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("packed", "scales", "mean")]


def _long(*values: int) -> list[ctypes.c_long]:
    return [ctypes.c_long(value) for value in values]


def _seed(seed: int | None) -> ctypes.c_void_p | object:
    return ctypes.c_void_p(None) if seed is None else ctypes.byref(ctypes.c_int64(seed))


@functools.lru_cache(maxsize=1024)
def _floats(values: tuple[float, ...]) -> ctypes.Array:
    return (ctypes.c_float * max(len(values), 16))(*values)


@functools.lru_cache(maxsize=1024)
def _deltas(codes: tuple[int, ...]) -> ctypes.Array:
    return (ctypes.c_int32 * len(codes))(*(after - before for before, after in itertools.pairwise(codes)))


def encode_steps(x: Tensor, thresholds: list[float], codes: list[int], bits: int) -> Tensor:
    kernel = _kernel("encode_steps", x.dtype)
    if kernel is None:
        return reference.encode_steps(x, thresholds, codes, bits)
    x = x.contiguous()
    packed = x.new_empty(codec.packed_width(x.numel(), bits), dtype=torch.uint8)
    scratch = x.new_empty(x.numel() if bits == 3 else 0, dtype=torch.uint8)
    kernel(
        _pointer(x), *_long(x.numel()), _floats(tuple(thresholds)), _deltas(tuple(codes)), len(thresholds), codes[0],
        bits, _pointer(packed), _pointer(scratch), torch.get_num_threads(),
    )  # fmt: skip
    return packed


encode_levels = reference.encode_levels  # stochastic rounding of derivatives, an option off the fast path


def scale_by_levels(grad: Tensor, packed: Tensor, levels: list[float], bits: int) -> Tensor:
    kernel = _kernel("scale_by_levels", grad.dtype)
    if kernel is None:
        return reference.scale_by_levels(grad, packed, levels, bits)
    grad, packed = grad.contiguous(), packed.contiguous()
    scaled = torch.empty_like(grad)
    scratch = packed.new_empty(grad.numel() if bits == 3 else 0)
    kernel(
        _pointer(grad), _pointer(packed), *_long(grad.numel()), _floats(tuple(levels)), bits, _pointer(scaled),
        _pointer(scratch), torch.get_num_threads(),
    )  # fmt: skip
    return scaled


def encode_groups(x: Tensor, bits: int, group_size: int, seed: int | None) -> tuple[Tensor, Tensor]:
    coded = _encode_rows(x, 0, 0.0, bits, group_size, seed, None)
    return reference.encode_groups(x, bits, group_size, seed) if coded is None else coded[:2]


def encode_roots(p: Tensor, bits: int, group_size: int, seed: int | None) -> tuple[Tensor, Tensor]:
    coded = _encode_rows(p, 3, 0.0, bits, group_size, seed, None)
    return reference.encode_roots(p, bits, group_size, seed) if coded is None else coded[:2]


def encode_channels(
    x: Tensor, mean: Tensor, rstd: Tensor, bits: int, group_size: int, seed: int | None
) -> tuple[Tensor, Tensor]:
    columns = torch.stack([mean, rstd]).to(torch.float32)
    coded = _encode_rows(x.flatten(1), 0, 0.0, bits, group_size, seed, columns, x.shape[2])
    return reference.encode_channels(x, mean, rstd, bits, group_size, seed) if coded is None else coded[:2]


def encode_norm(
    x: Tensor, eps: float, center: bool, by_column: bool, bits: int, group_size: int, seed: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns = standards = None
    if by_column:
        columns = _column_statistics(x, eps, center)
        mean, deviation = columns.to(torch.float32)
        standards = torch.stack([mean, 1 / deviation])
    coded = _encode_rows(x, 1 if center else 2, eps, bits, group_size, seed, standards)
    if coded is None:
        return reference.encode_norm(x, eps, center, by_column, bits, group_size, seed)
    return *coded, x.new_empty(0, dtype=torch.bfloat16) if columns is None else columns


def _column_statistics(x: Tensor, eps: float, center: bool) -> Tensor:
    kernel = _kernel("column_statistics", x.dtype)
    if kernel is None or not x.numel():
        return codec.column_statistics(x, eps, center)
    x = x[codec.sampled_rows(x.shape[0], x.device)]
    columns = x.new_empty(2, x.shape[1], dtype=torch.bfloat16)
    kernel(_pointer(x), *_long(*x.shape), int(center), ctypes.c_float(eps), _pointer(columns))
    return columns


def _encode_rows(
    x: Tensor,
    mode: int,
    eps: float,
    bits: int,
    group_size: int,
    seed: int | None,
    columns: Tensor | None,
    run: int = 1,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes, scales and, of norms, ``rstd``; None where the reference has to do. ``columns``: means and inverse
    deviations (float32 ``[2, C / run]``) that every ``run`` values of a row are standardised by."""
    kernel = _kernel("encode_rows", x.dtype)
    if kernel is None:
        return None
    x = x.contiguous()
    rows, count = x.shape
    packed = x.new_empty(rows, codec.packed_width(count, bits), dtype=torch.uint8)
    scales = x.new_empty(rows, codec.scales_width(count, group_size), dtype=torch.uint8)
    rstd = x.new_empty(rows if mode else 0, dtype=torch.float32)
    if x.numel():
        kernel(
            _pointer(x), *_long(rows, count), mode, ctypes.c_float(eps), bits, *_long(group_size), _seed(seed),
            _pointer(columns), *_long(run), _pointer(packed), _pointer(scales), _pointer(rstd), torch.get_num_threads(),
        )  # fmt: skip
    return packed, scales, rstd


def decode_groups(
    packed: Tensor, scales: Tensor, bits: int, group_size: int, count: int, dtype: torch.dtype
) -> Tensor:
    kernel = _kernel("decode_rows", dtype)
    if kernel is None:
        return reference.decode_groups(packed, scales, bits, group_size, count, dtype)
    packed, scales = packed.contiguous(), scales.contiguous()
    values = packed.new_empty(packed.shape[0], count, dtype=dtype)
    if values.numel():
        kernel(
            _pointer(packed), _pointer(scales), *_long(packed.shape[0], count), bits, *_long(group_size),
            _pointer(values), torch.get_num_threads(),
        )  # fmt: skip
    return values


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
    kernel = _kernel("norm_backward", grad.dtype)
    if kernel is None or rstd.dtype != torch.float32:
        return reference.norm_backward(grad, packed, scales, rstd, columns, weight, center, bits, group_size, wanted)
    grad, packed, scales, rstd = (t.contiguous() for t in (grad, packed, scales, rstd))
    weight = None if weight is None else weight.to(torch.float32).contiguous()
    columns = columns.to(torch.float32)
    rows, count = grad.shape
    d_x = torch.empty_like(grad) if wanted[0] else grad.new_empty(0)
    d_weight, d_bias = (grad.new_zeros(count if want else 0, dtype=torch.float32) for want in wanted[1:])
    if grad.numel():
        threads = torch.get_num_threads()
        sums = torch.zeros(threads * 2 * count if any(wanted[1:]) else 0, dtype=torch.float32)
        kernel(
            _pointer(grad), _pointer(packed), _pointer(scales), _pointer(rstd), _pointer(columns), _pointer(weight), *_long(rows, count),
            int(center), bits, *_long(group_size), _pointer(d_x), _pointer(d_weight), _pointer(d_bias), _pointer(sums),
            threads,
        )  # fmt: skip
    return d_x, d_weight, d_bias


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
) -> tuple[Tensor, Tensor, Tensor]:
    if _kernel("channel_sums", grad.dtype) is None or not grad.numel():
        return reference.batch_norm_backward(grad, packed, scales, rstd, weight, live, bits, group_size, wanted)
    grad, packed, scales = (t.contiguous() for t in (grad, packed, scales))
    samples, channels, size = grad.shape
    layout = (*_long(samples, channels, size), bits, *_long(group_size))
    coded, threads = (_pointer(packed), _pointer(scales)), torch.get_num_threads()
    sums = torch.zeros(threads, 2, channels, dtype=torch.float32)
    _kernel("channel_sums", grad.dtype)(_pointer(grad), *coded, *layout, _pointer(sums), threads)
    sums = sums.sum(0)
    d_x = grad.new_empty(0)
    if wanted[0]:
        d_x = torch.empty_like(grad)
        means = sums / (samples * size) if live else torch.zeros_like(sums)
        scale = (rstd if weight is None else rstd * weight).to(torch.float32)
        _kernel("channel_gradient", grad.dtype)(
            _pointer(grad), *coded, _pointer(means), _pointer(scale), *layout, _pointer(d_x), threads
        )
    empty = sums.new_empty(0)
    return d_x, sums[1].clone() if wanted[1] else empty, sums[0].clone() if wanted[2] else empty.clone()


def softmax_backward(grad: Tensor, packed: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    kernel = _kernel("softmax_backward", grad.dtype)
    if kernel is None:
        return reference.softmax_backward(grad, packed, scales, bits, group_size)
    grad, packed, scales = (t.contiguous() for t in (grad, packed, scales))
    d_x = torch.empty_like(grad)
    if grad.numel():
        kernel(
            _pointer(grad), _pointer(packed), _pointer(scales), *_long(*grad.shape), bits, *_long(group_size),
            _pointer(d_x), torch.get_num_threads(),
        )  # fmt: skip
    return d_x


# The gates x sigmoid(a x + b x^3), and GELU, as `gate16` in `kernels.c` takes them.
_TANH_GELU = 2 * math.sqrt(2 / math.pi)
_GATES = {
    "gelu": (0.0, 0.0),
    "silu": (1.0, 0.0),
    "quick_gelu": (1.702, 0.0),
    "gelu_tanh": (_TANH_GELU, 0.044715 * _TANH_GELU),
}


def gated_backward(
    grad: Tensor,
    gate: list[Tensor],
    up: list[Tensor],
    name: str,
    keys: list[str],
    values: list[float],
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    kernel = _kernel("gated_backward", grad.dtype)
    if kernel is None or name not in _GATES:
        return reference.gated_backward(grad, gate, up, name, keys, values, bits, group_size, decode=decode_groups)
    grad = grad.contiguous()
    d_gate, d_up = torch.empty_like(grad), torch.empty_like(grad)
    if grad.numel():
        coded = [[part.contiguous() for part in parts] for parts in (gate, up)]
        kernel(
            _pointer(grad), *(ctypes.byref(_Coded(*map(_pointer, parts), None)) for parts in coded),
            *map(ctypes.c_float, _GATES[name]), *_long(*grad.shape), bits, *_long(group_size), _pointer(d_gate),
            _pointer(d_up), torch.get_num_threads(),
        )  # fmt: skip
    return d_gate, d_up


_PAIR = ctypes.c_long * 2


class _Pool(ctypes.Structure):
    """Heights and widths of inputs and results, and of the window; see `kernels.c`."""

    _fields_ = [(name, _PAIR) for name in ("inputs", "results", "kernel", "stride", "padding", "dilation")]


def max_pool2d(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    bits: int,
) -> tuple[Tensor, Tensor]:
    kernel = _kernel("max_pool2d", x.dtype)
    channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    if kernel is None or channels_last:
        return reference.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, bits)
    x = x.contiguous()
    y = x.new_empty(F.max_pool2d(x.to("meta"), kernel_size, stride, padding, dilation, ceil_mode).shape)
    places = x.new_empty(y.numel(), dtype=torch.uint8)
    pool = _Pool(*(_PAIR(*pair) for pair in (x.shape[-2:], y.shape[-2:], kernel_size, stride, padding, dilation)))
    kernel(
        _pointer(x), ctypes.byref(pool), *_long(math.prod(x.shape[:-2])), _pointer(y), _pointer(places),
        torch.get_num_threads(),
    )  # fmt: skip
    packed = x.new_empty(codec.packed_width(places.numel(), bits), dtype=torch.uint8)
    library().pack_row(_pointer(places), *_long(places.numel()), bits, _pointer(packed))
    return y, packed


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
    kernel = _kernel("max_pool2d_backward", grad.dtype)
    if kernel is None:
        return reference.max_pool2d_backward(grad, packed, kernel_size, stride, padding, dilation, height, width, bits)
    grad, packed = grad.contiguous(), packed.contiguous()
    d_x = grad.new_empty(*grad.shape[:-2], height, width)
    pool = _Pool(*(_PAIR(*pair) for pair in (d_x.shape[-2:], grad.shape[-2:], kernel_size, stride, padding, dilation)))
    kernel(
        _pointer(grad), _pointer(packed), ctypes.byref(pool), *_long(math.prod(grad.shape[:-2])), bits, _pointer(d_x),
        torch.get_num_threads(),
    )  # fmt: skip
    return d_x


def encode_heads(
    x: Tensor, bits: int, group_size: int, center: bool, keep_mean: bool, seed: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernel("encode_heads", x.dtype)
    if kernel is None:
        return reference.encode_heads(x, bits, group_size, center, keep_mean, seed)
    x = x if x.stride(3) == 1 else x.contiguous()
    samples, heads, tokens, dim = x.shape
    packed = x.new_empty(samples, heads, tokens, codec.packed_width(dim, bits), dtype=torch.uint8)
    scales = x.new_empty(samples, heads, tokens, codec.scales_width(dim, group_size), dtype=torch.uint8)
    kept = center and keep_mean and tokens
    mean = x.new_empty((samples, heads, 1, dim) if kept else 0, dtype=torch.bfloat16)
    if x.numel():
        kernel(
            _pointer(x), *_long(samples, heads, tokens, dim, *x.stride()[:3]), int(center), bits, *_long(group_size),
            _seed(seed), _pointer(packed), _pointer(scales), _pointer(mean), torch.get_num_threads(),
        )  # fmt: skip
    return packed, scales, mean


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
    kernel = _kernel("attention_backward", grad.dtype)
    if kernel is None or mask_wanted:
        arguments = grad, query, key, value, mask, is_causal, scale, bits, group_size, dim, mask_wanted
        return reference.attention_backward(*arguments)
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    samples, heads, length, value_dim = grad.shape
    keys = key[0].shape[2]
    d_query, d_key, d_value = (
        grad.new_empty(samples, tokens, heads, size).transpose(1, 2)
        for tokens, size in ((length, dim), (keys, dim), (keys, value_dim))
    )
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        mask = mask.to(torch.float32).expand(samples, heads, length, keys)
    if d_key.numel() or d_value.numel() or d_query.numel():
        threads = torch.get_num_threads()
        room = grad.new_empty(threads * attention_workspace(length, keys, dim, value_dim), dtype=torch.float32)
        coded = [[part.contiguous() for part in parts] for parts in (query, key, value)]
        kernel(
            _pointer(grad), (ctypes.c_long * 3)(*grad.stride()[:3]),
            *(ctypes.byref(_Coded(*map(_pointer, parts))) for parts in coded),
            _pointer(mask), (ctypes.c_long * 4)(*(mask.stride() if mask is not None else ())), int(is_causal),
            ctypes.c_float(scale), bits, *_long(group_size, samples, heads, length, keys, dim, value_dim),
            _pointer(d_query), _pointer(d_key), _pointer(d_value), _pointer(room), threads,
        )  # fmt: skip
    return d_query, d_key, d_value, grad.new_empty(0, dtype=torch.float32)


def attention_workspace(length: int, keys: int, dim: int, value_dim: int) -> int:
    """Float32 values that each thread of `attention_backward` needs room for."""
    return library().attention_workspace(*_long(length, keys, dim, value_dim))


def prompt_attention(attended: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    kernel = _kernel("prompt_attention", query.dtype)
    if kernel is None or attended.dtype != query.dtype:
        return reference.prompt_attention(attended, query, key, value, scale)
    attended = attended.contiguous()
    query = query if query.stride(3) == 1 else query.contiguous()
    key, value = (tokens.to(torch.float32).contiguous() for tokens in (key, value))
    out = torch.empty_like(attended)
    if out.numel():
        samples, heads, length, dim = query.shape
        kernel(
            _pointer(attended), _pointer(query), (ctypes.c_long * 3)(*query.stride()[:3]), _pointer(key), _pointer(value),
            ctypes.c_float(scale), *_long(samples, heads, length, key.shape[1], dim, value.shape[2]), _pointer(out),
            torch.get_num_threads(),
        )  # fmt: skip
    return out


def prompt_attention_backward(
    grad: Tensor, query: list[Tensor], key: Tensor, value: Tensor, scale: float, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernel("prompt_attention_backward", grad.dtype)
    if kernel is None:
        return reference.prompt_attention_backward(grad, query, key, value, scale, bits, group_size)
    grad, *query = (part.contiguous() for part in (grad, *query))
    key, value = (tokens.to(torch.float32).contiguous() for tokens in (key, value))
    samples, heads, length, _ = query[0].shape
    _, prompts, dim = key.shape
    d_query = grad.new_empty(samples, length, heads * dim)
    d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
    if grad.numel():
        kernel(
            _pointer(grad), ctypes.byref(_Coded(*map(_pointer, query))), _pointer(key), _pointer(value),
            ctypes.c_float(scale), bits, *_long(group_size, samples, heads, length, prompts, dim, value.shape[2]),
            _pointer(d_query), _pointer(d_key), _pointer(d_value), torch.get_num_threads(),
        )  # fmt: skip
    return d_query, d_key, d_value
