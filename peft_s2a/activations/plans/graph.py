"""Simplifying a recorded call and splitting it into its two passes.

Every change leaves the numbers as they are, bit for bit: equal computations are done once, what nobody reads is dropped,
a result is written over an operand that nobody reads again, and a linear layer is one call.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ...compat import OpOverload, nn_bindings, no_dispatch_modes
from .trace import Joint, Untraceable, aten


@dataclass
class Halves:
    """The two passes of a recorded call.

    Attributes:
        forward: takes the call's arguments, slots and draws; its output is (results, kept).
        backward: takes what is saved, then the gradients of the differentiable results; its output is the gradients of
            ``Joint.wanted``, None for those that do not depend on it.
        saved: for every tensor that backward reads, its index among the inputs of the forward pass, or None for the next
            one of ``kept``.
        kept_by: for every tensor that backward reads, the autograd node that kept it: its operator, whether that is this
            package's, and its number; None if it is not known.
        tangents: fake tensors laid out as backward expects the results' gradients.
        writes_buffers: whether the forward pass changes a buffer, as batch normalisation does its running statistics.
    """

    forward: fx.Graph
    backward: fx.Graph
    saved: list[int | None]
    kept_by: list[tuple[str, bool, int] | None]
    tangents: list[Tensor]
    writes_buffers: bool


_ALIASES = {aten.detach.default, aten.alias.default}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_IDENTITY_IF_EQUAL = {aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.slice.Tensor}
_LIVE_BATCH_NORMS = {aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default}
_IN_PLACE = {
    aten.gelu.default: aten.gelu_.default,
    aten.relu.default: aten.relu_.default,
    aten.silu.default: aten.silu_.default,
    aten.tanh.default: aten.tanh_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.hardswish.default: aten.hardswish_.default,
    aten.leaky_relu.default: aten.leaky_relu_.default,
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
}


def value(node: fx.Node) -> Any:
    """The fake tensor that a node computes, or the tuple of them."""
    return node.meta.get("val")


def memories(graph: fx.Graph) -> dict[fx.Node, Any]:
    """{node: what tells the memory of its tensor from that of others}; None for what is not a tensor.

    Views are known from their schemas and, should one not say so, from the fake tensors' storage.
    """
    memory: dict[fx.Node, Any] = {}
    by_storage: dict[int, Any] = {}
    for node in graph.nodes:
        val = value(node)
        viewed = _viewed(node)
        if viewed is not None:
            memory[node] = memory[viewed]
        elif isinstance(val, Tensor):
            memory[node] = by_storage.get(val.untyped_storage()._cdata, node)
        else:
            memory[node] = None
        if isinstance(val, Tensor):
            by_storage.setdefault(val.untyped_storage()._cdata, memory[node])
    return memory


def _viewed(node: fx.Node) -> fx.Node | None:
    """The operand whose memory an operator returns."""
    if node.target is operator.getitem:
        return _viewed(node.args[0])
    if node.target is aten._unsafe_view.default:
        return node.args[0]
    if not isinstance(node.target, OpOverload):
        return None
    if not any(r.alias_info is not None for r in node.target._schema.returns):
        return None
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None:
            operand = node.kwargs.get(argument.name, node.args[position] if position < len(node.args) else None)
            if isinstance(operand, fx.Node):
                return operand
    return None


def is_random(node: fx.Node) -> bool:
    """Whether an operator draws random numbers: one that may, unless it is a fused attention without dropout."""
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for position, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            given = (
                node.args[position]
                if position < len(node.args)
                else node.kwargs.get("dropout_p", argument.default_value)
            )
            return given != 0.0
    return True


def written(node: fx.Node) -> list[fx.Node]:
    """The operands that an operator overwrites."""
    target = node.target
    if target in _LIVE_BATCH_NORMS:  # their schemas do not say so
        return [operand for operand in node.args[3:5] if isinstance(operand, fx.Node)] if node.args[5] else []
    if not isinstance(target, OpOverload) or not target._schema.is_mutable:
        return []
    found = []
    for position, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            operand = node.kwargs.get(argument.name, node.args[position] if position < len(node.args) else None)
            found += [
                o for o in (operand if isinstance(operand, (list, tuple)) else [operand]) if isinstance(o, fx.Node)
            ]
    return found


def simplify(joint: Joint) -> None:
    """Merge equal computations of one pass and drop what nobody reads, in place."""
    graph = joint.graph
    memory = memories(graph)
    overwritten = {memory[operand] for node in graph.nodes for operand in written(node)}
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if node.target in _VIEWS:
            node.update_arg(1, list(value(node).shape))  # with -1 equal ones would look different
        if node.target in _ALIASES or (node.target in _IDENTITY_IF_EQUAL and _same_layout(node, source)):
            _replace(node, source)
        elif node.target is aten.t.default and source.target is aten.t.default:
            _replace(node, source.args[0])
        elif node.target is aten.view.default and source.target in _VIEWS and value(source.args[0]).is_contiguous():
            node.update_arg(0, source.args[0])
        elif not (written(node) or is_random(node) or _touched(node, memory) & overwritten):
            earlier = seen.setdefault(_key(node), node)
            if earlier is not node:
                _replace(node, earlier)
    _drop_unread(graph)


def _replace(node: fx.Node, other: fx.Node) -> None:
    node.replace_all_uses_with(other)
    if "kept_by" in node.meta:
        other.meta.setdefault("kept_by", node.meta["kept_by"])
    node.graph.erase_node(node)


_MOST_CONSTANTS = 4 * 2**20  # bytes that a plan may hold in what it computed beforehand


def with_constants_folded(joint: Joint) -> Joint:
    """The call with everything computed beforehand that depends neither on arguments nor on parameters, such as the
    attention masks of windows."""
    graph, copies = fx.Graph(), {}
    graph.graph_copy(joint.graph, copies)
    graph.create_node("output", "output", map_arg(joint.graph.output_node().args, copies.__getitem__))
    joint = replace(
        joint,
        graph=graph,
        **{name: [copies[n] for n in getattr(joint, name)] for name in ("inputs", "tangents", "draws")},
    )
    if joint.has_values:
        _fold_constants(graph)
    return joint


def _fold_constants(graph: fx.Graph) -> None:
    memory = memories(graph)
    position = {node: i for i, node in enumerate(graph.nodes)}
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if (node.op == "get_attr" and node.meta["literal"]) or (
            node.op == "call_function" and not is_random(node) and constant.issuperset(node.all_input_nodes)
        ):
            constant.add(node)
    changed = {memory[o] for node in graph.nodes if node not in constant for o in written(node)}
    last_write = {memory[o]: position[node] for node in graph.nodes if node in constant for o in written(node)}
    results, _ = graph.output_node().args
    returned = {memory[result] for result in results}  # callers may write into what they get
    frontier = []
    for node in constant:
        readers = [position[user] for user in node.users if user not in constant]
        if node.op == "get_attr" or memory[node] in returned or not readers or not isinstance(value(node), Tensor):
            continue
        if memory[node] not in changed and last_write.get(memory[node], -1) < min(readers):
            frontier.append(node)
    if not frontier or sum(value(node).untyped_storage().nbytes() for node in frontier) > _MOST_CONSTANTS:
        return
    computed: dict[fx.Node, Any] = {}
    with torch.no_grad(), no_dispatch_modes():
        for node in graph.nodes:
            if node.op == "get_attr":
                computed[node] = node.meta["constant"]
            elif node in constant:
                args, kwargs = map_arg((node.args, node.kwargs), computed.__getitem__)
                computed[node] = node.target(*args, **kwargs)
    for node in frontier:
        with graph.inserting_before(node):
            folded = graph.get_attr("constant")
        folded.meta = {
            "val": value(node),
            "constant": computed[node],
            "literal": True,
            "phase": node.meta.get("phase"),
        }
        node.replace_all_uses_with(folded, lambda user: user not in constant)
    for node in reversed(list(graph.nodes)):
        if node in constant and not node.users:
            graph.erase_node(node)


def _same_layout(node: fx.Node, source: fx.Node) -> bool:
    return value(node).shape == value(source).shape and value(node).stride() == value(source).stride()


def _touched(node: fx.Node, memory: dict[fx.Node, Any]) -> set[Any]:
    """The memory of a node's operands and results."""
    return {memory[n] for n in (node, *node.all_input_nodes, *node.users) if memory.get(n) is not None}


