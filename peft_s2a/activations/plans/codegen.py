"""Python source for a flat graph.

A node is one line; arguments are taken out of a list that is emptied, and every tensor is let go after its last use, so
that nothing outlives it. Operators are called through torch's Python bindings, which cost a third of what an
``OpOverload`` does; `_BINDINGS` holds those whose arguments are the operator's.
"""

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...compat import OpOverload, nn_bindings
from .trace import aten


_BINDINGS = {
    aten._foreach_add.List: torch._foreach_add,
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: Tensor.add_,
    aten.addmm.default: torch.addmm,
    aten.baddbmm.default: torch.baddbmm,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.clone.default: torch.clone,
    aten.convolution.default: torch.convolution,
    aten.div.Tensor: torch.div,
    aten.div_.Tensor: Tensor.div_,
    aten.expand.default: Tensor.expand,
    aten.gelu.default: nn_bindings.gelu,
    aten.gelu_.default: nn_bindings.gelu_,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: Tensor.mul_,
    aten.native_batch_norm.default: torch.native_batch_norm,
    aten.native_layer_norm.default: torch.native_layer_norm,
    aten.permute.default: torch.permute,
    aten.relu.default: torch.relu,
    aten.relu_.default: torch.relu_,
    aten.rsqrt.default: torch.rsqrt,
    aten.select.int: torch.select,
    aten.sigmoid.default: torch.sigmoid,
    aten.sub.Tensor: torch.sub,
    aten.sum.dim_IntList: torch.sum,
    aten.t.default: torch.t,
    aten.tanh.default: torch.tanh,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: Tensor.view,
    aten._unsafe_view.default: Tensor.view,
}


_LAID_OUT_BY_LIBRARIES = {aten.convolution.default, aten.native_batch_norm.default}


def _callable(target: Any) -> Callable[..., Any]:
    if isinstance(target, OpOverload):
        return _BINDINGS.get(target, target._op)
    return target


def laid_out(x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """``x`` with the strides that it was recorded with."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _may_be_laid_out_otherwise(target: Any) -> bool:
    """Whether an operator's results may have other strides than those of its fake implementation, as batch norm's and
    `roll`'s do: what follows them, views above all, was recorded for the latter."""
    if not isinstance(target, OpOverload) or target.namespace == "s2a":
        return False
    if target in _BINDINGS and target not in _LAID_OUT_BY_LIBRARIES:
        return False
    return all(returned.alias_info is None for returned in target._schema.returns)


def compile_graph(graph: fx.Graph) -> Callable[[list[Tensor | None]], Any]:
    """A function of one list, the graph's inputs, which it empties; returns the graph's output."""
    source, names = _source(graph)
    scope = dict(names)
    exec(_compiled(source), scope)
    return scope["run"]


@functools.lru_cache(maxsize=512)
def _compiled(source: str) -> Any:
    return compile(source, "<plan>", "exec")


def _source(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    """The source, and what its global names stand for."""
    name_of: dict[fx.Node, str] = {}
    globals_: dict[str, Any] = {}
    fresh = (f"v{i}" for i in itertools.count())
    last_user = {operand: node for node in graph.nodes for operand in node.all_input_nodes}
    functions: dict[Any, str] = {}

    def constant(x: Any) -> str:
        if (
            x is None
            or isinstance(x, (bool, int, str))
            or (isinstance(x, float) and x == x and abs(x) != float("inf"))
        ):
            return repr(x)
        name = f"c{len(globals_)}"
        globals_[name] = x
        return name

    def written(x: Any) -> str:
        if isinstance(x, fx.Node):
            return name_of[x]
        if isinstance(x, (list, tuple)):
            inside = ", ".join(map(written, x))
            if isinstance(x, list):
                return f"[{inside}]" if any(isinstance(i, fx.Node) for i in x) or len(x) < 9 else constant(list(x))
            return f"({inside},)" if x else "()"
        return constant(x)

    lines, inputs = [], []
    for node in graph.nodes:
        if node.op == "placeholder":
            name_of[node] = next(fresh)
            inputs.append(name_of[node] if node.users else "_")
            continue
        if node.op == "get_attr":
            name_of[node] = constant(node.meta["constant"])
            continue
        if node.op == "output":
            lines.append(f"return {written(node.args[0]) if len(node.args) == 1 else written(tuple(node.args))}")
            continue
        if node not in name_of:  # those of a tuple are taken out where it is made
            name_of[node] = next(fresh)
            parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
            if parts and len(parts) == len(node.users) and isinstance(node.meta.get("val"), (tuple, list)):
                for part in parts.values():
                    name_of[part] = next(fresh)
                count = len(node.meta["val"])
                left = ", ".join(name_of[parts[i]] if i in parts else "_" for i in range(count))
                left += "," if count == 1 else ""
            else:
                left = name_of[node]
            if node.target not in functions:
                functions[node.target] = constant(_callable(node.target))
            arguments = [written(a) for a in node.args] + [f"{k}={written(v)}" for k, v in node.kwargs.items()]
            lines.append(f"{left} = {functions[node.target]}({', '.join(arguments)})")
            if left.startswith("_") or ", _" in left:
                lines.append("_ = None")
            if _may_be_laid_out_otherwise(node.target):
                made = parts.values() if left != name_of[node] else (node,)
                for part in made:
                    if isinstance(like := part.meta.get("val"), Tensor) and like.layout == torch.strided:
                        if laid_out not in functions:
                            functions[laid_out] = constant(laid_out)
                        name, shape, strides = name_of[part], tuple(like.shape), like.stride()
                        lines.append(f"if {name}.stride() != {strides}:")  # hardly ever, so no call for it
                        lines.append(f"    {name} = {functions[laid_out]}({name}, {shape}, {strides})")
        dead = [name_of[o] for o in node.all_input_nodes if last_user[o] is node and o.op != "get_attr"]
        if dead:
            lines.append(f"{' = '.join(dead)} = None")
    head = ["def run(inputs):"]
    if inputs:
        head += [f"    {', '.join(inputs)}, = inputs", "    inputs.clear()", "    _ = None"]
    return "\n".join(head + ["    " + line for line in lines]), globals_
