"""Writing down, as a graph, the operators that are called on fake tensors.

What `torch.fx.experimental.proxy_tensor.make_fx` does, without what plans have no use for: symbolic shapes, proxies, stack
traces, other metadata and the code of a module.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from ...compat import FakeTensor, OpOverload, TorchDispatchMode, decomposed, no_dispatch_modes, snapshot


aten = torch.ops.aten


class Untraceable(Exception):
    """Why a call cannot be recorded, in words that go after "because"."""


class Recorder(TorchDispatchMode):
    """While entered, every operator becomes a node of `graph`, with its results as fake tensors in ``meta["val"]``.

    Tensors that no operator made are constants: nodes without a target, with the tensor in ``meta["constant"]``.

    Args:
        arguments: fake tensors, which get placeholders.
        own: the tensors of the module that is recorded.

    Attributes:
        graph: what has been recorded, without an output.
        node_of: the node that made a tensor.
        phase: the ``meta["phase"]`` of the nodes made from now on.
    """

    def __init__(self, arguments: Sequence[FakeTensor], own: Sequence[Tensor]) -> None:
        super().__init__()
        self._own = set(map(id, own))
        self.graph = fx.Graph()
        self.node_of = WeakTensorKeyDictionary()
        self.phase = "forward"
        self._arguments = arguments
        self._fakes: dict[int, FakeTensor] = {}  # of the module's own tensors
        self._values: dict[fx.Node, Tensor] = {}  # of what was made of numbers in the code
        for number, x in enumerate(arguments):
            self._note(x, self.graph.placeholder(f"argument_{number}"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        tensors = list(_tensors((args, *kwargs.values())))
        if not isinstance(func, OpOverload) or not all(type(x) in _PLAIN or x in self.node_of for x in tensors):
            return NotImplemented
        result = decomposed(func, tensors, self, args, kwargs)
        if result is not NotImplemented:
            return result
        if torch.Tag.data_dependent_output in func.tags:
            return self._asked(func, tensors, args, kwargs)
        if func in _AS_STRIDED and len(args) > 3 and args[3] is not None:
            raise Untraceable("it reads memory from a fixed place on")
        if func is aten.lift_fresh.default:  # what is made of numbers may be written to: every run has its own
            func = aten.lift_fresh_copy.default
        written_args, written_kwargs = self._written(tuple(args)), {k: self._written(x) for k, x in kwargs.items()}
        result = func(*self._faked(func, args), **kwargs)
        known = self._known_result(func, tensors, args, kwargs, result)
        node = self.graph.create_node("call_function", func, written_args, written_kwargs)
        node.meta["phase"] = self.phase
        if known is not None:
            self._values[node] = known
        if isinstance(result, Tensor):
            self._note(result, node)
        elif isinstance(result, (list, tuple)):
            vals = [snapshot(x) if isinstance(x, Tensor) else x for x in result]
            node.meta["val"] = vals if isinstance(result, list) else tuple(vals)
            for place, x in enumerate(result):
                if isinstance(x, Tensor):
                    self._note(x, self.graph.create_node("call_function", operator.getitem, (node, place)))
        return result

    def _faked(self, func: OpOverload, args: tuple) -> tuple:
        """``args`` with fake tensors for the module's own where these are only read: the mode of fake tensors, which would
        make them, remembers the results of operators on fake tensors alone."""
        if func._schema.is_mutable:
            return args
        return tuple([self._fake(x) if id(x) in self._own else x for x in args])

    def _fake(self, x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor) or not x.is_floating_point():  # counters are computed with, see `trace`
            return x
        if id(x) not in self._fakes:
            self._fakes[id(x)] = self._arguments[0].fake_mode.from_tensor(x)
        return self._fakes[id(x)]

    def nodes_of(self, results: Iterable[Any]) -> list[fx.Node | None]:
        """The nodes of tensors; None for what is none."""
        return [self._written(x) for x in results]

    def alive(self) -> list[Tensor]:
        """Recorded tensors, arguments apart, that somebody still holds."""
        return [x for x in self.node_of if not any(x is argument for argument in self._arguments)]

    def _note(self, x: Tensor, node: fx.Node) -> None:
        node.meta["val"], node.meta["phase"] = snapshot(x), self.phase
        self.node_of[x] = node

    def _written(self, x: Any) -> Any:
        """What stands for ``x`` in the graph."""
        if isinstance(x, Tensor):
            node = self.node_of.get(x)
            if node is None:
                if x.grad_fn is not None and id(x) not in self._own:
                    raise Untraceable("it reads a tensor with a history that is no argument")
                node = self.graph.create_node("get_attr", "constant")
                node.meta["constant"], node.meta["phase"] = x, self.phase
            return node
        if type(x) in (list, tuple):
            return type(x)([self._written(item) for item in x])
        if isinstance(x, torch.Generator):
            raise Untraceable("it draws from a random generator of its own")
        return x

    def _known(self, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any] | None:
        """``args`` with values in place of tensors; None unless the code alone decides about all of them."""
        own = [x for x in args if isinstance(x, Tensor)]
        values = [self._values.get(self.node_of.get(x)) for x in own]
        if kwargs or not own or len(own) < len(tensors) or any(value is None for value in values):
            return None
        rest = iter(values)
        return [next(rest) if isinstance(x, Tensor) else x for x in args]

    def _asked(self, func: OpOverload, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The answer of an operator that tells the value of a tensor.

        Raises:
            Untraceable: if it may be another one in the next call.
        """
        known = self._known(tensors, args, kwargs)
        if known is None:
            raise Untraceable(f"it asks for the value of a tensor ({func})")
        with no_dispatch_modes():
            return func(*known)

    def _known_result(
        self, func: OpOverload, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: dict[str, Any], result: Any
    ) -> Tensor | None:
        """The value of a result of at most one number, if the code alone decides about it."""
        if func is aten.lift_fresh_copy.default:
            with no_dispatch_modes():
                return args[0].clone() if result.numel() <= 1 else None
        if not self._values:
            return None
        if isinstance(result, Tensor) and result.numel() <= 1 and torch.Tag.nondeterministic_seeded not in func.tags:
            known = self._known(tensors, args, kwargs)
            if known is not None:
                with no_dispatch_modes():
                    return func(*known)
        if func._schema.is_mutable:  # it may write to memory that some of them look at
            self._values.clear()
        return None


_AS_STRIDED = (aten.as_strided.default, aten.as_strided_.default)
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)


def _tensors(x: Iterable[Any]) -> Iterator[Tensor]:
    for item in x:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _tensors(item)
