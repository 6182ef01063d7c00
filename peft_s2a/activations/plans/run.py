"""Running a plan: one autograd function for a module's whole forward and backward pass."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from ...compat import (
    AUTOCAST_KEYS,
    VIEW_KEYS,
    BelowAutograd,
    DisableTorchFunction,
    OpOverload,
    WithoutKeys,
    tree_unflatten,
)
from .. import sharpness
from ..operators.common import refuse_double_backward
from .codegen import compile_graph, laid_out
from .graph import Halves, memories
from .trace import TENSOR, Joint


ALIAS = torch.ops.aten.alias.default


@dataclass(eq=False)
class Plan:
    """The compiled passes of a call, and how its arguments and results go with them."""

    forward: Callable[[list[Tensor | None]], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
    backward: Callable[[list[Tensor | None]], tuple[Tensor | None, ...]]
    saved: list[int | None]
    kept_by: list[tuple[str, bool, int] | None]
    tangents: list[tuple[tuple[int, ...], tuple[int, ...]]]  # shape and strides
    arguments: list[int]
    slots: list[int]
    wanted: list[int]
    outputs: list[Any]
    output_spec: Any
    differentiable: list[int]
    own: list[int]  # results whose memory nobody else holds
    attention: list[tuple[list[int], list[int], tuple]]  # see `_attention`

    @classmethod
    def of(cls, joint: Joint, halves: Halves) -> "Plan":
        return cls(
            forward=compile_graph(halves.forward),
            backward=compile_graph(halves.backward),
            saved=halves.saved,
            kept_by=halves.kept_by,
            tangents=[(tuple(t.shape), t.stride()) for t in halves.tangents],
            arguments=joint.arguments,
            slots=joint.slots,
            wanted=joint.wanted,
            outputs=joint.outputs,
            output_spec=joint.output_spec,
            differentiable=joint.differentiable,
            own=_own(halves.forward),
            attention=_attention(halves),
        )

    def inputs(self, leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the forward pass reads, of a call's leaves and a module's tensors."""
        return [leaves[i] for i in self.arguments] + [tensors[i] for i in self.slots]

    def look(self, kept: Sequence[Tensor]) -> None:
        """Look at the attention of a first call that has kept this."""
        if self.attention and sharpness.is_looking():
            codes = iter(kept)
            saved = [next(codes) if i is None else None for i in self.saved]
            for query, key, others in self.attention:
                sharpness.look([saved[i] for i in query], [saved[i] for i in key], *others)

    def __call__(self, leaves: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
        inputs = self.inputs(leaves, tensors)
        with DisableTorchFunction():
            results = _Run.apply(self, inputs, *[inputs[i] for i in self.wanted])
        results = iter(results)
        return tree_unflatten([next(results) if x is TENSOR else x for x in self.outputs], self.output_spec)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: Plan, inputs: list[Tensor | None], *wanted: Tensor):
        ctx.plan, ctx.kept_by = plan, plan.kept_by
        given = [None if i is None else inputs[i] for i in plan.saved]
        with BelowAutograd(), WithoutKeys(AUTOCAST_KEYS):
            results, kept = plan.forward(inputs)
            if plan.own:  # no views for autograd, which lets nobody write into those that a function returns
                with WithoutKeys(VIEW_KEYS):
                    results = tuple([ALIAS(r) if i in plan.own and r._is_view() else r for i, r in enumerate(results)])
        plan.look(kept)
        kept = iter(kept)
        ctx.save_for_backward(*(next(kept) if i is None else x for i, x in zip(plan.saved, given)))
        if len(plan.differentiable) < len(results):
            ctx.mark_non_differentiable(*(r for i, r in enumerate(results) if i not in plan.differentiable))
        return results

    @staticmethod
    def backward(ctx, *grads: Tensor):
        refuse_double_backward()
        plan = ctx.plan
        inputs = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()
        for i, like in zip(plan.differentiable, plan.tangents):
            inputs.append(laid_out(grads[i], *like))
        del grads
        with BelowAutograd(), WithoutKeys(AUTOCAST_KEYS):
            return (None, None, *plan.backward(inputs))


def _own(graph: fx.Graph) -> list[int]:
    """Which results of a forward graph share their memory with no argument, constant, other result or kept tensor."""
    results, kept = cast("tuple[tuple, tuple]", graph.output_node().args[0])
    memory = memories(graph)
    held = Counter(memory[x] for x in (*results, *kept) if isinstance(x, fx.Node))
    return [
        i for i, x in enumerate(results)
        if isinstance(x, fx.Node) and held[memory[x]] == 1 and memory[x].op == "call_function"
    ]  # fmt: skip


def _attention(halves: Halves) -> list[tuple[list[int], list[int], tuple]]:
    """Where, among what is saved, the codes of queries and keys are that attention reads in backward, and the other
    arguments of `sharpness.look`."""
    saved = [node for node in halves.backward.nodes if node.op == "placeholder"][: len(halves.saved)]
    kept = {node: i for i, node in enumerate(saved) if halves.saved[i] is None}
    found = []
    for node in halves.backward.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.name.endswith("::attention_backward"):
            _, query, key, _, _, _, scale, bits, group_size, channels, _ = node.args
            if all(x in kept for x in (*query, *key)):
                found.append(([kept[x] for x in query], [kept[x] for x in key], (scale, bits, group_size, channels)))
    return found
