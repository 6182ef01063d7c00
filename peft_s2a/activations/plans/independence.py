"""Proof that a recorded forward pass treats samples one by one, so that it may run on a few of them at a time.

Samples are followed through the graph from the first dimension of the arguments: every operator's rule says where they
are in its result, or that it mixes them. An operator without a rule is taken to mix them. What is computed from
parameters and constants alone is the same for every sample; where it stands beside samples (an expanded class token, a
mask repeated for every image) it has to repeat itself from one sample to the next.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...compat import OpOverload
from .graph import is_random, memories, value, written
from .trace import aten


class Dependent(Exception):
    """Why samples cannot be told apart, in words that go after "because"."""


@dataclass(frozen=True)
class Samples:
    """Where the samples are: dimension ``dim`` holds ``rows`` neighbours of each, one sample after the other."""

    dim: int
    rows: int


@dataclass(frozen=True)
class Shared:
    """Equal for all samples: dimension ``d`` repeats itself every ``periods[d]`` entries."""

    periods: dict[int, int] = field(default_factory=dict)


State = Samples | Shared
_RULES: dict[Any, Callable[..., Any]] = {}


def _rule(*packets: Any):
    def register(function):
        _RULES.update(dict.fromkeys(packets, function))
        return function

    return register


class _Proof:
    def __init__(self, count: int, memory: dict[fx.Node, Any]) -> None:
        self.count, self.memory = count, memory
        self.states: dict[fx.Node, Any] = {}

    def of(self, x: Any) -> Any:
        return self.states[x] if isinstance(x, fx.Node) else Shared()

    def samples(self, *operands: Any) -> bool:
        return any(isinstance(self.of(x), Samples) for x in operands if isinstance(x, fx.Node))


def follow(graph: fx.Graph, batched: Sequence[fx.Node], count: int, results: Sequence[fx.Node]) -> dict[fx.Node, Any]:
    """Where ``count`` samples are in ``results`` and in what these depend on, starting from the first dimension of the
    placeholders ``batched``.

    Random numbers are taken to be drawn for every sample where their first dimension allows it: a caller that runs a few
    samples at a time has to draw them for all.

    Raises:
        Dependent: if samples influence one another, or that cannot be excluded.
    """
    memory = memories(graph)
    proof = _Proof(count, memory)
    needed = set(ancestors(graph, results))
    for node in graph.nodes:
        if node.op == "placeholder":
            proof.states[node] = Samples(0, 1) if node in batched else Shared()
        elif node.op == "get_attr":
            proof.states[node] = Shared()
        elif node.op == "call_function" and node in needed:
            proof.states[node] = _state(proof, node)
    if not all(isinstance(proof.states[result], Samples) for result in results):
        raise Dependent("a result is not made of samples")
    return proof.states


def ancestors(graph: fx.Graph, results: Sequence[fx.Node]) -> list[fx.Node]:
    """What the results depend on, and what writes to it, in order."""
    memory = memories(graph)
    needed, touched = set(results), {memory[r] for r in results}
    for node in reversed(graph.nodes):
        if node in needed or touched.intersection(memory[o] for o in written(node)):
            needed.add(node)
            needed.update(node.all_input_nodes)
            touched.update(memory[o] for o in node.all_input_nodes)
    return [node for node in graph.nodes if node in needed]


def _state(proof: _Proof, node: fx.Node) -> Any:
    target = node.target
    if target is operator.getitem:
        state = proof.of(node.args[0])
        return state[node.args[1]] if isinstance(state, tuple) else state
    packet = getattr(target, "overloadpacket", target)
    overwritten = written(node)
    if is_random(node):
        return _drawn(proof, node)
    rule = _RULES.get(packet)
    if rule is not None:
        state = rule(proof, node, *node.args, **node.kwargs)
    elif isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags:
        state = _pointwise(proof, node)
    elif not proof.samples(*node.all_input_nodes):
        state = Shared()
    else:
        raise Dependent(f"{packet} may mix them")
    for operand in overwritten:
        if isinstance(state, Samples) and proof.of(operand) != state:
            raise Dependent(f"{packet} writes where samples cannot be told apart")
        if isinstance(state, Shared):  # what repeated itself before may no longer do so
            state = Shared()
            for other, memory in proof.memory.items():
                if memory is proof.memory[operand] and other in proof.states:
                    if isinstance(proof.states[other], Samples):
                        raise Dependent(f"{packet} writes over samples")
                    proof.states[other] = Shared()
    return state


def _drawn(proof: _Proof, node: fx.Node) -> State:
    shape = value(node).shape if isinstance(value(node), Tensor) else ()
    if len(shape) and shape[0] % proof.count == 0:
        return Samples(0, shape[0] // proof.count)
    raise Dependent("it draws random numbers that do not go by sample")


def _join(proof: _Proof, operands: Sequence[fx.Node], dims: int) -> State:
    """The state of a result of ``dims`` dimensions, to which operands are broadcast."""
    found = {(s.dim - value(o).dim() + dims, s.rows) for o in operands if isinstance(s := proof.of(o), Samples)}
    if len(found) > 1:
        raise Dependent("samples meet in different dimensions")
    if not found:
        periods: list[dict[int, int]] = []
        for o in operands:
            shift = dims - value(o).dim()
            own = {d + shift: p for d, p in proof.of(o).periods.items()}
            own.update(dict.fromkeys(range(shift), 1))
            own.update({d + shift: 1 for d, size in enumerate(value(o).shape) if size == 1})
            periods.append(own)
        common = set.intersection(*map(set, periods)) if periods else set()
        return Shared({d: math.lcm(*(p[d] for p in periods)) for d in common})
    ((dim, rows),) = found
    for o in operands:
        if isinstance(proof.of(o), Shared):
            _check_repeats(proof, o, dim - dims + value(o).dim(), rows)
    return Samples(dim, rows)


def _check_repeats(proof: _Proof, operand: fx.Node, dim: int, rows: int) -> None:
    """That a shared operand is the same beside every sample, whose rows lie along ``dim`` of it."""
    if dim < 0 or value(operand).shape[dim] == 1:
        return
    period = proof.of(operand).periods.get(dim)
    if period is None or rows % period:
        raise Dependent("something that is not the same for every sample stands beside them")


def _pointwise(proof: _Proof, node: fx.Node) -> State:
    return _join(proof, [o for o in node.all_input_nodes if isinstance(value(o), Tensor)], value(node).dim())


def _same(proof: _Proof, node: fx.Node, x: fx.Node, *args: Any, **kwargs: Any) -> State:
    return proof.of(x)


_rule(
    aten.clone, aten._to_copy, aten.detach, aten.alias, aten.lift_fresh_copy, aten.contiguous, aten.zeros_like,
    aten.ones_like, aten.full_like, aten.empty_like, aten.fill_, aten.zero_, aten.fill,
)(_same)  # fmt: skip


@_rule(aten.zeros, aten.ones, aten.full, aten.empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty,
       aten.empty_strided, aten.new_empty_strided, aten.scalar_tensor)  # fmt: skip
def _created(proof, node, *args, **kwargs):
    return Shared(dict.fromkeys(range(value(node).dim()), 1))


@_rule(aten.copy_)
def _copy(proof, node, target, source, *args):
    return _join(proof, [target, source], value(target).dim()) if proof.samples(target, source) else proof.of(target)


@_rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias)
def _view(proof, node, x, *args):
    state, old, new = proof.of(x), value(x).shape, value(node).shape
    if isinstance(state, Samples):
        found = _regrouped(old, new, state.dim, state.rows, proof.count)
        if found is None:
            raise Dependent("its shapes do not keep samples together")
        return Samples(*found)
    found = [_regrouped(old, new, d, period, old[d] // period) for d, period in state.periods.items()]
    return Shared(dict(filter(None, found)))


def _regrouped(old: Sequence[int], new: Sequence[int], dim: int, rows: int, count: int) -> tuple[int, int] | None:
    """(dimension, entries) that ``count`` groups of ``rows`` entries along ``dim`` have after a change of shape."""
    before, inside = math.prod(old[:dim]), rows * math.prod(old[dim + 1 :])
    for d in range(len(new)):
        after = math.prod(new[d + 1 :])
        if math.prod(new[:d]) == before and after and inside % after == 0 and new[d] == count * (inside // after):
            return d, inside // after
    return None


def _moved(proof: _Proof, x: fx.Node, to: Callable[[int], int]) -> State:
    state = proof.of(x)
    if isinstance(state, Samples):
        return Samples(to(state.dim), state.rows)
    return Shared({to(d): p for d, p in state.periods.items()})


@_rule(aten.t, aten.transpose, aten.permute, aten.mT, aten.numpy_T)
def _permute(proof, node, x, *args):
    dims = value(x).dim()
    order = list(range(dims))
    if len(args) == 2:
        a, b = (d % dims for d in args)
        order[a], order[b] = b, a
    elif args:
        order = [d % dims for d in args[0]]
    else:
        order.reverse()
    return _moved(proof, x, order.index)


@_rule(aten.unsqueeze)
def _unsqueeze(proof, node, x, dim):
    dim %= value(node).dim()
    return _moved(proof, x, lambda d: d + (d >= dim))


@_rule(aten.squeeze)
def _squeeze(proof, node, x, dims=None):
    shape = value(x).shape
    dims = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(shape) for d in dims if shape[d] == 1}
    return _without(proof, x, gone)


def _without(proof: _Proof, x: fx.Node, gone: set[int]) -> State:
    """The state after dimensions, of which none holds samples, are gone."""
    state = proof.of(x)
    if isinstance(state, Samples) and state.dim in gone:
        raise Dependent("it takes samples apart")
    if isinstance(state, Shared):
        return Shared({d - sum(g < d for g in gone): p for d, p in state.periods.items() if d not in gone})
    return _moved(proof, x, lambda d: d - sum(g < d for g in gone))


@_rule(aten.expand)
def _expand(proof, node, x, size, **kwargs):
    shift = value(node).dim() - value(x).dim()
    state = _moved(proof, x, lambda d: d + shift)
    if isinstance(state, Samples):
        return state
    stretched = {d + shift: 1 for d, s in enumerate(value(x).shape) if s == 1}
    return Shared({**state.periods, **stretched, **dict.fromkeys(range(shift), 1)})


@_rule(aten.repeat)
def _repeat(proof, node, x, repeats):
    shift = len(repeats) - value(x).dim()
    state = _moved(proof, x, lambda d: d + shift)
    if isinstance(state, Samples):
        if repeats[state.dim] != 1:
            raise Dependent("it repeats the batch")
        return state
    shape = [1] * shift + list(value(x).shape)
    return Shared({**{d: shape[d] for d in range(len(shape)) if repeats[d] > 1}, **state.periods})


@_rule(aten.slice)
def _slice(proof, node, x, dim=0, *args):
    if value(node).shape == value(x).shape:
        return proof.of(x)
    return _kept_whole(proof, node, x, [dim])


@_rule(aten.split, aten.split_with_sizes, aten.chunk)
def _split(proof, node, x, size, dim=0):
    return _kept_whole(proof, node, x, [dim])


@_rule(aten.roll)
def _roll(proof, node, x, shifts, dims=()):
    return _kept_whole(proof, node, x, dims or range(value(x).dim()))


@_rule(aten.flip)
def _flip(proof, node, x, dims):
    return _kept_whole(proof, node, x, dims)


@_rule(aten.cumsum, aten.cumprod, aten._softmax, aten._log_softmax, aten._safe_softmax, aten.sort, aten.topk, aten.glu)
def _along(proof, node, x, *args, **kwargs):
    packet = node.target.overloadpacket
    position = {aten.topk: 1, aten.sort: 0}.get(packet, 0)
    dim = kwargs.get("dim", args[position] if len(args) > position else -1)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise Dependent(f"{packet} may mix them")
    return _kept_whole(proof, node, x, [dim])


@_rule(aten.index_select)
def _index_select(proof, node, x, dim, index):
    if proof.samples(index):
        raise Dependent("samples choose")
    return _kept_whole(proof, node, x, [dim])


@_rule(aten.constant_pad_nd)
def _pad(proof, node, x, pad, *args):
    dims = value(x).dim()
    return _kept_whole(proof, node, x, [dims - 1 - i // 2 for i, width in enumerate(pad) if width])


def _kept_whole(proof: _Proof, node: fx.Node, x: fx.Node, dims: Sequence[int]) -> State:
    """The state of something that works along ``dims``, none of which may hold samples."""
    state, changed = proof.of(x), {d % value(x).dim() for d in dims}
    if isinstance(state, Samples):
        if state.dim in changed:
            raise Dependent(f"{getattr(node.target, 'overloadpacket', node.target)} works along the batch")
        return state
    return Shared({d: p for d, p in state.periods.items() if d not in changed})


@_rule(aten.select)
def _select(proof, node, x, dim, index):
    return _without(proof, x, {dim % value(x).dim()})


@_rule(aten.unbind)
def _unbind(proof, node, x, dim=0):
    return _without(proof, x, {dim % value(x).dim()})


@_rule(aten.cat)
def _cat(proof, node, tensors, dim=0):
    dims = value(node).dim()
    state = _join(proof, tensors, dims)
    if isinstance(state, Samples):
        if state.dim == dim % dims:
            raise Dependent("it puts batches one after the other")
        for tensor in tensors:
            if value(tensor).dim() != dims:
                raise Dependent("it joins an empty tensor")
        return state
    return Shared({d: p for d, p in state.periods.items() if d != dim % dims})


@_rule(aten.stack)
def _stack(proof, node, tensors, dim=0):
    dims = value(node).dim()
    state = _join(proof, tensors, dims - 1)
    dim %= dims
    if isinstance(state, Samples):
        return Samples(state.dim + (state.dim >= dim), state.rows)
    return Shared({d + (d >= dim): p for d, p in state.periods.items()})


@_rule(aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.std, aten.logsumexp, aten.prod, aten.any, aten.all,
       aten.argmax, aten.argmin, aten.max, aten.min, aten.var_mean)  # fmt: skip
def _reduce(proof, node, x, dim=None, *args, **kwargs):
    packet = node.target.overloadpacket
    dims = value(x).dim()
    if dim is None or dim == [] or isinstance(dim, (bool, fx.Node)):
        if proof.samples(*node.all_input_nodes):
            raise Dependent(f"{packet} sums up the batch")
        return Shared()
    gone = {d % dims for d in ([dim] if isinstance(dim, int) else dim)}
    state = proof.of(x)
    if isinstance(state, Samples) and state.dim in gone:
        raise Dependent(f"{packet} works along the batch")
    result = value(node)[0] if isinstance(value(node), (tuple, list)) else value(node)
    if result.dim() == dims:
        return _kept_whole(proof, node, x, list(gone))
    return _without(proof, x, gone)


@_rule(aten.linalg_vector_norm)
def _norm(proof, node, x, ord=2, dim=None, *args, **kwargs):
    return _reduce(proof, node, x, dim)


@_rule(aten.mm)
def _mm(proof, node, a, b):
    one, other = proof.of(a), proof.of(b)
    if isinstance(one, Samples) and isinstance(other, Shared) and one.dim == 0:
        return Samples(0, one.rows)
    if isinstance(one, Shared) and isinstance(other, Samples) and other.dim == 1:
        return Samples(1, other.rows)
    if isinstance(one, Shared) and isinstance(other, Shared):
        return _product(one, other, 2)
    raise Dependent("a product sums over the batch")


def _product(one: Shared, other: Shared, dims: int) -> Shared:
    """The state of a product of matrices, one or, with three dimensions, several of them."""
    rows, columns = dims - 2, dims - 1
    if columns in one.periods and rows in other.periods:  # a sum whose length may go by the batch
        return Shared()
    periods = {d: s.periods[d] for d, s in ((rows, one), (columns, other)) if d in s.periods}
    if dims == 3 and 0 in one.periods and 0 in other.periods:
        periods[0] = math.lcm(one.periods[0], other.periods[0])
    return Shared(periods)


@_rule(aten.addmm)
def _addmm(proof, node, added, a, b, **kwargs):
    return _plus(proof, _mm(proof, node, a, b), added, 2)


@_rule(aten.bmm)
def _bmm(proof, node, a, b):
    one, other = proof.of(a), proof.of(b)
    if isinstance(one, Shared) and isinstance(other, Shared):
        return _product(one, other, 3)
    batch = [s for s in (one, other) if isinstance(s, Samples) and s.dim == 0]
    if batch:
        if len({s.rows for s in batch}) > 1 or any(isinstance(s, Samples) and s.dim for s in (one, other)):
            raise Dependent("samples meet in different dimensions")
        for operand, state in ((a, one), (b, other)):
            if isinstance(state, Shared):
                _check_repeats(proof, operand, 0, batch[0].rows)
        return Samples(0, batch[0].rows)
    if isinstance(one, Samples) and one.dim == 1 and isinstance(other, Shared):
        return Samples(1, one.rows)
    if isinstance(other, Samples) and other.dim == 2 and isinstance(one, Shared):
        return Samples(2, other.rows)
    raise Dependent("a product sums over the batch")


@_rule(aten.baddbmm)
def _baddbmm(proof, node, added, a, b, **kwargs):
    return _plus(proof, _bmm(proof, node, a, b), added, 3)


def _plus(proof: _Proof, state: State, added: fx.Node, dims: int) -> State:
    """``state`` of a sum with ``added``, which is broadcast."""
    other = proof.of(added)
    if isinstance(other, Samples) and state != Samples(other.dim - value(added).dim() + dims, other.rows):
        raise Dependent("samples meet in different dimensions")
    if isinstance(other, Shared) and isinstance(state, Samples):
        _check_repeats(proof, added, state.dim - dims + value(added).dim(), state.rows)
    return state if isinstance(state, Samples) else Shared()


@_rule(aten.convolution)
def _convolution(proof, node, x, weight, bias=None, *args):
    return _first(proof, node, x, weight, bias)


def _first(proof: _Proof, node: fx.Node, x: fx.Node, *shared: Any) -> State:
    """The state of an operator that treats what lies along the first dimension of ``x`` alike, with shared parameters."""
    state = proof.of(x)
    if proof.samples(*shared) or (isinstance(state, Samples) and state.dim):
        raise Dependent(f"{getattr(node.target, 'overloadpacket', node.target)} may mix them")
    return state if isinstance(state, Samples) else Shared()


@_rule(aten.native_layer_norm)
def _layer_norm(proof, node, x, shape, weight, bias, eps):
    if proof.samples(weight, bias):
        raise Dependent("samples normalise samples")
    dims = value(x).dim()
    return _kept_whole(proof, node, x, range(dims - len(shape), dims))


@_rule(aten._fused_rms_norm)
def _rms_norm(proof, node, x, shape, weight=None, eps=None):
    return _layer_norm(proof, node, x, shape, weight, None, eps)


@_rule(aten.native_group_norm)
def _group_norm(proof, node, x, weight, bias, *args):
    return _first(proof, node, x, weight, bias)


@_rule(aten.native_batch_norm, aten.cudnn_batch_norm, aten.miopen_batch_norm)
def _batch_norm(proof, node, x, weight, bias, mean, variance, training, *args):
    if training:
        raise Dependent("batch normalisation takes statistics of the batch")
    return _first(proof, node, x, weight, bias, mean, variance)


@_rule(aten._native_batch_norm_legit_no_training)
def _frozen_batch_norm(proof, node, x, weight, bias, mean, variance, *args):
    return _first(proof, node, x, weight, bias, mean, variance)


@_rule(aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_avg_pool2d,
       aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten.upsample_nearest2d, aten.pixel_shuffle,
       aten.pixel_unshuffle, aten.im2col, torch.ops.s2a.max_pool2d)  # fmt: skip
def _pool(proof, node, x, *args, **kwargs):
    if value(x).dim() != 4:
        raise Dependent("it pools something that is no batch of images")
    return _first(proof, node, x)


@_rule(aten.embedding)
def _embedding(proof, node, weight, index, *args):
    if proof.samples(weight):
        raise Dependent("samples are looked up")
    state = proof.of(index)
    return state if isinstance(state, Samples) else Shared()


@_rule(aten.gather)
def _gather(proof, node, x, dim, index, **kwargs):
    state = proof.of(x)
    if state != proof.of(index) or not isinstance(state, Samples):
        raise Dependent("samples choose")
    return _kept_whole(proof, node, x, [dim])


@_rule(aten.index)
def _index(proof, node, x, indices):
    state = proof.of(x)
    if proof.samples(*(i for i in indices if i is not None)):
        raise Dependent("samples choose")
    if isinstance(state, Shared):
        return Shared()
    picked = [d for d, i in enumerate(indices) if i is not None]
    if state.dim >= picked[0]:
        raise Dependent("it picks among samples")
    if picked[-1] - picked[0] >= len(picked):  # what is picked from dimensions far apart goes to the front
        return Samples(state.dim + max(value(indices[d]).dim() for d in picked), state.rows)
    return state


@_rule(aten._scaled_dot_product_flash_attention_for_cpu)
def _cpu_attention(proof, node, query, key, value_, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    return _attention(proof, node, query, key, value_, attn_mask, dropout_p)


@_rule(aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_fused_attention_overrideable)
def _flash_attention(proof, node, query, key, value_, *args, **kwargs):
    mask = args[0] if args and isinstance(args[0], fx.Node) else kwargs.get("attn_bias")
    return _attention(proof, node, query, key, value_, mask, _dropout(args))


@_rule(aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention)
def _efficient_attention(proof, node, query, key, value_, bias, compute_log_sumexp, dropout_p=0.0, *args, **kwargs):
    return _attention(proof, node, query, key, value_, bias, dropout_p)


def _dropout(args: Sequence[Any]) -> float:
    return next((a for a in args if isinstance(a, float)), 0.0)


def _attention(proof: _Proof, node: fx.Node, query, key, value_, mask, dropout_p: float) -> State:
    states = {proof.of(x) if isinstance(proof.of(x), Samples) else None for x in (query, key, value_)}
    if dropout_p or len(states) > 1 or None in states:
        raise Dependent("attention draws random numbers, or reads something that is shared")
    (state,) = states
    if state.dim != 0 or value(query).dim() != 4:
        raise Dependent("attention goes over the batch")
    if isinstance(mask, fx.Node):
        dims = value(mask).dim()
        if isinstance(proof.of(mask), Samples):
            if (proof.of(mask).dim - dims + 4, proof.of(mask).rows) != (0, state.rows):
                raise Dependent("samples meet in different dimensions")
        else:
            _check_repeats(proof, mask, dims - 4, state.rows)
    return state


@_rule(torch.ops.s2a.prompt_attention)
def _prompt_attention(proof, node, attended, query, key, value_, gate, *args):
    if proof.samples(key, value_, gate) or proof.of(attended) != proof.of(query):
        raise Dependent("prompts are not shared")
    return _first(proof, node, attended, key, value_, gate)
