"""What one of several processes holds in a training step: what its engine shares out, and what the engine adds.

Each engine is described by what its code allocates, in its default settings:

* `ddp`: torch's `DistributedDataParallel` (Li et al. 2020, arXiv:2006.15704). Everything is in every process; gradients
  are copied into buckets, which are as large as they are.
* `fsdp2`: torch's `fully_shard` (Zhao et al. 2023, arXiv:2304.11277, for the idea) on each block and on the whole model.
  Of each parameter a process holds the rows ``ceil(rows / processes)``. A block is gathered before it runs, into a flat
  buffer and from there into its parameters, and let go after it; in the backward pass the block before it is gathered
  meanwhile. Gradients of a block are copied into one buffer, and reduced to shards when it is through.
* `zero2`, `zero3`: DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054). Gradients and optimiser state of the
  trained parameters are shared out as parts of one flat tensor; in stage 3 also all parameters, each by itself. Its buffer
  for gradients on their way has `reduce_bucket_size` elements whatever is trained. Stage 3 lets a parameter go only if
  the step does not need it again within a billion elements, so models below half of that are whole in every process.

What the communication library allocates by itself (NCCL's channels, gloo's buffers) is not counted.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from peft_s2a.anatomy import find_blocks

from .report import ENGINE_TITLES


if TYPE_CHECKING:
    from .trace import StepTrace


ENGINES = tuple(ENGINE_TITLES)

REDUCE_BUCKET_SIZE = 500_000_000
"""DeepSpeed's default for its setting of that name, in elements."""

MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of `stage3_max_live_parameters`, and of `stage3_max_reuse_distance`."""

PREFETCH_BUCKET_SIZE = 50_000_000
"""DeepSpeed's default of `stage3_prefetch_bucket_size`, in elements."""

PARAM_PERSISTENCE_THRESHOLD = 100_000
"""DeepSpeed's default of `stage3_param_persistence_threshold`: parameters with no more elements stay gathered."""


@dataclass(frozen=True)
class Sharding:
    """How processes share the training of a model.

    Attributes:
        engine: One of `ENGINES`.
        processes: How many there are, 2 or more.
        reduce_bucket_size: DeepSpeed's setting, in elements. Other engines do not have it.
    """

    engine: str
    processes: int
    reduce_bucket_size: int = REDUCE_BUCKET_SIZE


def find_sharding(
    processes: int = 1, sharding: str | None = None, reduce_bucket_size: int | None = None
) -> Sharding | None:
    """The sharding that the arguments ask for, None for one process.

    Args:
        processes: How many processes train together.
        sharding: One of `ENGINES`; None, or "none", for processes that share out nothing, which is "ddp".
        reduce_bucket_size: DeepSpeed's setting, in elements; None: its default.

    Raises:
        ValueError: If an argument is out of range, or they do not go together.
    """
    if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        raise ValueError(f"processes: must be a positive integer, got {processes!r}")
    if sharding is not None and sharding not in ("none", *ENGINES):
        raise ValueError(
            f"sharding: must be one of {', '.join(ENGINES)}, or none for processes that share out nothing (which is "
            f"ddp), got {sharding!r}"
        )
    if processes == 1 and sharding in ENGINES:
        raise ValueError(f"sharding: {sharding!r} is for several processes, got processes=1; leave one of the two out")
    is_deepspeed = sharding in ("zero2", "zero3")
    if reduce_bucket_size is not None and not is_deepspeed:
        raise ValueError(f"reduce_bucket_size: is a setting of zero2 and zero3, got sharding={sharding or 'none'!r}")
    if reduce_bucket_size is not None and reduce_bucket_size < 1:
        raise ValueError(f"reduce_bucket_size: must be positive, got {reduce_bucket_size}")
    if processes == 1:
        return None
    engine = sharding if sharding in ENGINES else "ddp"
    return Sharding(engine, processes, reduce_bucket_size or REDUCE_BUCKET_SIZE)


