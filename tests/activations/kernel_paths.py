"""Ways through the ops: values are coded, and gradients come from the codes. Every op lies on one of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_s2a.activations.levels import code_table


@dataclass(frozen=True)
class Case:
    """How to code, and how large the tensors are."""

    bits: int = 4
    group: int = 8
    rounding: int | None = None
    rows: int = 3
    count: int = 40
    samples: int = 2
    heads: int = 2
    tokens: int = 5
    keys: int = 6
    dim: int = 12
    value_dim: int = 20

    @property
    def code(self) -> tuple[int, int]:
        return self.bits, self.group

    @property
    def seed(self) -> Tensor | None:
        return None if self.rounding is None else torch.tensor(self.rounding)


class Path(NamedTuple):
    """``run(ops, case, **tensors)`` gives results; ``shapes(case)`` are those of the tensors."""

    run: Callable
    shapes: Callable[[Case], dict[str, tuple[int, ...]]]


PATHS: dict[str, Path] = {}
POSITIVE = {"p", "rstd"}  # tensors that hold no negative values


def tensors(name: str, case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """What path ``name`` takes, at random."""
    generator = torch.Generator().manual_seed(seed)
    found = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in PATHS[name].shapes(case).items()}
    return {key: x.abs() if key in POSITIVE else x for key, x in found.items()}


def _path(**shapes: Callable[[Case], tuple[int, ...]]):
    def declare(run):
        PATHS[run.__name__.strip("_")] = Path(run, lambda case: {key: shape(case) for key, shape in shapes.items()})
        return run

    return declare


def _rows(case: Case) -> tuple[int, ...]:
    return case.rows, case.count


def _maps(case: Case) -> tuple[int, ...]:
    return case.samples, case.heads, case.count


def _channels(case: Case) -> tuple[int, ...]:
    return (case.heads,)


def _queries(case: Case) -> tuple[int, ...]:
    return case.samples, case.heads, case.tokens, case.dim


@_path(x=_rows, grad=_rows)
def _steps(ops, case, x, grad):
    table = code_table("gelu", (), case.bits, None, x.dtype == torch.float64)
    packed = ops.encode_steps(x, table.thresholds, table.codes, table.bits)
    over = grad.clone(memory_format=torch.contiguous_format)
    ops.scale_by_levels_(over, packed, table.levels, table.bits)
    return packed, ops.scale_by_levels(grad, packed, table.levels, table.bits), over


@_path(x=_rows, grad=_rows)
def _levels(ops, case, x, grad):
    levels = torch.linspace(-0.2, 1.2, 2**case.bits).tolist()
    packed = ops.encode_levels(x, levels, case.bits, torch.tensor(case.rounding or 7))
    return packed, ops.scale_by_levels(grad, packed, levels, case.bits)


@_path(x=_rows)
def _groups(ops, case, x):
    coded = ops.encode_groups(x, *case.code, case.seed)
    return *coded, ops.decode_groups(*coded, *case.code, x.shape[1], x.dtype)


@_path(p=_rows, grad=_rows)
def _softmax(ops, case, p, grad):
    coded = ops.encode_roots(p, *case.code, case.seed)
    return *coded, ops.softmax_backward(grad, *coded, *case.code)


def _declare_batch_norm(live: bool) -> None:
    def run(ops, case, x, mean, rstd, weight, grad):
        mean, rstd = mean.float(), rstd.float()
        coded = ops.encode_channels(x, mean, rstd, *case.code, case.seed)
        return *coded, *ops.batch_norm_backward(grad, *coded, rstd, weight, live, *case.code, [True] * 3)

    run.__name__ = f"batch norm, {'live' if live else 'frozen'}"
    _path(x=_maps, mean=_channels, rstd=_channels, weight=_channels, grad=_maps)(run)


def _declare_row_norm(center: bool, by_column: bool) -> None:
    def run(ops, case, x, weight, grad):
        coded = ops.encode_norm(x, 1e-5, center, by_column, *case.code, case.seed)
        return *coded, *ops.norm_backward(grad, *coded, weight, center, *case.code, [True] * 3)

    run.__name__ = f"{'layer' if center else 'rms'} norm{', by column' if by_column else ''}"
    _path(x=_rows, weight=lambda case: (case.count,), grad=_rows)(run)


def _declare_gate(function: str) -> None:
    def run(ops, case, gate, up, grad):
        coded = [list(ops.encode_groups(x, *case.code, case.seed)) for x in (gate, up)]
        return ops.gated_backward(grad, *coded, function, [], [], *case.code)

    run.__name__ = f"gate, {function}"
    _path(gate=_rows, up=_rows, grad=_rows)(run)


for switch in (False, True):
    _declare_batch_norm(switch)
    _declare_row_norm(switch, False)
    _declare_row_norm(switch, True)
for each in ("gelu", "gelu_tanh", "silu", "mish"):
    _declare_gate(each)


WINDOWS = [2, 3], [2, 1], [1, 1], [1, 1]


def _pooled(case: Case) -> tuple[int, ...]:
    return case.samples, case.heads, (case.tokens + 2) // 2 + 1, case.keys + 2


@_path(x=lambda case: (case.samples, case.heads, case.tokens + 2, case.keys + 2), grad=_pooled)
def _pooling(ops, case, x, grad):
    y, packed = ops.max_pool2d(x, *WINDOWS, False, 4)
    return y, packed, ops.max_pool2d_backward(grad, packed, *WINDOWS, *x.shape[2:], 4)


@_path(x=_queries)
def _heads(ops, case, x):
    packed, scales, mean = ops.encode_heads(x, *case.code, True, True, case.seed)
    flat = ops.decode_groups(packed.flatten(0, 2), scales.flatten(0, 2), *case.code, case.dim, x.dtype)
    return packed, scales, mean, flat


def _declare_attention(kind: str) -> None:
    def run(ops, case, query, key, value, grad, mask):
        coded = [list(ops.encode_heads(x, *case.code, True, x is query, case.seed)) for x in (query, key, value)]
        given = {"hidden keys": mask > -0.5, "additive mask": mask.float()}.get(kind)
        return ops.attention_backward(grad, *coded, given, kind == "causal", 0.3, *case.code, case.dim, False)

    run.__name__ = f"attention, {kind}"
    _path(
        query=_queries,
        key=lambda case: (case.samples, case.heads, case.keys, case.dim),
        value=lambda case: (case.samples, case.heads, case.keys, case.value_dim),
        grad=lambda case: (case.samples, case.heads, case.tokens, case.value_dim),
        mask=lambda case: (case.samples, 1, case.tokens, case.keys),
    )(run)


for each in ("plain", "causal", "hidden keys", "additive mask"):
    _declare_attention(each)


def _attended(case: Case) -> tuple[int, ...]:
    return case.samples, case.tokens, case.heads * case.value_dim


@_path(
    attended=_attended,
    query=_queries,
    key=lambda case: (case.keys, case.heads * case.dim),
    value=lambda case: (case.keys, case.heads * case.value_dim),
    gate=_channels,
    grad=_attended,
)
def _prompts(ops, case, attended, query, key, value, gate, grad):
    prompts = key, value, gate, 0.3
    coded = list(ops.encode_heads(query, *case.code, True, True, case.seed))
    return (
        ops.prompt_attention(attended, query, *prompts),
        *ops.prompt_attention_backward(grad, coded, *prompts, *case.code),
    )
