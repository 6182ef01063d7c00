"""Recording what one call of a module computes, forward and backward, as a graph of aten and ``s2a`` operators.

The call runs once on fake tensors (shapes and no values) under a `Recorder`, with `torch.autograd.grad` behind it. The two
halves are split where the forward pass ended, so what they hand over is what autograd would have kept.
"""

import enum
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks

from ... import compat
from ...compat import (
    FakeTensor,
    FakeTensorMode,
    current_autograd_node,
    no_dispatch_modes,
    tree_flatten,
    tree_unflatten,
)
from .recorder import Recorder, Untraceable, aten


TENSOR = object()  # stands for a tensor in the flattened result of a call


_state = threading.local()


def is_recording() -> bool:
    """Whether the calling thread is recording a call."""
    return getattr(_state, "recording", False)


UNOBSERVED = nullcontext()
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.memory_format)


@dataclass
class Joint:
    """A recorded call.

    Attributes:
        graph: placeholders for ``arguments`` and ``slots``, then for the gradients of the ``differentiable`` results; its
            output is (results, gradients, of ``wanted``; None for those that do not depend on it).
        arguments: positions of the tensors among the leaves of the call's arguments.
        slots: positions, among the module's tensors, of those that the call reads.
        wanted: indices into ``arguments + slots`` of what gets a gradient.
        outputs: leaves of the result, `TENSOR` where a tensor goes.
        output_spec: how they are put together.
        differentiable: indices of the results (tensors only) that have a gradient.
        inputs: the placeholders of arguments and slots.
        tangents: the placeholders of the gradients.
        has_values: whether the tensors of the call are real, not fake.
        foreign: tensors that the call reads and that are neither arguments nor the module's.
        draws: placeholders of random numbers, if the caller draws them.
    """

    graph: fx.Graph
    arguments: list[int]
    slots: list[int]
    wanted: list[int]
    outputs: list[Any]
    output_spec: Any
    differentiable: list[int]
    inputs: list[fx.Node]
    tangents: list[fx.Node]
    has_values: bool
    foreign: list[Tensor]
    draws: list[fx.Node] = field(default_factory=list)


def fake_mode_of(tensors: Sequence[Any]) -> FakeTensorMode | None:
    """The mode of the fake tensors among ``tensors``, if there are any."""
    return next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)