def blocks_to_shard(model: nn.Module) -> list[str]:
    """The modules that `fully_shard` goes on before the model itself: the blocks of its backbone, or its stages where no
    blocks are found. None under a ladder, which reads its parameters outside of them.

    Args:
        model: Any module, with tuners in it or without.

    Returns:
        Names as `model.named_modules()` has them. None of the modules lies in another.
    """
    from peft_s2a.tuners.ladder import LadderRung

    return [] if any(isinstance(module, LadderRung) for module in model.modules()) else find_blocks(model)


@dataclass(frozen=True)
class Row:
    """Live bytes at one operator of a step, at its own peak."""

    phase: str
    module: str
    operator: str
    gradients: int
    kept: int
    working: int
    engine: int = 0

    @property
    def total(self) -> int:
        return self.gradients + self.kept + self.working + self.engine


@dataclass(frozen=True)
class Share:
    """A process's share of a step: bytes that last through it, and those that come and go."""

    parameters: int
    optimizer: int
    rows: tuple[Row, ...]


def share_of(sharding: Sharding, trace: StepTrace, whole: Share) -> Share:
    """What of `whole`, a step in one process, is in each of several.

    Args:
        sharding: How they share.
        trace: The step that was watched.
        whole: Its bytes; one row for each operator.
    """
    return {"ddp": _ddp, "fsdp2": _fsdp2, "zero2": _zero2, "zero3": _zero3}[sharding.engine](sharding, trace, whole)


def _ddp(sharding: Sharding, trace: StepTrace, whole: Share) -> Share:
    buckets = sum(map(_bytes, _trained(trace.model)))
    return replace(whole, rows=tuple(replace(row, engine=buckets) for row in whole.rows))


def _fsdp2(sharding: Sharding, trace: StepTrace, whole: Share) -> Share:
    return _BlockByBlock(sharding, trace, whole).share()


ROOT = -1
"""Stands, among the numbers of blocks in the order in which they run, for what lies in none of them."""


