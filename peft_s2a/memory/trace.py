"""Watches one training step: which bytes are live when, what they are, and what autograd keeps for backward.

The same watching serves measured steps (real tensors) and estimated ones (fake tensors). It rests on three public
mechanisms of PyTorch: a `TorchDispatchMode` sees every operator and its outputs, weak references to storages tell when
memory is freed, and `saved_tensors_hooks` see what is kept for backward, inner graphs of autograd functions included.
"""

from __future__ import annotations

import re
import weakref
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from peft_s2a.activations.plans.trace import operator_name
from peft_s2a.activations.plans.watch import spectator
from peft_s2a.activations.wrap import sharp_attention, unplanned
from peft_s2a.compat import (
    TorchDispatchMode,
    current_autograd_node,
    current_graph_task_id,
    plain_tensors,
    sequence_number,
    tree_leaves,
)

from .report import KeptBytes, MemoryReport, PeakBytes
from .sharding import Row, Sharding, Share, share_of


# What a live storage is. The first three are there before the step and last through it.
PARAMETER, BATCH, OPTIMIZER, GRADIENT, KEPT, WORKING, OUTSIDE = range(7)

CHECKPOINT = "(input of a checkpointed module)"
UNUSED = "(unused in backward)"

_DEVICE_QUERY = torch.ops.prim.device.default  # fake tensors ask for their device through the dispatcher


class Meter(Protocol):
    """Runs the operators of a step and tells the highest live bytes during each."""

    def call(self, trace: StepTrace, function: Any, args: tuple, kwargs: dict) -> Any:
        """`function(*args, **kwargs)`, metered; `len(trace.moments)` is the operator's position in the step."""

    def peaks(self, trace: StepTrace) -> list[int]:
        """For every operator: highest live bytes while it ran, above what was live when the step began."""


@dataclass(slots=True)
class _Use:
    """A tensor packed for backward, and the operator that unpacked it."""

    module: str
    number: int
    operator: str | None = None
    ours: bool = False
    node: tuple = ()


@dataclass(slots=True)
class _Storage:
    size: int
    category: int
    dtype: torch.dtype
    uses: list[_Use] = field(default_factory=list)


@dataclass(slots=True, frozen=True)
class _Moment:
    """The state right after an operator."""

    operator: str
    module: str
    phase: str
    gradients: int
    kept: int
    live: int


