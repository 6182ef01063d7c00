"""Measured memory of a training step."""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peft_s2a.compat import tree_map_only

from .report import MemoryReport
from .step import LossFunction, OptimizerFactory, TrainingStep
from .trace import StepTrace


_MARK = "peft_s2a.memory#"


def profile_memory(
    model: nn.Module,
    batch: Any,
    *,
    optimizer: OptimizerFactory | None = torch.optim.AdamW,
    loss_fn: LossFunction | None = None,
    autocast: torch.dtype | None = None,
) -> MemoryReport:
    """Measures the memory of a real training step of `model` on `batch`.

    Four steps run: one that warms up (kernels compile, optimiser state appears), one for the duration, one for the
    peak, and one watched operator by operator, which splits the peak. The model is left as it was: parameters,
    buffers, gradients, train or eval mode and the random state are put back.

    The peak comes from the allocator: on CPU from the memory events of `torch.profiler`, on CUDA from
    `torch.cuda.max_memory_allocated` (whose statistics are reset). The CUDA path has not been run on a GPU yet.

    Args:
        model: Any module on one device, CPU or CUDA, in the state in which it is to be trained. A model in eval mode
            is measured in train mode.
        batch: Keyword arguments of the model as a mapping, or its single positional argument; tensors are moved to
            the model's device.
        optimizer: Makes the optimiser from the trained parameters, such as `torch.optim.AdamW` or
            `lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)`; None leaves the optimiser out.
        loss_fn: `loss_fn(model, batch)` gives the loss, a scalar tensor; None takes the model's own `.loss`.
        autocast: Low-precision dtype of the forward pass under `torch.autocast`, such as `torch.bfloat16`.

    Returns:
        The report, with `source="profile"`.

    Raises:
        ValueError: If no parameter is trained, the model is on several devices or on another device than CPU and
            CUDA, or there is no loss.
    """
    device = _device(model)
    batch = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), batch)
    with _left_unchanged(model, device):
        step = TrainingStep(model, batch, optimizer, loss_fn, autocast, device)
        step()
        seconds = _duration(step, device)
        peak = allocator_peak(step, device)
        meter = step_meter(device)
        trace = StepTrace(model, batch, step.optimizer, meter)
        with meter, trace:
            step()
        report = trace.report("profile", device.type, seconds)
    # The watched step may hold a little more: plans let tensors go later when every operator passes through Python, and
    # code compiled by `torch.compile` runs eagerly. So the allocator's word on the unwatched step stands, and the
    # working set is what nothing else accounts for.
    working = max(peak - report.peak.gradients - report.peak.kept, 0)
    return replace(report, peak=replace(report.peak, working=working))


def step_meter(device: torch.device) -> ProfilerMeter | CudaMeter:
    """What tells the live bytes within operators on `device`, as a context around the step."""
    return CudaMeter(device) if device.type == "cuda" else ProfilerMeter()


class ProfilerMeter:
    """Live bytes within operators on CPU, from the memory events of `torch.profiler` (a context around the step)."""

    def __init__(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each use prints its start and stop to stderr
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> ProfilerMeter:
        self.profile.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.profile.__exit__(*exception)

    def call(self, trace: StepTrace, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.profiler.record_function(f"{_MARK}{len(trace.moments)}"):
            return function(*args, **kwargs)

    def peaks(self, trace: StepTrace) -> list[int]:
        events = self.profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        marks = {event.name(): event.start_ns() for event in events if event.name().startswith(_MARK)}
        starts = [marks[f"{_MARK}{index}"] for index in range(len(trace.moments))]
        peaks = [0] * len(starts)
        for start, live in self._live(events):
            index = max(bisect_left(starts, start) - 1, 0)  # what follows an operator counts with it
            peaks[index] = max(peaks[index], live)
        return peaks

    def peak(self) -> int:
        """Highest live bytes, above what was live at the beginning."""
        return max((live for _, live in self._live(self.profile.profiler.kineto_results.events())), default=0)  # type: ignore[union-attr]

    @staticmethod
    def _live(events: Any) -> Iterator[tuple[int, int]]:
        """(time in ns, live bytes) after each allocation and release on the CPU."""
        live = 0
        changes = (
            (e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.device_type().name == "CPU"
        )
        for start, size in sorted(changes, key=lambda change: change[0]):
            live += size
            yield start, live


class CudaMeter:
    """Live bytes within operators on CUDA, from the statistics of the caching allocator. Not yet run on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self._before = 0
        self._peaks: list[int] = []

    def __enter__(self) -> CudaMeter:
        self._before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def call(self, trace: StepTrace, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        torch.cuda.reset_peak_memory_stats(self.device)
        output = function(*args, **kwargs)
        self._peaks.append(torch.cuda.max_memory_allocated(self.device) - self._before)
        return output

    def peaks(self, trace: StepTrace) -> list[int]:
        return self._peaks


def _duration(step: TrainingStep, device: torch.device) -> float:
    """Seconds that one step takes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def allocator_peak(step: Callable[[], Any], device: torch.device) -> int:
    """Highest live bytes during one step, above what was live before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with ProfilerMeter() as meter:
        step()
    return meter.peak()


def _device(model: nn.Module) -> torch.device:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise ValueError(
            f"model: must lie on one device, CPU or CUDA, but lies on {sorted(map(str, devices)) or 'none'}; "
            "move it there, or use estimate_memory, which takes models on the meta device too"
        )
    return devices.pop()


@contextmanager
def _left_unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Trains inside, and puts back parameters, buffers, gradients, modes and the random state."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    changing = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in (*trained, *model.buffers())]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    for parameter, _ in gradients:
        parameter.grad = None
    if not model.training:
        model.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for tensor, copy in changing:
                tensor.copy_(copy)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
