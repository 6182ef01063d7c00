"""A callback that shows the memory of a `Trainer` run."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .memory.profile import step_meter
from .memory.report import MemoryReport, MiB
from .memory.trace import StepTrace


class MemoryCallback(TrainerCallback):
    """Logs peak memory, saved activation bytes and step time with the trainer's own logs; prints a report at the end.

    One step of the run is watched operator by operator (the second; the only one if there is only one), which makes it
    slower; all others run as they are. At every logging step, `Trainer.log` gets

    * `step_seconds`: the median duration of a step since the last time, the watched one left out;
    * `peak_memory_mib`: on CPU the peak of the watched step with parameters and optimiser state; on CUDA the highest
      allocated memory since the last time, whose statistics are reset;
    * `saved_activations_mib`: what the watched step kept for backward.

    With gradient accumulation, the watched micro-batch is the last of the step. The watched part ends before the
    optimiser's step. A model under `torch.compile` runs eagerly while it is watched.

    Args:
        trainer: The trainer that the callback is added to.
        print_report: Print `report` when training ends.

    Attributes:
        report: The `MemoryReport` of the watched step, None before it.

    Example:
        ```py
        trainer = Trainer(model, arguments, train_dataset=dataset)
        trainer.add_callback(MemoryCallback(trainer))
        trainer.train()
        ```
    """

    def __init__(self, trainer: Trainer, print_report: bool = True):
        self.trainer = trainer
        self.print_report = print_report
        self.report: MemoryReport | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.report = None
        self._watched_step = min(state.global_step + 2, state.max_steps)
        self._durations: list[float] = []
        self._since_log: list[float] = []
        self._has_logged = False

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._is_watching = state.global_step + 1 == self._watched_step
        if self._is_watching:
            self.trainer.training_step = self._watched_training_step  # type: ignore[method-assign]
        self._start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_watching:
            del self.trainer.training_step  # the class's own is back
        else:
            if args.device.type == "cuda":
                torch.cuda.synchronize(args.device)
            self._since_log.append(time.perf_counter() - self._start)
        if control.should_log:
            self._log(args)
            control.should_log = True  # logging unsets it, and the trainer's own log is still to come

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._has_logged:
            self._log(args)
        self._durations += self._since_log
        if self.report is not None and self._durations:
            self.report = replace(self.report, step_seconds=statistics.median(self._durations))
        if self.report is not None and self.print_report and state.is_world_process_zero:
            print(self.report)

    def _watched_training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """`Trainer.training_step` with the last micro-batch's memory noted in `report`."""
        device = self.trainer.args.device
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)  # accelerate wraps it
        meter = step_meter(device)
        trace = StepTrace(self.trainer.model, inputs, optimizer, meter)  # type: ignore[arg-type]
        with meter, trace:
            loss = type(self.trainer).training_step(self.trainer, model, inputs, *args, **kwargs)
        self.report = trace.report("profile", device.type)
        # For the model card.
        self.trainer.accelerator.unwrap_model(model).memory_report = replace(self.report, timeline=())
        return loss

    def _log(self, args: TrainingArguments) -> None:
        metrics: dict[str, float] = {}
        if self._since_log:
            metrics["step_seconds"] = round(statistics.median(self._since_log), 4)
            self._durations += self._since_log
            self._since_log = []
        if self.report is not None:
            peak = self.report.peak_bytes
            if args.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(args.device)
                torch.cuda.reset_peak_memory_stats(args.device)
            metrics["peak_memory_mib"] = round(peak / MiB, 2)
            metrics["saved_activations_mib"] = round(self.report.saved_bytes / MiB, 2)
        if metrics:
            self._has_logged = True
            self.trainer.log(metrics)
