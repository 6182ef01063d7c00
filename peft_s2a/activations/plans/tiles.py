"""Running a plan on a few samples at a time, so that its working set is theirs.

What is kept for backward is the same as without tiles; what is saved is everything else: wide hidden tensors, the
operands and gradients of one layer. That a module may be tiled is proved from its graph (`independence`), and that the
graph for fewer samples is the same program is checked operator by operator.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from ...compat import AUTOCAST_KEYS, BelowAutograd, DisableTorchFunction, WithoutKeys, tree_unflatten
from ..operators.common import refuse_double_backward
from .codegen import laid_out
from .graph import Halves, is_random, memories, split, value, written
from .independence import Dependent, Samples, Shared, ancestors, follow
from .run import Plan
from .trace import TENSOR, Joint, aten


# Which arguments of operators are sizes. Others, such as what a tensor is filled with, are the same for any number of samples.
_SIZES = {
    **dict.fromkeys((aten.zeros, aten.ones, aten.full, aten.empty, aten.rand, aten.randn), (0,)),
    **dict.fromkeys(
        (aten.view, aten._unsafe_view, aten.expand, aten.repeat, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty),
        (1,),
    ),
    aten.empty_strided: (0, 1),
    **dict.fromkeys((aten._reshape_alias, aten.new_empty_strided), (1, 2)),
    aten.native_group_norm: (3,),
}  # fmt: skip
_DRAWS = {aten.rand.default, aten.bernoulli_.float}


def sizes_of(count: int, tiles: int) -> list[int]:
    """``count`` samples shared out over ``tiles`` tiles, as evenly as can be."""
    return [count // tiles + (i < count % tiles) for i in range(tiles)]


def batched_arguments(joint: Joint) -> list[fx.Node]:
    """The arguments that hold samples, going by their first dimension."""
    first = value(joint.inputs[0])
    count = first.shape[0] if first.dim() else 0
    return [
        node for node in joint.inputs[: len(joint.arguments)] if value(node).dim() and value(node).shape[0] == count
    ]


def prove(joint: Joint) -> dict[fx.Node, Any]:
    """Where the samples are in the results of a call, and in what these depend on.

    Raises:
        Dependent: if they may influence one another.
    """
    for node in joint.graph.nodes:
        if is_random(node) and (node.target not in _DRAWS or node.meta.get("phase") != "forward"):
            raise Dependent("it draws random numbers other than one a sample")
        if node.target is aten.bernoulli_.float and not _is_fresh(joint.graph, node):
            raise Dependent("it draws random numbers into a part of a tensor, or over others")
        if node.target not in _DRAWS and any(o.op == "placeholder" for o in written(node)):
            raise Dependent("it writes buffers")
    results, _ = joint.graph.output_node().args
    batched = batched_arguments(joint)
    count = value(batched[0]).shape[0]
    return follow(joint.graph, batched, count, results)


def check_same_program(whole: Joint, tile: Joint, states: dict[fx.Node, Any], count: int, size: int) -> None:
    """That the results of a call recorded with ``size`` samples are computed as those with ``count`` are, whose ``states``
    were proved: with fewer entries there where the samples are, and nowhere else. What is shared has the same entries,
    more or less often; how often must not be seen in a number.

    Raises:
        Dependent: if an operator, or a number that is not a size, differs.
    """
    one, other = (ancestors(joint.graph, joint.graph.output_node().args[0]) for joint in (whole, tile))
    place = {node: i for i, node in enumerate(one)}
    place_in_tile = {node: i for i, node in enumerate(other)}

    def agree(a: Any, b: Any, sizes: bool) -> bool:
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            return isinstance(a, fx.Node) and isinstance(b, fx.Node) and place[a] == place_in_tile[b]
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(agree(x, y, sizes) for x, y in zip(a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(agree(a[k], b[k], sizes) for k in a)
        if type(a) is type(b) and a == b:
            return True
        return sizes and type(a) is int and type(b) is int and a * size == b * count

    def fits(a: fx.Node, b: fx.Node) -> bool:
        state, like, x = states.get(a), value(a), value(b)
        if not isinstance(like, Tensor):  # a tuple: its parts follow
            return True
        if isinstance(state, Samples):
            shape = list(like.shape)
            shape[state.dim] = state.rows * size
            return list(x.shape) == shape
        # what is shared may be as long as the batch where it repeats itself
        periods = state.periods if isinstance(state, Shared) else {}
        return like.dim() == x.dim() and all(
            m == n or (m * size == n * count and d in periods and n % periods[d] == 0)
            for d, (m, n) in enumerate(zip(like.shape, x.shape))
        )

    def same_arguments(a: fx.Node, b: fx.Node) -> bool:
        sizes = _SIZES.get(getattr(a.target, "overloadpacket", None), ())
        return len(a.args) == len(b.args) and all(
            agree(x, y, i in sizes) for i, (x, y) in enumerate(zip(a.args, b.args))
        )

    def growth(node: fx.Node) -> Fraction:
        """How many more entries there are with all samples; of a tuple, in its first tensor."""
        all_of_it, part = (x if isinstance(x, Tensor) else x[0] for x in (value(node), value(other[place[node]])))
        return Fraction(all_of_it.numel(), part.numel() or 1)

    def grows_with_operands(node: fx.Node) -> bool:
        """A result that grew less than something shared that it is made of is a sum over it, or picks from it."""
        operands = [o for o in node.all_input_nodes if isinstance(value(o), Tensor)]
        if node.op != "call_function" or any(isinstance(states.get(o), Samples) for o in operands):
            return True
        return all(growth(o) in (1, growth(node)) for o in operands)

    same = (
        len(one) == len(other)
        and all(
            a.op == b.op
            and (a.op == "placeholder" or a.target == b.target or a.op == "get_attr")
            and same_arguments(a, b)
            and agree(a.kwargs, b.kwargs, False)
            and (a.op != "get_attr" or a.meta["constant"] is b.meta["constant"])
            and fits(a, b)
            for a, b in zip(one, other)
        )
        and all(map(grows_with_operands, one))
    )
    same = same and whole.outputs == tile.outputs and whole.output_spec == tile.output_spec
    if not same or whole.slots != tile.slots or whole.wanted != tile.wanted:
        raise Dependent("what it computes depends on the number of samples")


def _is_fresh(graph: fx.Graph, draw: fx.Node) -> bool:
    """Whether what is drawn over is the whole of a tensor that nobody reads otherwise."""
    memory = memories(graph)
    drawn = draw.args[0]
    before = {node for node in graph.nodes if memory[node] == memory[drawn] and node < draw}
    return value(drawn).nbytes == value(drawn).untyped_storage().nbytes() and all(
        user in before or (node is drawn and (user is draw or draw < user)) for node in before for user in node.users
    )


@dataclass
class Draw:
    """Random numbers for all samples."""

    shape: tuple[int, ...]
    options: dict[str, Any]
    probability: float | None  # of ones; None: uniform in [0, 1)

    def __call__(self) -> Tensor:
        if self.probability is None:
            return torch.rand(self.shape, **self.options)
        return torch.empty(self.shape, **self.options).bernoulli_(self.probability)


def draws_of(joint: Joint) -> list[Draw]:
    """The random numbers that a call draws, in order."""
    draws = []
    for node in joint.graph.nodes:
        if node.target in _DRAWS:
            val = value(node)
            probability = None if node.target is aten.rand.default else (*node.args, 0.5)[1]
            draws.append(Draw(tuple(val.shape), {"dtype": val.dtype, "device": val.device}, probability))
    return draws


def lift_draws(joint: Joint) -> None:
    """Make the random numbers that a call draws inputs of its own."""
    for node in list(joint.graph.nodes):
        if node.target not in _DRAWS:
            continue
        with joint.graph.inserting_after(joint.inputs[0]):
            placeholder = joint.graph.placeholder(f"draw_{len(joint.draws)}")
        placeholder.meta = {"val": value(node)}
        joint.draws.append(placeholder)
        node.replace_all_uses_with(placeholder)
        overwritten = written(node)
        joint.graph.erase_node(node)
        for operand in overwritten:  # whoever reads it after the draw reads the draw
            operand.replace_all_uses_with(placeholder)


def tiled_plan(whole: Joint, sizes: list[int], record: Callable[[int], Joint]) -> "TiledPlan":
    """The plan that runs a call in tiles of ``sizes`` samples.

    Args:
        record: gives the call recorded with another number of samples, simplified.

    Raises:
        Dependent: if samples may influence one another.
        Untraceable: if the call cannot be recorded with fewer samples.
    """
    states = prove(whole)
    count = sum(sizes)
    plans = {}
    for size in dict.fromkeys(sizes):
        tile = record(size)
        check_same_program(whole, tile, states, count, size)
        lift_draws(tile)
        plans[size] = Plan.of(tile, split(tile))
    results = [
        (states[node], tuple(value(node).shape), value(node).stride(), value(node).dtype)
        for node in whole.graph.output_node().args[0]
    ]
    held = batched_arguments(whole)
    batched = [i for i, node in enumerate(whole.inputs) if node in held]
    return TiledPlan(sizes, plans, batched, results, draws_of(whole))


@dataclass(eq=False)
class TiledPlan:
    """Plans for tiles of one call.

    Attributes:
        sizes: samples in each tile.
        plans: {size: plan}.
        batched: indices of the inputs that hold samples.
        results: (samples, shape, strides, dtype) of each result of the whole call.
        draws: what is drawn for all samples beforehand.
    """

    sizes: list[int]
    plans: dict[int, Plan]
    batched: list[int]
    results: list[tuple[Samples, tuple[int, ...], tuple[int, ...], torch.dtype]]
    draws: list[Draw]

    def __call__(self, leaves: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
        plan = self.plans[self.sizes[0]]
        inputs = plan.inputs(leaves, tensors)
        with DisableTorchFunction():
            results = iter(_RunTiles.apply(self, inputs, *[inputs[i] for i in plan.wanted]))
        return tree_unflatten([next(results) if x is TENSOR else x for x in plan.outputs], plan.output_spec)

    def tiles(self) -> list[tuple[int, int, Plan]]:
        """(first sample, number of samples, plan) of every tile."""
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        return [(start, size, self.plans[size]) for start, size in zip(starts, self.sizes)]


class _RunTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tiled: TiledPlan, inputs: list[Tensor], *wanted: Tensor):
        ctx.tiled = tiled
        plan = tiled.plans[tiled.sizes[0]]
        whole = {i: inputs[i] for i in plan.saved if i is not None}
        draws = [draw() for draw in tiled.draws]
        ctx.whole, kept_of_all = list(whole), []
        names = dict(zip(plan.saved, plan.kept_by))
        ctx.kept_by = [names[i] for i in whole]
        results = [
            torch.empty_strided(shape, strides, dtype=dtype, device=inputs[0].device)
            for _, shape, strides, dtype in tiled.results
        ]
        for start, size, plan in tiled.tiles():
            tile = [x.narrow(0, start, size) if i in tiled.batched else x for i, x in enumerate(inputs)]
            drawn = [
                d.narrow(0, start * (len(d) // sum(tiled.sizes)), size * (len(d) // sum(tiled.sizes))) for d in draws
            ]
            with BelowAutograd(), WithoutKeys(AUTOCAST_KEYS):
                parts, kept = plan.forward([*tile, *drawn])
                for result, part, (samples, *_) in zip(results, parts, tiled.results):
                    result.narrow(samples.dim, samples.rows * start, samples.rows * size).copy_(part)
            if start == 0:  # which stands for the others
                plan.look(kept)
            kept_of_all += kept
            ctx.kept_by += [name for i, name in zip(plan.saved, plan.kept_by) if i is None]
            del part, parts, kept, tile
        ctx.save_for_backward(*whole.values(), *kept_of_all)
        if len(plan.differentiable) < len(results):
            ctx.mark_non_differentiable(*(r for i, r in enumerate(results) if i not in plan.differentiable))
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        refuse_double_backward()
        tiled = ctx.tiled
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()
        whole, rest = dict(zip(ctx.whole, saved)), saved[len(ctx.whole) :][::-1]
        del saved
        wanted = tiled.plans[tiled.sizes[0]].wanted
        sums: list[Tensor | None] = [None] * len(wanted)
        count = sum(tiled.sizes)
        for number, (start, size, plan) in enumerate(tiled.tiles()):
            inputs = []
            for i in plan.saved:
                if i is None:
                    inputs.append(rest.pop())
                else:
                    inputs.append(whole[i].narrow(0, start, size) if i in tiled.batched else whole[i])
            for i, like in zip(plan.differentiable, plan.tangents):
                samples = tiled.results[i][0]
                part = grads[i].narrow(samples.dim, samples.rows * start, samples.rows * size)
                inputs.append(laid_out(part, *like))
            with BelowAutograd(), WithoutKeys(AUTOCAST_KEYS):
                found = plan.backward(inputs)
                for place, (i, gradient) in enumerate(zip(wanted, found)):
                    if gradient is None:
                        continue
                    if i in tiled.batched:
                        if sums[place] is None:
                            shape = (count, *gradient.shape[1:])
                            sums[place] = gradient.new_empty_strided(shape, _strides(gradient, shape))
                        sums[place].narrow(0, start, size).copy_(gradient)
                    elif sums[place] is None:
                        sums[place] = gradient
                    else:  # the first may be somebody's, a sum is ours
                        sums[place] = sums[place].add_(gradient) if number > 1 else sums[place] + gradient
            del found, gradient, part, inputs
        return (None, None, *sums)


def _strides(like: Tensor, shape: Sequence[int]) -> list[int]:
    """Strides of a dense tensor of ``shape`` whose dimensions lie in memory in the order of ``like``'s."""
    order = sorted(range(like.dim()), key=lambda d: (like.stride(d), -d))
    strides, step = [0] * like.dim(), 1
    for d in order:
        strides[d] = step
        step *= shape[d]
    return strides


