"""The ops of this package, declared once: schema and shapes for fake tensors, for two sets of ops.

``s2a::name`` runs what torch's dispatcher finds for the device: the fused kernels of `backends`, which register
themselves at the first call there, or the reference. ``s2a_reference::name`` is always the reference. `op_set` picks.

Ops know tensors and codes, not modules and not autograd; `operators` are built on them, which are differentiable. All but
those whose name ends in an underscore are pure. ``R`` and ``C`` are rows and row length, ``W`` is ``codec.packed_width(C, bits)``; ``seed`` is a 0-dim int64 CPU
tensor, drawn for stochastic rounding, or None for rounding to nearest.
"""

import functools
import threading
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import has_kernel
from . import backends
from .backends import compiled, reference
from .codec import math_dtype, packed_width, scales_width


_declared: dict[str, tuple[str, Callable]] = {}  # schema and fake implementation of every op


def _op(schema: str):
    """Declare an op: its schema, and the decorated function as its implementation for fake tensors."""

    def declare(fake):
        _declared[fake.__name__] = schema, fake
        return fake

    return declare


def _groups_like(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    rows, count = x.shape
    packed = x.new_empty(rows, packed_width(count, bits), dtype=torch.uint8)
    return packed, x.new_empty(rows, scales_width(count, group_size), dtype=torch.uint8)


@_op("(Tensor x, float[] thresholds, int[] codes, int bits) -> Tensor")
def encode_steps(x, thresholds, codes, bits):
    """Code every value of ``x`` (floating, any shape) as ``codes[number of thresholds below it]``: uint8 ``[W]``, one
    row."""
    return x.new_empty(packed_width(x.numel(), bits), dtype=torch.uint8)


@_op("(Tensor values, float[] levels, int bits, Tensor seed) -> Tensor")
def encode_levels(values, levels, bits, seed):
    """Round every value (floating, any shape) stochastically to one of the two ascending levels around it: uint8
    ``[W]``, one row."""
    return values.new_empty(packed_width(values.numel(), bits), dtype=torch.uint8)


@_op("(Tensor grad, Tensor packed, float[] levels, int bits) -> Tensor")
def scale_by_levels(grad, packed, levels, bits):
    """``grad * levels[code]``: shape and dtype of ``grad``, contiguous."""
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


@_op("(Tensor(a!) grad, Tensor packed, float[] levels, int bits) -> ()")
def scale_by_levels_(grad, packed, levels, bits):
    """`scale_by_levels` in place, of a contiguous ``grad``."""


@_op("(Tensor x, int bits, int group_size, Tensor? seed) -> (Tensor, Tensor)")
def encode_groups(x, bits, group_size, seed):
    """Code ``x`` (``[R, C]``) in groups, see `codec.encode_groups`: uint8 ``[R, W]`` and ``[R, scales_width]``."""
    return _groups_like(x, bits, group_size)


@_op("(Tensor p, int bits, int group_size, Tensor? seed) -> (Tensor, Tensor)")
def encode_roots(p, bits, group_size, seed):
    """Code the square roots of ``p`` (``[R, C]``, not negative) as `encode_groups` does."""
    return _groups_like(p, bits, group_size)


@_op("(Tensor x, Tensor mean, Tensor rstd, int bits, int group_size, Tensor? seed) -> (Tensor, Tensor)")
def encode_channels(x, mean, rstd, bits, group_size, seed):
    """Code ``(x - mean) * rstd`` (``x`` ``[B, C, M]``, the others ``[C]``) as `encode_groups` does, a row a sample."""
    return _groups_like(x.flatten(1), bits, group_size)


@_op("(Tensor packed, Tensor scales, int bits, int group_size, SymInt count, ScalarType dtype) -> Tensor")
def decode_groups(packed, scales, bits, group_size, count, dtype):
    """The values (``[R, count]``, ``dtype``) behind `encode_groups`' codes."""
    return packed.new_empty(packed.shape[0], count, dtype=dtype)


@_op(
    "(Tensor x, float eps, bool center, bool by_column, int bits, int group_size, Tensor? seed)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def encode_norm(x, eps, center, by_column, bits, group_size, seed):
    """Code the normalised rows of ``x`` (``[..., C]``): ``(x - mean) * rstd`` with ``center`` (LayerNorm), ``x * rstd``
    without (RMSNorm); ``by_column``: with standardised columns, see `codec.column_statistics`. Returns codes and
    scales as `encode_groups`, ``rstd`` (``[R]``, float32 or float64) and the columns' statistics (empty without
    ``by_column``)."""
    x = x.reshape(-1, x.shape[-1])
    packed, scales = _groups_like(x, bits, group_size)
    columns = x.new_empty((2, x.shape[1]) if by_column else (0,), dtype=torch.bfloat16)
    return packed, scales, x.new_empty(x.shape[0], dtype=math_dtype(x.dtype)), columns


@_op(
    "(Tensor grad, Tensor packed, Tensor scales, Tensor rstd, Tensor columns, Tensor? weight, bool center, int bits, "
    "int group_size, bool[] wanted) -> (Tensor, Tensor, Tensor)"
)
def norm_backward(grad, packed, scales, rstd, columns, weight, center, bits, group_size, wanted):
    """Gradients of a row normalisation from `encode_norm`'s codes and ``grad`` (``[..., C]``) for the input (dtype and
    shape of ``grad``, contiguous), the weight and the bias (``[C]``, float32 or float64); those not ``wanted`` are
    empty."""
    dtype = math_dtype(grad.dtype)
    columns = grad.shape[-1]
    return (
        torch.empty_like(grad, memory_format=torch.contiguous_format) if wanted[0] else grad.new_empty(0),
        grad.new_empty(columns if wanted[1] else 0, dtype=dtype),
        grad.new_empty(columns if wanted[2] else 0, dtype=dtype),
    )


@_op(
    "(Tensor grad, Tensor packed, Tensor scales, Tensor rstd, Tensor? weight, bool live, int bits, int group_size, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor)"
)
def batch_norm_backward(grad, packed, scales, rstd, weight, live, bits, group_size, wanted):
    """Gradients of a batch normalisation from `encode_channels`' codes and ``grad`` (``[B, C, M]``) for the input
    (dtype of ``grad``), the weight and the bias (``[C]``, float32 or float64); those not ``wanted`` are empty.
    ``live``: the statistics are the batch's."""
    dtype = math_dtype(grad.dtype)
    return (
        torch.empty_like(grad, memory_format=torch.contiguous_format) if wanted[0] else grad.new_empty(0),
        grad.new_empty(grad.shape[1] if wanted[1] else 0, dtype=dtype),
        grad.new_empty(grad.shape[1] if wanted[2] else 0, dtype=dtype),
    )


@_op("(Tensor grad, Tensor packed, Tensor scales, int bits, int group_size) -> Tensor")
def softmax_backward(grad, packed, scales, bits, group_size):
    """Gradient of softmax over rows from `encode_roots`' codes of its results, scaled to sum to one, and ``grad``
    (``[R, C]``)."""
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


@_op(
    "(Tensor grad, Tensor[] gate, Tensor[] up, str name, str[] keys, float[] values, int bits, int group_size) -> (Tensor, Tensor)"
)
def gated_backward(grad, gate, up, name, keys, values, bits, group_size):
    """Gradients of ``f(gate) * up`` (dtype of ``grad``, ``[R, C]``) from `encode_groups`' results for both; ``f`` is
    activation function ``name`` with the parameters ``keys`` and their ``values``."""
    return tuple(torch.empty_like(grad, memory_format=torch.contiguous_format) for _ in range(2))


@_op(
    "(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode, int bits)"
    " -> (Tensor, Tensor)"
)
def max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, bits):
    """`torch.nn.functional.max_pool2d` (``[..., H, W]``) and the place of each maximum in its window, row by row, as
    codes: uint8 ``[W]``, one row."""
    y = F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    return y, x.new_empty(packed_width(y.numel(), bits), dtype=torch.uint8)


@_op(
    "(Tensor grad, Tensor packed, int[] kernel_size, int[] stride, int[] padding, int[] dilation, SymInt height, "
    "SymInt width, int bits) -> Tensor"
)
def max_pool2d_backward(grad, packed, kernel_size, stride, padding, dilation, height, width, bits):
    """Gradient of `max_pool2d` for inputs of ``height`` and ``width``, from its codes."""
    return grad.new_empty(*grad.shape[:-2], height, width)


@_op("(Tensor x, int bits, int group_size, bool center, bool keep_mean, Tensor? seed) -> (Tensor, Tensor, Tensor)")
def encode_heads(x, bits, group_size, center, keep_mean, seed):
    """Code the last dimension of ``x`` (``[B, H, N, D]``, any strides) in groups, minus its mean over N with
    ``center``.

    Returns uint8 ``[B, H, N, W]`` and ``[B, H, N, scales_width]`` and the mean as it was subtracted, bfloat16
    ``[B, H, 1, D]`` (empty unless ``keep_mean`` and ``center``)."""
    *lead, count = x.shape
    packed = x.new_empty(*lead, packed_width(count, bits), dtype=torch.uint8)
    scales = x.new_empty(*lead, scales_width(count, group_size), dtype=torch.uint8)
    samples, heads, tokens = lead
    mean_shape = (samples, heads, 1, count) if center and keep_mean and tokens else (0,)
    return packed, scales, x.new_empty(mean_shape, dtype=torch.bfloat16)


@_op(
    "(Tensor grad, Tensor[] query, Tensor[] key, Tensor[] value, Tensor? mask, bool is_causal, float scale, int bits,"
    " int group_size, SymInt dim, bool mask_wanted) -> (Tensor, Tensor, Tensor, Tensor)"
)
def attention_backward(grad, query, key, value, mask, is_causal, scale, bits, group_size, dim, mask_wanted):
    """Gradients of attention for query, key, value and mask, see `backends.attention`; ``query``, ``key`` and
    ``value`` are the three results of `encode_heads`, ``dim`` the query's head size."""
    d_q, d_k, d_v = (
        grad.new_empty(parts[0].shape[0], parts[0].shape[2], parts[0].shape[1], d).transpose(1, 2)
        for parts, d in ((query, dim), (key, dim), (value, grad.shape[3]))
    )
    return d_q, d_k, d_v, grad.new_empty(mask.shape if mask_wanted else (0,), dtype=math_dtype(grad.dtype))


@_op("(Tensor attended, Tensor query, Tensor key, Tensor value, Tensor gate, float scale) -> Tensor")
def prompt_attention(attended, query, key, value, gate, scale):
    """``attended + tanh(gate) * softmax(scale query key^T) value``, per head: ``attended`` is ``[B, N, H * Ev]``,
    ``query`` ``[B, H, N, E]`` of any strides; ``key`` and ``value`` are ``[P, H * E]`` and ``[P, H * Ev]`` and ``gate``
    ``[H]``, equal for all samples. The result is like ``attended``."""
    return torch.empty_like(attended, memory_format=torch.contiguous_format)


@_op(
    "(Tensor grad, Tensor[] query, Tensor key, Tensor value, Tensor gate, float scale, int bits, int group_size)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def prompt_attention_backward(grad, query, key, value, gate, scale, bits, group_size):
    """Gradients of `prompt_attention` for the query (``[B, N, H * E]``, dtype of ``grad``), keys, values and gate (float32
    or float64); ``query`` are the three results of `encode_heads`."""
    dtype = math_dtype(grad.dtype)
    d_query = grad.new_empty(grad.shape[0], grad.shape[1], key.shape[1])
    return d_query, *(x.new_empty(x.shape, dtype=dtype) for x in (key, value, gate))


def _define(namespace: str, implementation: Callable[[str], Callable]) -> None:
    """Define every declared op, with what ``implementation`` gives for its name as the one for every device."""
    for name, (schema, fake) in _declared.items():
        torch.library.define(f"{namespace}::{name}", schema)
        torch.library.register_fake(f"{namespace}::{name}", fake)
        torch.library.impl(f"{namespace}::{name}", "CompositeExplicitAutograd", implementation(name))


def _plain(module: ModuleType, name: str) -> Callable:
    """The function of ``module`` for an op, which takes seeds as numbers."""
    function = getattr(module, name)

    @functools.wraps(function)
    def run(*args):
        return function(*(a.item() if isinstance(a, Tensor) and a.dtype == torch.int64 else a for a in args))

    return run


def _dispatched(name: str) -> Callable:
    """What runs where no kernel is registered for a device: its kernels, once they are loaded, or the reference."""
    run_reference = _plain(reference, name)

    @functools.wraps(run_reference)
    def run(*args):
        if name in _load(args[0].device.type):
            return getattr(torch.ops.s2a, name)(*args)
        return run_reference(*args)

    return run


_loaded: dict[str, frozenset[str]] = {}
_loading = threading.Lock()


def _load(device: str) -> frozenset[str]:
    """Have the fused kernels for devices of a type registered, at the first call; the names of their ops."""
    with _loading:
        if device not in _loaded:
            if device == "cpu":
                compiled.library()  # registers its own
            elif (module := backends.triton_on(device)) is not None:
                for name in filter(functools.partial(hasattr, module), _declared):
                    torch.library.impl(f"s2a::{name}", device, _plain(module, name))
            _loaded[device] = frozenset(name for name in _declared if _has_kernel(name, device))
    return _loaded[device]


def _has_kernel(name: str, device: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    return key is not None and has_kernel(f"s2a::{name}", key)


def op_set(backend: str):
    """The ops, as attributes, for what the user asked for as ``backend``."""
    return getattr(torch.ops, op_set_name(backend))


def op_set_name(backend: str) -> str:
    """The namespace of the ops for ``backend``. Those that the user names are checked here, with a warning where they
    do not run; the others where the dispatcher looks for kernels."""
    if backend == "auto":
        return "s2a"
    if backend == "reference" or not backends.check(backend):
        return "s2a_reference"
    if backend == "triton" and backends.is_interpreted():
        _define_interpreted()
        return "s2a_triton"
    return "s2a"


@functools.cache
def _define_interpreted() -> None:
    """Triton's kernels on the CPU, in its interpreter, are a set of their own: there the dispatcher finds others."""
    from .backends import triton

    _define("s2a_triton", lambda name: _plain(triton if hasattr(triton, name) else reference, name))


_define("s2a", _dispatched)
_define("s2a_reference", functools.partial(_plain, reference))