def trace(
    function: Callable[..., Any],
    leaves: Sequence[Any],
    spec: Any,
    tensors: Sequence[Tensor],
    sizes: Sequence[Sequence[int] | None] = (),
    backward_pass: AbstractContextManager = UNOBSERVED,
) -> Joint:
    """Record ``function`` called with the arguments that ``leaves`` and ``spec`` (pytree) make.

    Args:
        tensors: the parameters and buffers that ``function`` may read; parameters of others are refused.
        sizes: for every leaf, another shape to record it with, or None for its own.
        backward_pass: entered for the backward pass, all of which runs in this thread.

    Raises:
        Untraceable: if the call asks for values, changes its arguments, keeps a tensor somewhere, or reads one that is
            none of its own.
    """
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    first = {i: next(j for j in positions if leaves[j] is leaves[i]) for i in positions}
    if not positions:
        raise Untraceable("none of its arguments is a tensor")
    index_of = {id(t): i for i, t in enumerate(tensors)}
    mode = fake_mode_of([*leaves, *tensors]) or FakeTensorMode(allow_non_fake_inputs=True)
    shapes = {i: (sizes[i] if sizes and sizes[i] is not None else leaves[i].shape) for i in positions}
    with no_dispatch_modes(), mode:
        fakes = [_like(leaves[i], shapes[i]) for i in positions]
    trained = [i for i, t in enumerate(tensors) if t.requires_grad]
    recorder = Recorder(fakes, tensors)
    record: dict[str, Any] = {"recorder": recorder}

    def joint() -> list[Tensor | None]:
        entered = list(leaves)
        for i, x in zip(positions, fakes):
            # operators tell parameters from activations by whether they are leaves
            entered[i] = x.view_as(x) if x.requires_grad and not leaves[i].is_leaf else x
        for i, j in first.items():  # code may ask whether two of them are one
            entered[i] = entered[j]
        args, kwargs = tree_unflatten(entered, spec)
        results, record["spec"] = tree_flatten(function(*args, **kwargs))
        after, _ = tree_flatten((args, kwargs))
        if len(after) != len(entered) or any(one is not other for one, other in zip(after, entered)):
            raise Untraceable("it changes a list or dict among its arguments")
        record["outputs"] = [TENSOR if isinstance(r, Tensor) else r for r in results]
        for r in results:  # a plan returns the very same at every call
            if not (type(r) in PLAIN or isinstance(r, (Tensor, enum.Enum))):
                raise Untraceable(f"it returns a {type(r).__name__}")
        results = [r for r in results if isinstance(r, Tensor)]
        record["differentiable"] = [i for i, r in enumerate(results) if r.requires_grad]
        through = [results[i] for i in record["differentiable"]]
        inputs = [x for x in fakes if x.requires_grad] + [tensors[i] for i in trained]
        grads = [None] * len(inputs)
        recorder.phase = "tangent"
        tangents = [torch.empty_like(r) for r in through]
        recorder.phase = "backward"
        if through and inputs:
            with torch.autograd.set_multithreading_enabled(False), backward_pass:
                grads = torch.autograd.grad(through, inputs, tangents, allow_unused=True)
        return [*results, *grads]

    # small constants are computed with while they are recorded: counters of batches would count this run
    counters = [(t, t._version, t.detach().clone()) for t in tensors if not t.is_floating_point() and t.numel() == 1]
    hooks = [(tensors[i], tensors[i]._backward_hooks) for i in trained if tensors[i]._backward_hooks]
    gradients = [(t, t.grad) for t in tensors if t.is_leaf]
    for parameter, _ in hooks:  # which are for gradients, and what is computed here is none
        parameter._backward_hooks = None
    _state.recording = True
    try:
        with (
            no_dispatch_modes(),
            mode,
            torch.enable_grad(),
            compat.fresh_node_metadata(),
            compat.without_autocast_cache(),
            recorder,
            saved_tensors_hooks(without_graph, partial(_note, recorder)),
        ):
            values = recorder.nodes_of(joint())
    except Untraceable:
        raise
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Untraceable(f"it cannot be recorded ({type(error).__name__}: {first_line[:200]})") from error
    finally:
        _state.recording = False
        for parameter, of_it in hooks:
            parameter._backward_hooks = of_it
        for counter, version, before in counters:
            if counter._version != version:
                counter.copy_(before)
        added = [tensor for tensor, before in gradients if tensor.grad is not before]
        for tensor, before in gradients:
            tensor.grad = before
    if added:
        raise Untraceable("its backward pass adds to gradients by itself")
    if recorder.alive():
        raise Untraceable("it keeps a tensor beyond the call")
    wanted = [i for i, x in enumerate(fakes) if x.requires_grad]
    record["gradients"] = [before for _, before in gradients if before is not None]
    record["mode"], record["has_values"] = mode, fake_mode_of([*leaves, *tensors]) is None
    return _joint_graph(values, record, positions, wanted, trained, index_of)


def without_graph(x: Tensor) -> Tensor:
    """``x``, packed for backward: an operator's own result would tie its node into a reference cycle."""
    return x if x.grad_fn is None else x.detach()


def _note(recorder: Recorder, x: Tensor) -> Tensor:
    """Write down for which node of the autograd graph a tensor was kept."""
    tracked, node = recorder.node_of.get(x), current_autograd_node()
    if tracked is not None and node is not None:
        tracked.meta["kept_by"] = (*operator_name(node), node._sequence_nr())
    return x


def operator_name(node: Any) -> tuple[str, bool]:
    """The operator of a node of the autograd graph, as in "native_layer_norm", and whether it is this package's."""
    name = node.name()
    function = getattr(type(node), "_forward_cls", None)  # the torch.autograd.Function of a node written in Python
    ours = name.startswith("GeneratedBackwardFor_s2a_") or (function.__module__ if function else "").startswith(
        "peft_s2a"
    )
    name = re.sub(
        r"^GeneratedBackwardFor_([a-z0-9]+)_(.+)_default(Backward)?$", r"\1::\2", name
    )  # torch.library operators
    name = re.sub(r"Backward\d*$", "", name)
    if "::" not in name:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])", "_", name).lower().lstrip("_")
    return (f"s2a::{name}" if ours and "::" not in name else name), ours


