"""Running a module in tiles, so that its working set is that of one tile.

A module that treats samples (any block of a vision backbone) or tokens (an MLP) one by one can run on a few of them at
a time. `run_tiled` does so inside one `torch.autograd.Function`: forward builds a small autograd graph for every tile
and keeps the edges where it starts and ends; backward differentiates one graph after the other. What the operators
inside keep is the same as without tiles and goes through their own ``save_for_backward``; what is saved is everything
else: the full-width hidden tensors, the operands and gradients of one layer's backward pass.

It is right whatever the module trains, and pays where its weights are frozen: gradients of trained weights are added
up over tiles. `Certificate` is the evidence that a module may be tiled.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import GraphExecGroup


_TENSOR = object()  # stands for a tensor in the flattened result of a call
_state = threading.local()


def inside_tile() -> bool:
    """Whether the calling thread is running a tile, or a trial of `certify`."""
    return getattr(_state, "depth", 0) > 0


@contextmanager
def _tile() -> Iterator[None]:
    _state.depth = getattr(_state, "depth", 0) + 1
    try:
        yield
    finally:
        _state.depth -= 1


class _Entry(torch.autograd.Function):
    """The identity, as the first node of a tile's graph.

    It depends on ``handle``, an empty tensor that requires grad, and not on a leaf made of ``x``, which the graph
    would keep alive. Its own backward never runs: gradients are captured as they arrive.
    """

    @staticmethod
    def forward(ctx, x: Tensor, handle: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        return None, None


class SampleDraws(TorchFunctionMode):
    """Draws the random numbers of stochastic depth for all samples in the first tile, so that their stream is the
    stock one.

    Stochastic depth draws one number a sample, by ``torch.rand(shape)`` or ``tensor.bernoulli_(p)``. Other draws are
    left alone: a `Certificate` is only given where there are none.
    """

    def __init__(self, count: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.count = count
        self.generator = generator
        self.drawn: list[Tensor] = []
        self.rows = slice(0, count)
        self.position = 0

    @staticmethod
    def concerns(func: Callable[..., Any]) -> bool:
        """Whether ``func`` may be one of the draws."""
        return func is torch.rand or func is Tensor.bernoulli_

    def select(self, rows: slice) -> None:
        """Serve ``rows`` of every draw from here on."""
        self.rows, self.position = rows, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.rand and kwargs.get("generator") is None and kwargs.get("out") is None:
            shape = torch.Size(kwargs.pop("size", args[0] if args and not isinstance(args[0], int) else args))
            if self._one_a_sample(shape):
                options = {**kwargs, "generator": self.generator}
                return self._rows(lambda: torch.rand((self.count, *shape[1:]), **options))
            return func(shape, **kwargs)
        if func is Tensor.bernoulli_ and kwargs.get("generator") is None and self._one_a_sample(args[0].shape):
            target, *rest = args
            options = {**kwargs, "generator": self.generator}
            return target.copy_(
                self._rows(lambda: target.new_empty((self.count, *target.shape[1:])).bernoulli_(*rest, **options))
            )
        return func(*args, **kwargs)

    def _one_a_sample(self, shape: Sequence[int]) -> bool:
        return bool(shape) and shape[0] == self.rows.stop - self.rows.start and all(size == 1 for size in shape[1:])

    def _rows(self, draw: Callable[[], Tensor]) -> Tensor:
        if self.position == len(self.drawn):
            self.drawn.append(draw())
        self.position += 1
        return self.drawn[self.position - 1][self.rows]


@dataclass
class _Call:
    """One call of a tiled function; filled in by the forward pass with what is needed to rebuild its result."""

    function: Callable[..., Any]
    leaves: list[Any]  # of (args, kwargs)
    spec: Any
    shared: list[int]  # positions in `leaves` of the tensors that need a gradient and are not tiled
    masks: list[int]  # positions of the tensors that are tiled beside the first and need no gradient
    dim: int
    tiles: list[slice]
    draws: SampleDraws | None
    outputs: list[Any] | None = None  # leaves of the result, _TENSOR where a tensor goes
    output_spec: Any = None

    def run(self, tile: Tensor, rows: slice, shared: Sequence[Tensor]) -> tuple[list[Any], Any]:
        leaves = [tile, *self.leaves[1:]]
        for position in self.masks:
            leaves[position] = leaves[position].narrow(self.dim, rows.start, rows.stop - rows.start)
        for position, tensor in zip(self.shared, shared):
            leaves[position] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        return tree_flatten(self.function(*args, **kwargs))


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, x: Tensor, shared_count: int, *tensors: Tensor):
        ctx.set_materialize_grads(False)
        shared, ctx.parameters = tensors[:shared_count], tensors[shared_count:]
        ctx.call, ctx.graphs = call, []
        ctx.like = (x.shape, x.stride(), x.dtype, x.device) if x.requires_grad else None
        buffers: list[Tensor] = []
        with _tile(), call.draws or nullcontext():
            for rows in call.tiles:
                ctx.graphs.append((rows, *_run_tile(call, x, rows, shared, buffers)))
        differentiable = [edge is not None for edge in ctx.graphs[0][1]]
        ctx.mark_non_differentiable(*(b for b, needed in zip(buffers, differentiable) if not needed))
        return tuple(buffers)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "double backward (create_graph=True) through a module that runs in tiles is not supported; use "
                "restore_activations(model) before taking higher-order gradients"
            )
        if ctx.graphs is None:
            raise RuntimeError(
                "Trying to backward through a module that runs in tiles a second time: its graphs were freed. Specify "
                "retain_graph=True on the first call if you need this."
            )
        call = ctx.call
        keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        graphs = ctx.graphs
        if not keep_graph:
            ctx.graphs = None
        d_x = None
        if ctx.like is not None:
            shape, stride, dtype, device = ctx.like
            d_x = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        sums: list[Tensor | None] = [None] * (len(call.shared) + len(ctx.parameters))
        # one recomputation for all tiles where the module is checkpointed
        group = nullcontext() if torch._C._get_graph_exec_group() is not None else GraphExecGroup()
        with group:
            for index, (rows, exits, entries) in enumerate(graphs):
                if not keep_graph:
                    graphs[index] = None
                gradients = _tile_gradients(call, rows, exits, grads, [*entries, *ctx.parameters], keep_graph)
                if d_x is not None:
                    target = d_x.narrow(call.dim, rows.start, rows.stop - rows.start)
                    target.zero_() if gradients[0] is None else target.copy_(gradients[0])
                    gradients = gradients[1:]
                for position, gradient in enumerate(gradients):
                    sums[position] = _added(sums[position], gradient, owned=index > 1)
                del exits, entries, gradients
        return None, d_x, None, *sums


def _run_tile(
    call: _Call, x: Tensor, rows: slice, shared: Sequence[Tensor], buffers: list[Tensor]
) -> tuple[list[GradientEdge | None], list[GradientEdge]]:
    """Run one tile, write its results to the buffers (which the first tile makes) and return the edges at which its
    graph ends (None for results without gradient) and starts."""
    if call.draws is not None:
        call.draws.select(rows)
    tile = x.narrow(call.dim, rows.start, rows.stop - rows.start).detach()
    handle = torch.empty(0, requires_grad=True)
    with torch.enable_grad():
        if x.requires_grad:
            tile = _Entry.apply(tile, handle)
        entered = [_Entry.apply(tensor.detach(), handle) for tensor in shared]
        leaves, call.output_spec = call.run(tile, rows, entered)
    results = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if call.outputs is None:
        call.outputs = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        buffers.extend(_whole(result, call.dim, rows, x.shape[call.dim]) for result in results)
    for buffer, result in zip(buffers, results, strict=True):
        ratio = buffer.shape[call.dim] // x.shape[call.dim]
        buffer.narrow(call.dim, ratio * rows.start, result.shape[call.dim]).copy_(result.detach())
    entries = [get_gradient_edge(t) for t in ([tile] if x.requires_grad else []) + entered]
    return [get_gradient_edge(result) if result.requires_grad else None for result in results], entries


def _tile_gradients(
    call: _Call,
    rows: slice,
    exits: list[GradientEdge | None],
    grads: Sequence[Tensor | None],
    inputs: list[GradientEdge | Tensor],
    keep_graph: bool,
) -> Sequence[Tensor | None]:
    edges, seeds = [], []
    for edge, grad in zip(exits, grads):
        if edge is not None and grad is not None:
            ratio = grad.shape[call.dim] // call.tiles[-1].stop
            edges.append(edge)
            seeds.append(grad.narrow(call.dim, ratio * rows.start, ratio * (rows.stop - rows.start)))
    if not edges:
        return [None] * len(inputs)
    return torch.autograd.grad(edges, inputs, seeds, retain_graph=keep_graph, allow_unused=True)


def _added(total: Tensor | None, gradient: Tensor | None, owned: bool) -> Tensor | None:
    """The sum; written into ``total`` when it is ours (the first gradient may be shared with another parameter)."""
    if gradient is None or total is None:
        return total if gradient is None else gradient
    return total.add_(gradient) if owned else total + gradient


def _whole(result: Tensor, dim: int, rows: slice, count: int) -> Tensor:
    """An uninitialised tensor for all tiles' results, laid out in memory as this tile's is."""
    shape = list(result.shape)
    shape[dim] = shape[dim] // (rows.stop - rows.start) * count
    order = sorted(range(result.dim()), key=lambda d: (-result.stride(d), d))
    if dim in order:
        order.remove(dim)
        order.insert(0 if dim == 0 else dim, dim)
    empty = torch.empty([shape[d] for d in order], dtype=result.dtype, device=result.device)
    return empty.permute([order.index(d) for d in range(result.dim())])


def run_tiled(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    parameters: Sequence[Tensor],
    size: int,
    dim: int = 0,
    masks: Sequence[int] = (),
    draws: bool = False,
) -> Any:
    """``function(*args, **kwargs)``, computed ``size`` rows at a time along ``dim`` of the first argument.

    Args:
        function: treats the rows along ``dim`` independently; its result is made (as a pytree) of tensors with a whole
            multiple of the first argument's rows along ``dim``, in the same order, and of other values, equal for all
            tiles.
        args, kwargs: the first leaf (as pytrees) is the tensor to be tiled; others are passed whole to every tile.
        parameters: the trainable tensors that ``function`` reads, apart from its arguments.
        size: rows in a tile, at least 1; the last one may have fewer.
        masks: positions of further leaves with the same rows, tiled alike; they need no gradient.
        draws: whether ``function`` draws random numbers, one a sample (see `SampleDraws`).

    Raises:
        RuntimeError: in backward, when a second derivative is asked for.
    """
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    x = leaves[0]
    count = x.shape[dim]
    shared = [i for i, leaf in enumerate(leaves) if i and isinstance(leaf, Tensor) and leaf.requires_grad]
    call = _Call(
        function=function,
        leaves=[None, *leaves[1:]],
        spec=spec,
        shared=shared,
        masks=list(masks),
        dim=dim,
        tiles=[slice(start, min(start + size, count)) for start in range(0, count, size)],
        draws=SampleDraws(count) if draws else None,
    )
    buffers = iter(_Tiles.apply(call, x, len(shared), *(leaves[i] for i in shared), *parameters))
    result = [next(buffers) if leaf is _TENSOR else leaf for leaf in call.outputs]
    call.function = call.leaves = call.outputs = None
    return tree_unflatten(result, call.output_spec)


@dataclass(frozen=True)
class Certificate:
    """Whether a module may be tiled along a dimension, and if so whether it draws random numbers for every sample.

    ``reason`` says why it may not be tiled; None when it may. ``tentative``: found without values, so not to be relied
    on later.
    """

    reason: str | None = None
    draws: bool = False
    tentative: bool = False


def certify(
    module: nn.Module,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    dim: int = 0,
    masks: Sequence[int] = (),
) -> Certificate:
    """Find out by trial whether ``function``, the forward of ``module``, treats rows along ``dim`` independently.

    Two rows are computed together, then one alone; the common row has to be the same up to rounding. What is computed
    is thrown away; random generators are left as they were. Not tiled are functions that draw random numbers other
    than one a sample, write buffers, or depend on trainable tensors that are neither arguments nor the module's
    parameters.

    Under `FakeTensorMode` there are no values to compare, only shapes, and the certificate is tentative.
    """
    # what the trial keeps is of no interest to the hooks of others
    with _tile(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        buffers = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers()]
        certificate = _certify(module, function, args, kwargs, dim, masks)
        if any(buffer._version != version for buffer, version, _ in buffers):
            for buffer, _, before in buffers:  # all: batch normalisation writes some without counting it
                buffer.copy_(before)
            return Certificate("it writes buffers")
        return certificate


def _certify(module, function, args, kwargs, dim, masks) -> Certificate:
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    x = leaves[0].detach()
    others = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves[1:]]
    devices = [x.device] if x.device.type == "cuda" else []

    def run(rows: int, tile: Tensor | None = None) -> list[Any]:
        tiled = [x.narrow(dim, 0, rows) if tile is None else tile, *others]
        for position in masks:
            tiled[position] = tiled[position].narrow(dim, 0, rows)
        inner_args, inner_kwargs = tree_unflatten(tiled, spec)
        return tree_flatten(function(*inner_args, **inner_kwargs))[0]

    draws = SampleDraws(2, torch.Generator(x.device) if not _is_fake(x) else None)
    with torch.random.fork_rng(devices):
        before = _random_state(x)
        try:
            with torch.no_grad(), draws:
                together = run(2)
                draws.select(slice(0, 1))
                alone = run(1)
        except Exception as error:  # whatever a module of unknown make raises: on its whole input it may well run
            return Certificate(f"it fails on fewer rows ({error})")
        if not _is_fake(x) and not all(map(torch.equal, before, _random_state(x))):
            return Certificate("it draws random numbers")
        with torch.enable_grad():
            tile = x.narrow(dim, 0, 1).requires_grad_()
            graph = run(1, tile)
    if reason := _compare(together, alone, x, dim):
        return Certificate(reason)
    known = {id(tile), *map(id, module.parameters())}
    if any(id(leaf) not in known for leaf in _graph_leaves(graph)):
        return Certificate("it depends on trainable tensors that are not its own")
    return Certificate(draws=bool(draws.drawn), tentative=_is_fake(x))


def _is_fake(x: Tensor) -> bool:
    from torch._subclasses.fake_tensor import is_fake

    return is_fake(x)


def _random_state(x: Tensor) -> list[Tensor]:
    if _is_fake(x):
        return []
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(x.device)] if x.device.type == "cuda" else [])


def _compare(together: list[Any], alone: list[Any], x: Tensor, dim: int) -> str | None:
    if len(together) != len(alone):
        return "its result depends on the number of rows"
    for both, one in zip(together, alone):
        if not isinstance(both, Tensor):
            if isinstance(one, Tensor) or (both is not one and both != one):
                return "its result depends on the number of rows"
            continue
        ratio = one.shape[dim] if one.dim() > dim else 0
        expected = list(one.shape)
        if ratio:
            expected[dim] *= 2
        if not ratio or list(both.shape) != expected or both.dtype != one.dtype:
            return "its result does not have a fixed number of rows for every row of its input"
        if _is_fake(both) or not both.is_floating_point():
            continue
        part = both.narrow(dim, 0, ratio).double()
        one = one.double()
        row = x.narrow(dim, 0, 1).double()
        # what a residual block adds may be far smaller than what it passes on
        change = (one - row).abs().max() if one.shape == row.shape else one.abs().max()
        tolerance = 5e-3 * change + 16 * torch.finfo(both.dtype).eps * one.abs().max()
        if not (part - one).abs().max() <= tolerance:
            return "rows influence one another"
    return None


def _graph_leaves(results: list[Any]) -> list[Tensor]:
    """The leaf tensors that autograd would send gradients to."""
    pending = [result.grad_fn for result in results if isinstance(result, Tensor) and result.grad_fn is not None]
    seen, leaves = set(pending), []
    while pending:
        node = pending.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return leaves