def working_set(graph: fx.Graph) -> int:
    """Bytes that a pass has in use at once beside its inputs and its output."""
    memory = memories(graph)
    nodes = list(graph.nodes)
    given = {memory[n] for n in nodes if n.op in ("placeholder", "get_attr", "output")}
    output = graph.output_node()
    given |= {memory[n] for n in output.all_input_nodes}
    last: dict[Any, int] = {}
    for position, node in enumerate(nodes):
        last.update({memory[o]: position for o in node.all_input_nodes})
        last.setdefault(memory[node], position)
    live, most, sizes = 0, 0, {}
    ends: dict[int, list[Any]] = {}
    for key, position in last.items():
        ends.setdefault(position, []).append(key)
    for position, node in enumerate(nodes):
        key = memory[node]
        if key is not None and key not in given and key not in sizes:
            sizes[key] = value(node).untyped_storage().nbytes()
            live += sizes[key]
        most = max(most, live + _scratch(node))
        live -= sum(sizes.get(key, 0) for key in ends.get(position, ()))
    return most


def kept_bytes(halves: Halves) -> int:
    """Bytes that the forward pass hands to the backward pass, beside what exists anyway."""
    return sum(value(node).nbytes for node in halves.forward.output_node().args[0][1])


def passed_bytes(joint: Joint) -> int:
    """Bytes of the arguments that hold samples, and of the results."""
    results, _ = joint.graph.output_node().args
    return sum(value(node).nbytes for node in (*batched_arguments(joint), *results))


def _scratch(node: fx.Node) -> int:
    """Bytes that an operator may need for itself: convolutions reorder their operands and results."""
    if getattr(node.target, "overloadpacket", None) not in (aten.convolution, aten.convolution_backward):
        return 0
    tensors = [value(n) for n in (*node.all_input_nodes, node)]
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


def tiles_for(bytes_at_once: float, room: float, slack: float = 0.25) -> int:
    """Tiles that keep a working set within ``room``; ``slack`` of one is not worth another."""
    return max(1, math.ceil(bytes_at_once / room - slack))