class StepTrace:
    """A context in which one training step runs and is watched; it may be left and entered again within the step.

    Args:
        model: The trained model. Its submodules name the places.
        batch: The inputs, any nested structure of tensors.
        optimizer: The optimiser whose step ends the training step, None without.
        meter: Tells the live bytes within operators.
    """

    def __init__(self, model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer | None, meter: Meter):
        self.model = model
        self.optimizer = optimizer
        self.meter = meter
        self.moments: list[_Moment] = []
        self.live = [0] * 7
        self._storages: dict[int, tuple[weakref.ref, _Storage]] = {}
        self._kept: list[_Storage] = []
        self._modules: list[str] = []
        self._module_starts: list[int] = [0]
        self._module_names: list[str] = [""]
        self._in_optimizer = False
        self._is_packing = False
        self._unpacked: dict[int, int] = defaultdict(int)
        self.accumulated: list[tuple[int, str]] = []  # (operators so far, parameter whose gradient is complete)
        self._gradients = 0
        self._contexts = ExitStack()

        for tensor in (*model.parameters(), *model.buffers()):
            for plain in plain_tensors(tensor):
                self._add(plain, PARAMETER)
        for tensor in _tensors(batch):
            self._add(tensor, BATCH)
        self.batch_size = next((tensor.shape[0] for tensor in _tensors(batch) if tensor.ndim), 1)
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._add(parameter.grad, GRADIENT)
        self._add_optimizer_state()

    def __enter__(self) -> StepTrace:
        enter = self._contexts.enter_context
        enter(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
        remove = self._contexts.callback
        for name, module in self.model.named_modules():
            remove(module.register_forward_pre_hook(self._entering(name)).remove)
            remove(module.register_forward_hook(self._leave_module, always_call=True).remove)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                remove(parameter.register_post_accumulate_grad_hook(self._accumulated(name)).remove)
        if self.optimizer is not None:
            remove(self.optimizer.register_step_pre_hook(self._optimizer_begins).remove)
            remove(self.optimizer.register_step_post_hook(self._optimizer_ends).remove)
        enter(_Operators(self))
        return self

    def __exit__(self, *exception) -> None:
        self._contexts.close()

    # Live memory

    def _add(self, tensor: torch.Tensor, category: int) -> _Storage | None:
        """The record of the tensor's storage, made with `category` if there is none."""
        if tensor.layout is not torch.strided:
            return None
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages:
            return self._storages[key][1]
        record = _Storage(storage.nbytes(), category, tensor.dtype)
        self.live[category] += record.size

        def freed(_, storages=self._storages, live=self.live):
            del storages[key]
            live[record.category] -= record.size

        self._storages[key] = (weakref.ref(storage, freed), record)
        return record

    def _move(self, record: _Storage, category: int) -> None:
        self.live[record.category] -= record.size
        self.live[category] += record.size
        record.category = category

    def _add_optimizer_state(self) -> None:
        if self.optimizer is not None:
            for tensor in _tensors(list(self.optimizer.state.values())):
                record = self._add(tensor, OPTIMIZER)
                if record is not None and record.category == WORKING:
                    self._move(record, OPTIMIZER)

    def _accumulated(self, name: str):
        def accumulated(parameter: torch.Tensor) -> None:
            record = self._add(parameter.grad, GRADIENT)
            if record is not None and record.category == WORKING:
                self._move(record, GRADIENT)
            self._gradients = max(self._gradients, self.live[GRADIENT])
            self.accumulated.append((len(self.moments), name))

        return accumulated

    def _optimizer_begins(self, *_) -> None:
        self._in_optimizer = True

    def _optimizer_ends(self, *_) -> None:
        self._in_optimizer = False
        self._add_optimizer_state()

    def operator(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """Runs an operator of the step and notes what it leaves live."""
        if function is _DEVICE_QUERY or function.namespace == "profiler" or self._is_packing:
            return function(*args, **kwargs)
        output = self.meter.call(self, function, args, kwargs)
        for tensor in _tensors(output):
            self._add(tensor, WORKING)
        live, (module, phase) = self.live, self._place()
        self.moments.append(
            _Moment(
                function._schema.name,
                module,
                phase,
                live[GRADIENT],
                live[KEPT],
                live[GRADIENT] + live[KEPT] + live[WORKING],
            )
        )
        return output

    # Places

    def _entering(self, name: str):
        name = self.name_of(name)

        @spectator
        def enter_module(module, args):
            self._modules.append(name)
            self._mark_module(name)

        return enter_module

    @staticmethod
    def name_of(name: str) -> str:
        """A module's name in the model that PEFT wrapped."""
        return re.sub(r"^base_model(\.model(\.|$)|$)", "", name)

    @spectator
    def _leave_module(self, module, args, output) -> None:
        self._modules.pop()
        self._mark_module(self._modules[-1] if self._modules else "")

    def _mark_module(self, name: str) -> None:
        """Nodes of the autograd graph are numbered as they are made: remembers which numbers belong to a module."""
        number = sequence_number()
        if number >= self._module_starts[-1]:  # recomputation in a device's own backward thread counts apart
            self._module_starts.append(number)
            self._module_names.append(name)

    def _place(self) -> tuple[str, str]:
        """The (module, phase) that the step is in."""
        if current_graph_task_id() == -1:
            return (self._modules[-1] if self._modules else ""), ("optimizer" if self._in_optimizer else "forward")
        if self._modules:  # a forward pass within backward: recomputation
            return self._modules[-1], "backward"
        node = current_autograd_node()
        if node is None or node.name() == "torch::autograd::AccumulateGrad":  # sums gradients, and has no number
            return (self.moments[-1].module if self.moments else ""), "backward"
        return self._module_names[bisect_right(self._module_starts, node._sequence_nr()) - 1], "backward"

    # What is kept for backward

    def _pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, _Use | None]:
        use = None
        record = self._add(tensor, OUTSIDE)
        if record is not None and record.category != PARAMETER:
            if not record.uses:
                record.dtype = tensor.dtype
                self._kept.append(record)
            if record.category == WORKING:
                self._move(record, KEPT)
            use = _Use(self._place()[0], sequence_number() - 1)
            record.uses.append(use)
        if tensor.grad_fn is None:  # itself: others may watch whether this very object lives
            return tensor, use
        self._is_packing = True
        try:
            return tensor.detach(), use  # an operator's output itself would tie its node into a reference cycle
        finally:
            self._is_packing = False

    def _unpack(self, packed: tuple[torch.Tensor, _Use | None]) -> torch.Tensor:
        tensor, use = packed
        node = current_autograd_node()
        kept_by = self._kept_by(node)
        if use is not None and use.operator is None and node is not None:
            *name, number = kept_by or (*operator_name(node), None)
            use.operator, use.ours = name
            use.node = (node.name(), node._sequence_nr(), number)
            if use.number != node._sequence_nr() and not isinstance(node, torch.autograd.function.BackwardCFunction):
                use.operator = CHECKPOINT  # unpacked on behalf of a node made later: an input of what is recomputed
        return tensor

    def _kept_by(self, node: Any) -> tuple[str, bool, int] | None:
        """Of the tensor that is being unpacked: the operator inside a plan, which unpacks all of its tensors in order."""
        names = getattr(node, "kept_by", None)
        if names is None:
            return None
        place = self._unpacked[node._sequence_nr()]
        self._unpacked[node._sequence_nr()] += 1
        return names[place % len(names)]

    def kept(self) -> tuple[dict[str, KeptBytes], dict[str, KeptBytes]]:
        """What was kept for backward, (by operator, by module), largest first."""
        codes: dict[tuple, int] = defaultdict(int)
        for record in self._kept:
            for use in record.uses:
                if use.ours and not record.dtype.is_floating_point:
                    codes[use.node] += record.size
        operators: dict[str, KeptBytes] = defaultdict(KeptBytes)
        modules: dict[str, KeptBytes] = defaultdict(KeptBytes)
        for record in self._kept:
            # The tensors of a code beside it (scales, offsets, row statistics) are part of the quantised form.
            coded = all(use.ours and codes[use.node] >= record.size for use in record.uses)
            if coded:
                size = KeptBytes(quantized=record.size)
            elif record.dtype.is_floating_point or record.dtype.is_complex:
                size = KeptBytes(full_precision=record.size)
            else:
                size = KeptBytes(masks=record.size)
            owner = next((use for use in record.uses if use.operator), record.uses[0])
            operators[owner.operator or UNUSED] += size
            modules[owner.module] += size
        return _sorted(operators), _sorted(modules)

    def report(
        self, source: str, device: str, step_seconds: float | None = None, sharding: Sharding | None = None
    ) -> MemoryReport:
        """What was seen, once the step is over; under `sharding` the part of one of its processes.

        Raises:
            RuntimeError: If no operator was seen.
        """
        if not self.moments:
            raise RuntimeError("no operator ran within the trace: run the training step inside its context")
        rows = tuple(
            Row(m.phase, m.module, m.operator, m.gradients, m.kept, max(peak, m.live) - m.gradients - m.kept)
            for m, peak in zip(self.moments, self.meter.peaks(self))
        )
        share, gradients = Share(self.live[PARAMETER], self.live[OPTIMIZER], rows), self._gradients
        if sharding is not None:
            share = share_of(sharding, self, share)
            gradients = max(row.gradients for row in share.rows)
        at = max(share.rows, key=lambda row: row.total)
        by_operator, by_module = self.kept()
        parameters = list(self.model.parameters())
        return MemoryReport(
            source=source,
            device=device,
            batch_size=self.batch_size,
            trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            total_parameters=sum(p.numel() for p in parameters),
            parameter_bytes=share.parameters,
            gradient_bytes=gradients,
            optimizer_bytes=share.optimizer,
            batch_bytes=self.live[BATCH],
            saved_bytes=sum(record.size for record in self._kept),
            by_operator=by_operator,
            by_module=by_module,
            peak=PeakBytes(
                parameters=share.parameters,
                batch=self.live[BATCH],
                optimizer=share.optimizer,
                gradients=at.gradients,
                kept=at.kept,
                working=at.working,
                phase=at.phase,
                module=at.module,
                operator=at.operator,
                engine=at.engine,
            ),
            unplanned={self.name_of(name): reason for name, reason in unplanned(self.model).items()},
            sharp_attention={self.name_of(name): error for name, error in sharp_attention(self.model).items()},
            step_seconds=step_seconds,
            timeline=tuple((row.phase, row.gradients, row.kept, row.working, row.engine) for row in share.rows),
            processes=sharding.processes if sharding is not None else 1,
            sharding=sharding.engine if sharding is not None else None,
        )


class _Operators(TorchDispatchMode):
    def __init__(self, trace: StepTrace):
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.trace.operator(function, args, kwargs or {})


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _sorted(sizes: dict[str, KeptBytes]) -> dict[str, KeptBytes]:
    return dict(sorted(sizes.items(), key=lambda item: -item[1].total))