def _like(x: Tensor, shape: Sequence[int]) -> Tensor:
    if x.layout != torch.strided or type(x) not in (Tensor, torch.nn.Parameter, FakeTensor):
        raise Untraceable(f"an argument is a {type(x).__name__} of layout {x.layout}")
    strides = x.stride() if tuple(shape) == tuple(x.shape) else _strides_like(x, shape)
    fake = torch.empty_strided(tuple(shape), strides, dtype=x.dtype, device=x.device)
    return fake.requires_grad_(x.requires_grad)


def _strides_like(x: Tensor, shape: Sequence[int]) -> list[int]:
    """Strides of a dense tensor of another shape whose dimensions lie in memory in the order of ``x``'s."""
    order = sorted(range(x.dim()), key=lambda d: (x.stride(d), -d))
    strides, step = [0] * x.dim(), 1
    for d in order:
        strides[d] = step
        step *= shape[d]
    return strides


def _joint_graph(
    values: list[fx.Node | None],
    record: dict[str, Any],
    positions: list[int],
    wanted_arguments: list[int],
    trained: list[int],
    index_of: dict[int, int],
) -> Joint:
    graph = record["recorder"].graph
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    slot_nodes: dict[int, fx.Node] = {}
    tangents, foreign = [], []
    for node in list(graph.nodes):
        if node.op == "get_attr":
            tensor = node.meta["constant"]
            index = index_of.get(id(tensor))
            if index is None:
                if isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad:
                    raise Untraceable("it reads a parameter that is neither an argument nor its own")
                if any(tensor is gradient for gradient in record["gradients"]):
                    raise Untraceable("it reads gradients")
                node.meta["val"] = _fake_of(tensor, record["mode"])
                # a number that its code wrote down, or else a tensor of somebody's, such as a table that a library caches
                node.meta["literal"] = all(user.target in _FRESH for user in node.users)
                if not node.meta["literal"]:
                    foreign.append(tensor)
                continue
            if index not in slot_nodes:
                with graph.inserting_after(arguments[-1]):
                    slot_nodes[index] = graph.placeholder(f"slot_{index}")
                slot_nodes[index].meta["val"] = _fake_of(tensor, record["mode"])
            node.replace_all_uses_with(slot_nodes[index])
            graph.erase_node(node)
        elif node.meta.get("phase") == "tangent" and node.op == "call_function":
            tangents.append(node)
    for number, node in enumerate(tangents):
        with graph.inserting_before(node):
            tangents[number] = graph.placeholder(f"tangent_{number}")
        tangents[number].meta = dict(node.meta)
        node.replace_all_uses_with(tangents[number])
        graph.erase_node(node)
    count = sum(leaf is TENSOR for leaf in record["outputs"])
    slots = sorted(slot_nodes)
    grads_arguments = values[count : count + len(wanted_arguments)]
    grads_trained = dict(zip(trained, values[count + len(wanted_arguments) :]))
    wanted, grads = list(wanted_arguments), list(grads_arguments)
    for order, slot in enumerate(slots):
        if slot in grads_trained:
            wanted.append(len(positions) + order)
            grads.append(grads_trained[slot])
    graph.create_node("output", "output", (tuple(values[:count]), tuple(grads)))
    return Joint(
        graph=graph,
        arguments=positions,
        slots=slots,
        wanted=wanted,
        outputs=record["outputs"],
        output_spec=record["spec"],
        differentiable=record["differentiable"],
        inputs=[*arguments, *(slot_nodes[slot] for slot in slots)],
        tangents=tangents,
        has_values=record["has_values"],
        foreign=foreign,
    )


_FRESH = {aten.lift_fresh_copy.default, aten.lift_fresh.default}


def _fake_of(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)
