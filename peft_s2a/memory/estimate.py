"""Memory of a training step from shapes alone: the step runs on fake tensors, which have sizes but no data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from peft_s2a.activations.wrap import plan_anew
from peft_s2a.anatomy.usage import stand_in
from peft_s2a.compat import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode, tree_map_only

from .report import KeptBytes, MemoryReport, PeakBytes
from .sharding import find_sharding
from .step import LossFunction, OptimizerFactory, TrainingStep
from .trace import StepTrace
from .workspace import workspace_bytes


def estimate_memory(
    model: nn.Module,
    batch: Any,
    *,
    optimizer: OptimizerFactory | None = torch.optim.AdamW,
    loss_fn: LossFunction | None = None,
    autocast: torch.dtype | None = None,
    device: str | torch.device | None = None,
    processes: int = 1,
    sharding: str | None = None,
    reduce_bucket_size: int | None = None,
) -> MemoryReport:
    """Estimates the memory of a training step of `model`, as `profile_memory` measures it, without allocating any.

    The step runs operator by operator on fake tensors, and the sizes of what is live are added up. What kernels
    allocate within themselves is modelled for the CPU kernels for which it matters (see `workspace.py`) and left out
    on CUDA, where libraries choose it at run time.

    Args:
        model: Any module, with data or on the meta device, in the state in which it is to be trained; it is not
            changed. A model in eval mode is estimated in train mode.
        batch: What the model takes: keyword arguments as a mapping, or its single positional argument. Only shapes and
            dtypes of the tensors matter, so they may be on the meta device. An integer stands for that many images of
            the size in the `config` of a transformers model, with labels: `image_batch(model, n)`.
        optimizer, loss_fn, autocast: As for `profile_memory`.
        device: Where the step is to run, "cpu" or "cuda"; None: where the parameters are (CPU for meta). Estimates
            for CUDA need a CUDA build of PyTorch; they have not been checked on a GPU yet.
        processes: How many processes train together, each on a batch like this one. The report is that of one.
        sharding: Under which engine: "ddp" (the default for several processes), "fsdp2", "zero2" or "zero3", in its
            default settings, `fully_shard` on `blocks_to_shard(model)` and the model. See `sharding.py`.
        reduce_bucket_size: DeepSpeed's setting of that name, in elements; None: its default, 500,000,000.

    Returns:
        The report, with `source="estimate"`.

    Raises:
        ValueError: If no parameter is trained, the device cannot be estimated, there is no loss, `processes`,
            `sharding` or `reduce_bucket_size` are out of range or do not go together, or the model's operators depend on the values of tensors (`profile_memory` can still measure it).
    """
    device = _target(model, device)
    shared = find_sharding(processes, sharding, reduce_bucket_size)
    if isinstance(batch, int):
        batch = image_batch(model, batch)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with fake_mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    try:
        with stand_in(model, fake), torch.random.fork_rng([]):
            if not model.training:
                model.train()
            plan_anew(model)  # undone with everything else that is set on modules in here
            batch = tree_map_only(torch.Tensor, fake, batch)
            step = TrainingStep(model, batch, optimizer, loss_fn, autocast, device)
            _prepare_optimizer(step, device)
            meter = ShapeMeter(device)
            trace = StepTrace(model, batch, step.optimizer, meter)
            with fake_mode, trace:
                step.forward_backward()
            with trace:  # not under the fake mode: optimisers read their step counters, which are real scalars
                step.update()
            return trace.report("estimate", device.type, sharding=shared)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"model: its operators depend on the values of tensors ({error}), so shapes alone do not tell its memory; "
            "measure it with profile_memory"
        ) from error


def extrapolate_memory(small: MemoryReport, large: MemoryReport, batch_size: int) -> MemoryReport:
    """The report at a larger batch, on the line through two smaller ones of the same model.

    Once the batch is large enough for every tile to be full and the peak to stay in its place, memory grows along that
    line, while the number of operators of a model that runs in tiles, and with it the time of an estimate, grows too.

    Raises:
        ValueError: If the batch sizes do not grow from `small` over `large` to `batch_size`.
    """
    if not small.batch_size < large.batch_size <= batch_size:
        raise ValueError(
            f"batch_size: must not be below those of the reports, which must grow; got {small.batch_size}, "
            f"{large.batch_size} and {batch_size}"
        )
    steps = (batch_size - large.batch_size) / (large.batch_size - small.batch_size)

    def extended(a: Any, b: Any) -> Any:
        if isinstance(b, Mapping):
            return {name: extended(a.get(name, KeptBytes()), value) for name, value in b.items()}
        if isinstance(b, (KeptBytes, PeakBytes)):
            return type(b)(*(extended(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(b)))
        return max(round(b + (b - a) * steps), 0) if isinstance(b, int) else b

    grown = ("batch_size", "batch_bytes", "saved_bytes", "by_operator", "by_module", "peak")
    changes = {name: extended(getattr(small, name), getattr(large, name)) for name in grown}
    return dataclasses.replace(large, source="extrapolation", timeline=(), **changes)


def largest_batch_size(
    report: Callable[[int], MemoryReport], budget: int, *, start: int = 8, limit: int = 1 << 16
) -> int:
    """The largest batch size whose peak fits into a budget.

    Beyond some size memory grows very nearly in proportion to the batch, so where the line through the largest known
    size that fits and the smallest that does not (or else the largest two) crosses the budget is tried first.

    Args:
        report: Gives the report at a batch size, such as `lambda n: estimate_memory(model, n)`.
        budget: Bytes for everything: parameters, optimiser state, batch and the step.
        start: A batch size to begin with.
        limit: The largest size tried.

    Returns:
        The size, 0 if not even one sample fits, at most `limit`.

    Raises:
        ValueError: If budget, start or limit is not positive.
    """
    for name, value in (("budget", budget), ("start", start), ("limit", limit)):
        if value <= 0:
            raise ValueError(f"{name}: must be positive, got {value}")
    peaks: dict[int, int] = {}
    fits, fails = 0, limit + 1  # the answer lies in [fits, fails)
    size = 1
    while fits < size < fails:
        peaks[size] = report(size).peak_bytes
        fits, fails = (size, fails) if peaks[size] <= budget else (fits, size)
        size = min(max(start, 2), limit) if len(peaks) == 1 else _guess(peaks, budget, fits, fails)
    return fits


def _guess(peaks: Mapping[int, int], budget: int, fits: int, fails: int) -> int:
    """The batch size to try next, strictly between `fits` and `fails` if anything is."""
    a, b = (fits, fails) if fails in peaks else sorted(peaks)[-2:]
    slope = (peaks[b] - peaks[a]) / (b - a)
    crossing = math.floor(a + (budget - peaks[a]) / slope) if slope > 0 else fails - 1
    if len(peaks) > 4 and len(peaks) % 2 and crossing > fits + 1:  # by now a line would have met it
        return (fits + fails) // 2
    return min(max(crossing, fits + 1), fails - 1)


def image_batch(model: nn.Module, batch_size: int, image_size: int | tuple[int, int] | None = None) -> dict[str, Any]:
    """A batch of images with class labels for a transformers model, on the meta device.

    Args:
        model: A model with a `config`, wrapped by PEFT or not.
        batch_size: Number of images.
        image_size: Pixels, (height, width) or both at once; None: `config.image_size`, 224 where it has none.

    Returns:
        `pixel_values` (batch_size, channels, height, width) in the model's dtype, and `labels` (batch_size,) int64.

    Raises:
        ValueError: If the model has no config, or the batch size is not positive.
    """
    config = getattr(model, "config", None)
    if config is None or isinstance(config, Mapping):
        raise ValueError(
            f"batch: {type(model).__name__} has no transformers config to take the image size from; "
            "pass the batch itself (tensors on the meta device will do)"
        )
    if batch_size < 1:
        raise ValueError(f"batch: the batch size must be positive, got {batch_size}")
    config = getattr(config, "vision_config", config)
    size = image_size or getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    channels = getattr(config, "num_channels", 3)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {
        "pixel_values": torch.empty(batch_size, channels, height, width, dtype=dtype, device="meta"),
        "labels": torch.empty(batch_size, dtype=torch.int64, device="meta"),
    }


class ShapeMeter:
    """Live bytes within operators, from the sizes of their tensors and a model of what kernels allocate."""

    def __init__(self, device: torch.device):
        self.device = device
        self._workspaces: list[int] = []

    def call(self, trace: StepTrace, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        self._workspaces.append(workspace_bytes(function, args, output) if self.device.type == "cpu" else 0)
        return output

    def peaks(self, trace: StepTrace) -> list[int]:
        return [moment.live + workspace for moment, workspace in zip(trace.moments, self._workspaces)]


def _target(model: nn.Module, device: str | torch.device | None) -> torch.device:
    if device is None:
        device = next((p.device for p in model.parameters() if p.device.type != "meta"), "cpu")
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: must be 'cpu' or 'cuda', got {str(device)!r}")
    if device.type == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        raise ValueError("device: an estimate for 'cuda' needs a CUDA build of PyTorch, and this one is for CPU only")
    return device


def _prepare_optimizer(step: TrainingStep, device: torch.device) -> None:
    """Lets optimiser state appear, as it has after the first step of a training."""
    if step.optimizer is None:
        return
    for group in step.optimizer.param_groups:
        if device.type == "cuda" and group.get("foreach", False) is None:
            group["foreach"] = True  # what PyTorch picks for real tensors there, but not for fake ones
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    step.update()