def _key(node: fx.Node) -> Any:
    """Equal for nodes of one pass that compute the same. Across the two passes a result would have to be kept."""
    if "decode" in str(node.target):  # twice decoded is not twice kept in between
        return node

    def frozen(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return tuple(map(frozen, x))
        return x if isinstance(x, fx.Node) else (type(x), x)

    kwargs = tuple((name, frozen(x)) for name, x in sorted(node.kwargs.items()))
    return node.meta.get("phase"), node.target, frozen(node.args), kwargs


def _drop_unread(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users and not written(node) and not is_random(node):
            graph.erase_node(node)


def split(joint: Joint) -> Halves:
    """The two passes of a call that `simplify` has been over.

    Raises:
        Untraceable: if the call changes an argument or a trained parameter, returns memory of one, or draws random
            numbers in its backward pass.
    """
    joint = with_constants_folded(joint)
    nodes = list(joint.graph.nodes)
    results, grads = joint.graph.output_node().args
    inputs, tangents = joint.inputs, joint.tangents
    memory = memories(joint.graph)
    writes_buffers = _check_writes(joint, nodes, memory)
    returned = [memory[result] for result in results]
    if {memory[node] for node in inputs}.intersection(returned) or len(set(returned)) < len(returned):
        raise Untraceable("its result shares memory with an argument or with another result")
    late = _needed_late(nodes, grads, memory)
    if any(map(is_random, late)):  # as checkpoints inside do, which set the generator back for it
        raise Untraceable("it draws random numbers in its backward pass")
    available = {*late, *tangents}
    read = [o for node in late for o in node.all_input_nodes] + [g for g in grads if g is not None]
    saved = list(dict.fromkeys(node for node in read if node not in available and node.op != "get_attr"))
    kept = [node for node in saved if node not in inputs]

    forward, known = fx.Graph(), {}
    for node in [*inputs, *joint.draws]:
        known[node] = _copy(forward, node, known)
    for node in nodes:
        if node.op == "get_attr" or (node.op == "call_function" and node.meta.get("phase") == "forward"):
            known[node] = _copy(forward, node, known)
    forward.output((tuple(known[r] for r in results), tuple(known[k] for k in kept)))

    backward, known = fx.Graph(), {}
    for node in [*saved, *tangents]:
        known[node] = backward.placeholder(node.name)
        known[node].meta = dict(node.meta)
    for node in nodes:
        if node.op == "get_attr" or node in late:
            known[node] = _copy(backward, node, known)
    backward.output(tuple(None if g is None else known[g] for g in grads))
    with no_dispatch_modes():  # what is computed here, of fake tensors, is no part of anybody's step
        for half in (forward, backward):
            _drop_unread(half)
            _merge_linear(half)
            _sum_without_views(half)
            _add_vectors_together(half)
            overwrite_dead_operands(half)
    places = [inputs.index(node) if node in inputs else None for node in saved]
    kept_by = [node.meta.get("kept_by") for node in saved]
    return Halves(forward, backward, places, kept_by, [value(t) for t in tangents], writes_buffers)


def _check_writes(joint: Joint, nodes: Sequence[fx.Node], memory: dict[fx.Node, Any]) -> bool:
    index_of = {memory[node]: index for index, node in enumerate(joint.inputs)}
    writes_buffers = False
    for node in nodes:
        for operand in written(node):
            index = index_of.get(memory[operand])
            if index is not None:
                if index < len(joint.arguments) or index in joint.wanted or node.meta.get("phase") != "forward":
                    raise Untraceable("it changes an argument or a parameter in place")
                writes_buffers = True
    return writes_buffers


def _needed_late(
    nodes: Sequence[fx.Node], grads: Sequence[fx.Node | None], memory: dict[fx.Node, Any]
) -> dict[fx.Node, None]:
    """The nodes of the backward pass that the gradients depend on, in order; those that write what they depend on too."""
    wanted = {g for g in grads if g is not None}
    touched = {memory[g] for g in wanted}
    needed = []
    for node in reversed(nodes):
        if node.op != "call_function" or node.meta.get("phase") != "backward":
            continue
        if node in wanted or touched.intersection(memory[o] for o in written(node)):
            needed.append(node)
            wanted.update(node.all_input_nodes)
            touched.update(memory[o] for o in node.all_input_nodes)
    return dict.fromkeys(reversed(needed))


def _copy(graph: fx.Graph, node: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    copy = graph.node_copy(node, known.__getitem__)
    copy.meta = dict(node.meta)
    return copy


def _merge_linear(graph: fx.Graph) -> None:
    """One call for view, transposition and product, which is what `torch.nn.functional.linear` makes of itself."""
    for node in list(graph.nodes):
        if node.target not in (aten.addmm.default, aten.mm.default) or node.kwargs:
            continue
        *bias, rows, transposed = node.args
        if transposed.target is not aten.t.default or any(value(b).dim() != 1 for b in bias):
            continue
        is_folded = rows.target is aten.view.default and _keeps_rows(value(rows.args[0]), value(rows))
        source = rows.args[0] if is_folded and all(user.target in _VIEWS for user in node.users) else rows
        with graph.inserting_after(node):
            merged = graph.call_function(nn_bindings.linear, (source, transposed.args[0], bias[0] if bias else None))
        merged.meta = dict(node.meta)
        merged.meta["val"] = value(node).view(*value(source).shape[:-1], value(node).shape[-1])
        _replace(node, merged)
        for user in list(merged.users):
            if user.target in _VIEWS and _same_layout(user, merged):
                _replace(user, merged)
    _drop_unread(graph)


def _keeps_rows(x: Tensor, rows: Tensor) -> bool:
    return x.dim() >= 3 and x.is_contiguous() and rows.dim() == 2 and x.shape[-1] == rows.shape[-1]


def _sum_without_views(graph: fx.Graph) -> None:
    """Sums over rows as vectors from the start, where autograd keeps the dimension and takes it away again."""
    for node in list(graph.nodes):
        if node.target is not aten.sum.dim_IntList or list(node.args[1:]) != [[0], True] or value(node).dim() != 2:
            continue
        width = value(node).shape[1:]
        if all(user.target in _VIEWS and value(user).shape == width for user in node.users):
            node.args = node.args[:2]
            node.meta["val"] = value(node)[0]
            for user in list(node.users):
                _replace(user, node)


def _add_vectors_together(graph: fx.Graph) -> None:
    """One call for all sums of two vectors that the pass is given: the biases that tuners shift."""
    memory = memories(graph)
    changed = {memory[operand] for node in graph.nodes for operand in written(node)}
    sums = [
        node for node in graph.nodes
        if node.target is aten.add.Tensor and not node.kwargs and len(node.all_input_nodes) == 2
        and all(n.op == "placeholder" and memory[n] not in changed for n in node.all_input_nodes)
        and all(value(n).dim() == 1 and value(n).dtype == value(node).dtype for n in node.all_input_nodes)
    ]  # fmt: skip
    if len(sums) < 2:
        return
    with graph.inserting_before(sums[0]):
        together = graph.call_function(
            aten._foreach_add.List, ([node.args[0] for node in sums], [node.args[1] for node in sums])
        )
        together.meta = {**sums[0].meta, "val": [value(node) for node in sums]}
        parts = [graph.call_function(operator.getitem, (together, i)) for i in range(len(sums))]
    for node, part in zip(sums, parts):
        part.meta = dict(node.meta)
        _replace(node, part)


def overwrite_dead_operands(graph: fx.Graph) -> None:
    """Let elementwise operators write over an operand that nobody reads any more, in place.

    The last reader of a piece of memory is known from the graph, views and in-place operators included; what the caller
    handed in, or gets, is left alone.
    """
    nodes = list(graph.nodes)
    memory = memories(graph)
    given = {memory[node] for node in nodes if node.op in ("placeholder", "get_attr")}
    last_read: dict[int | None, int] = {}
    for position, node in enumerate(nodes):
        last_read.update(dict.fromkeys((memory[o] for o in node.all_input_nodes), position))
    for position, node in enumerate(nodes):
        if node.target not in _IN_PLACE or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        old, new = memory[source], memory[node]
        others = [memory[o] for o in node.all_input_nodes if o is not source]
        if old in given or old in others or last_read[old] != position or not _fits(value(node), value(source)):
            continue
        node.target = _IN_PLACE[node.target]
        last_read[old] = max(last_read.get(new, position), position)
        memory.update(dict.fromkeys([n for n in nodes if memory[n] == new], old))


def _fits(result: Tensor, operand: Tensor) -> bool:
    return (
        operand.untyped_storage().nbytes() == operand.nbytes
        and result.dtype == operand.dtype
        and result.shape == operand.shape
        and result.stride() == operand.stride()
    )