class _BlockByBlock:
    """A step under FSDP2, replayed on the rows of one process."""

    def __init__(self, sharding: Sharding, trace: StepTrace, whole: Share):
        self.trace, self.whole, self.processes = trace, whole, sharding.processes
        blocks = [trace.name_of(name) for name in blocks_to_shard(trace.model)]
        places = [_holder(row.module, blocks) for row in whole.rows]
        order = {name: number for number, name in enumerate(dict.fromkeys([*filter(None, places), *blocks]))}
        self.block_of_row = [ROOT if name is None else order[name] for name in places]
        self.block_of: dict[str, int] = {}  # by name of a parameter
        self.sizes: dict[str, int] = {}
        self.shards: Counter[int] = Counter()  # bytes of a block's parameters that lie in one process
        self.trained: Counter[int] = Counter()  # of these the trained ones
        for name, parameter in trace.model.named_parameters():
            holder = _holder(trace.name_of(name), blocks)
            block = self.block_of[name] = ROOT if holder is None else order[holder]
            self.sizes[name] = _bytes(parameter)
            rows = parameter.shape[0] if parameter.ndim else 1
            shard = math.ceil(rows / self.processes) * (_bytes(parameter) // max(rows, 1))
            self.shards[block] += shard
            self.trained[block] += shard if parameter.requires_grad else 0
        self.spans = {phase: self._spans(phase) for phase in ("forward", "backward")}
        self.rows: list[Row] = []
        self.phase = ""
        self.module = ""
        self.after = (0, 0)  # kept and working, when the last operator was through
        self.gathered: set[int] = set()
        self.buffers: dict[int, int] = {}  # what is all-gathered and not yet copied into parameters, by block
        self.complete: Counter[int] = Counter()  # gradients that are not reduced yet, by block
        self.reduced = 0  # shards of gradients
        self.reducing = 0  # the buffer of the last reduction

    def share(self) -> Share:
        buffers = self.whole.parameters - sum(self.sizes.values())
        trained = sum(map(_bytes, _trained(self.trace.model)))
        optimizer = self.whole.optimizer * self.trained.total() // max(trained, 1)
        self._replay()
        return Share(self.shards.total() + buffers, optimizer, tuple(self.rows))

    def _replay(self) -> None:
        accumulated: dict[int, list[str]] = defaultdict(list)
        for index, name in self.trace.accumulated:
            accumulated[index].append(name)
        for index, (row, moment) in enumerate(zip(self.whole.rows, self.trace.moments, strict=True)):
            block, self.module = self.block_of_row[index], row.module
            if row.phase != self.phase:
                self._begin(row.phase)
            first, last = self.spans.get(row.phase, {}).get(block, (None, None))
            if index == first:
                self._enter(block)
            working = row.working if row.phase != "optimizer" else math.ceil(row.working / self.processes)
            self._note(row.operator, row.kept, working)
            self.after = moment.kept, moment.live - moment.gradients - moment.kept
            for name in accumulated[index + 1]:  # right after this operator
                self.complete[self.block_of[name]] += self.sizes[name]
            if index == last:
                self._leave(block)
        if self.phase == "backward":
            self._end_backward()

    def _spans(self, phase: str) -> dict[int, tuple[int, int]]:
        """The first and the last row of each block in a pass."""
        found: dict[int, tuple[int, int]] = {}
        for index, (row, block) in enumerate(zip(self.whole.rows, self.block_of_row, strict=True)):
            if row.phase == phase and block != ROOT:
                found[block] = found.get(block, (index, index))[0], index
        return found

    def _whole(self, block: int) -> int:
        """Bytes of a block's parameters, gathered."""
        return self.shards[block] * self.processes

    def _begin(self, phase: str) -> None:
        if self.phase == "backward":
            self._end_backward()
        self.phase = phase
        if phase == "forward":
            self._enter(ROOT)
        elif phase == "backward":  # begins at the root, which is still gathered, and asks for the last block
            self.buffers.clear()
            self._prefetch(max(self.shards))

    def _enter(self, block: int) -> None:
        earlier = [other for other in self.buffers if other != block]
        self.buffers[block] = self._whole(block)
        self._note("fsdp::all_gather_copy_in", *self.after)
        if self.phase == "forward":  # it keeps a buffer until the next one is full
            for other in earlier:
                del self.buffers[other]
        self.gathered.add(block)
        self._note("fsdp::split_with_sizes_copy", *self.after)
        if self.phase == "backward":
            self.buffers.clear()
            self._prefetch(block - 1)

    def _prefetch(self, block: int) -> None:
        if block > ROOT:
            self.buffers[block] = self._whole(block)

    def _leave(self, block: int) -> None:
        self.gathered.discard(block)
        if self.phase == "backward":
            self._reduce(block)

    def _reduce(self, block: int) -> None:
        self.reducing = 0
        if self.complete[block]:
            self.reducing = self.trained[block] * self.processes
            self._note("fsdp::chunk_cat", *self.after)
            self.reduced += self.trained[block]
            del self.complete[block]

    def _end_backward(self) -> None:
        self.buffers.clear()
        for block in (ROOT, *self.complete):
            self.gathered.discard(block)
            self._reduce(block)
        self.gathered.clear()
        self.reducing = 0

    def _note(self, operator: str, kept: int, working: int) -> None:
        gathered = sum(map(self._whole, self.gathered)) + sum(self.buffers.values())
        gradients = self.reduced + self.complete.total()
        self.rows.append(Row(self.phase, self.module, operator, gradients, kept, working, gathered + self.reducing))


def _zero2(sharding: Sharding, trace: StepTrace, whole: Share) -> Share:
    parameters = _trained(trace.model)
    count, item = sum(p.numel() for p in parameters), parameters[0].element_size()
    part = math.ceil(count / (2 * sharding.processes)) * 2  # elements, even in number
    flat = part * sharding.processes - count
    master, gradients = part * _MASTER, part * item
    sizes = {name: p.numel() for name, p in trace.model.named_parameters()}
    first = _first_reduction([(index, sizes[name]) for index, name in trace.accumulated], sharding.reduce_bucket_size)
    rows = []
    for index, row in enumerate(whole.rows):
        if row.phase == "forward":
            rows.append(replace(row, gradients=0, engine=master))
        elif row.phase == "backward":
            held = gradients if index >= first else 0
            rows.append(replace(row, gradients=held, engine=master + sharding.reduce_bucket_size * item))
        else:  # the gradients once more, as one tensor
            working = _of_one_tensor(row.working, parameters, master)
            rows.append(replace(row, gradients=gradients, working=working, engine=2 * master))
    optimizer = whole.optimizer * master // sum(map(_bytes, parameters))
    return Share(whole.parameters + flat * item, optimizer, tuple(rows))


def _first_reduction(accumulated: Sequence[tuple[int, int]], bucket: int) -> int:
    """The operator from which on a process holds its part of the gradients: the one that makes a bucket overflow, or the
    last. `accumulated`: (operators so far, elements) of each gradient, in order."""
    total = 0
    for index, elements in accumulated:
        total += elements
        if total > bucket:
            return index
    return max((index for index, _ in accumulated), default=0)


def _zero3(sharding: Sharding, trace: StepTrace, whole: Share) -> Share:
    parameters, trained = list(trace.model.parameters()), _trained(trace.model)
    item = trained[0].element_size()

    def part(tensor: torch.Tensor) -> int:
        return math.ceil(tensor.numel() / sharding.processes) * tensor.element_size()

    lasting = [p for p in parameters if p.numel() <= PARAM_PERSISTENCE_THRESHOLD]
    passing = [p for p in parameters if p.numel() > PARAM_PERSISTENCE_THRESHOLD]
    most = sum(map(_bytes, passing))
    elements = sum(p.numel() for p in passing)
    most = most * min(elements, MAX_LIVE_PARAMETERS) // max(elements, 1)
    gradients = sum(map(part, trained))
    flat = gradients // item * _MASTER  # as large as what the optimiser updates
    master = 0 if trained[0].dtype == torch.float32 else flat
    # Beside the gradients' parts there is a tensor as large that the optimiser reads. A parameter is put together from a
    # buffer into which as many as are fetched ahead were gathered.
    fixed = master + sharding.reduce_bucket_size * item + flat
    most += min(most, PREFETCH_BUCKET_SIZE * item)
    rows = []
    for row in whole.rows:
        if row.phase == "optimizer":
            working = _of_one_tensor(row.working, trained, flat)
            rows.append(replace(row, gradients=gradients, working=working, engine=fixed))
        else:
            rows.append(replace(row, gradients=gradients, engine=fixed + most))
    optimizer = whole.optimizer * flat // sum(map(_bytes, trained))
    held = whole.parameters - sum(map(_bytes, parameters)) + sum(map(part, parameters)) + sum(map(_bytes, lasting))
    return Share(held, optimizer, tuple(rows))


_MASTER = 4
"""Bytes of an element of what DeepSpeed's optimisers update, which is float32 whatever the model is."""


def _of_one_tensor(working: int, parameters: Sequence[torch.Tensor], size: int) -> int:
    """The working set of an optimiser whose only parameter takes `size` bytes, where it goes through `parameters` one by
    one and needs the most, `working`, for the largest of them."""
    return working * size // max(map(_bytes, parameters))


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _holder(name: str, blocks: Sequence[str]) -> str | None:
    """The block that a module or parameter lies in, or is."""
    return next((block for block in blocks if name == block or name.startswith(f"{block}.")), None)
