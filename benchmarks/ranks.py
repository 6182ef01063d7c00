"""Memory of one of several processes: what `peft-s2a plan --processes` says, and what was live in two processes.

    python benchmarks/ranks.py                                # ViT-B/16 under DDP and FSDP2
    python benchmarks/ranks.py --engines zero2 zero3          # where DeepSpeed is installed; added to the result file

Two processes over gloo on the CPU train for some steps while `torch.profiler` watches the allocator from before the
model is made, so that the highest live bytes are those of everything: parameters, optimiser state,
batch, and what the engine holds. What gloo allocates by itself is not among them.

Writes `benchmarks/results/ranks.json`.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from environment import RESULTS, describe_environment, write_result
from torch import nn

from peft_s2a.memory import blocks_to_shard, estimate_memory, image_batch
from peft_s2a.memory.methods import METHODS
from peft_s2a.memory.models import find_model


RESULT = RESULTS / "ranks.json"
PROCESSES = 2
METHODS_SHOWN = ("full", "lora", "s2a")
BUCKET = 10_000_000  # DeepSpeed's default of 500,000,000 elements would hide all else
STEPS = 4
MARK = "training step"


def measure(model: str, method: str, engine: str, batch_size: int, bucket: int = BUCKET) -> dict[str, Any]:
    """The highest live bytes of a step in this process, one of a group, once there is optimiser state.

    The profiler misses it now and then when a buffer of FSDP2 is let go, so what a step adds is the least that any of
    several equal steps was seen to add.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.manual_seed(0)
    gc.collect()  # else the model before this one is let go while this one is watched
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        net = METHODS[method].apply(find_model(model).build("cpu"))
        batch = {name: torch.zeros_like(value, device="cpu") for name, value in image_batch(net, batch_size).items()}
        step, net, optimizer = under(engine, net, batch_size, bucket)
        for index in range(1 + STEPS):
            gc.collect()
            with record_function(f"{MARK} {index}"):
                step(batch)
    events = watched.profiler.kineto_results.events()
    spans = sorted((e.start_ns(), e.end_ns()) for e in events if e.name().startswith(MARK))
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    times, live = [time for time, _ in changes], list(itertools.accumulate(size for _, size in changes))
    before = [live[bisect_left(times, begin) - 1] for begin, _ in spans[1:]]
    most = [max(live[bisect_left(times, begin) : bisect_right(times, end)]) for begin, end in spans[1:]]
    between = before[0]
    if engine == "fsdp2":  # which holds nothing else between steps
        state = [value for values in optimizer.state.values() for value in values.values()]
        between = held([*net.parameters(), *net.buffers(), *state, *batch.values()])
    peak = between + min(peak - start for peak, start in zip(most, before, strict=True))
    return {"peak_bytes": peak, "parameter_bytes": held(net.parameters()) + held(net.buffers())}


COLLECTIVES = (
    "all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor", "all_reduce",
)  # fmt: skip


def keep_from_gloo() -> None:
    """Has collective operations work on copies that are numpy's: one of gloo's threads may be the last to let a tensor go,
    and the profiler would not see it."""

    def apart(stock: Any) -> Any:
        @functools.wraps(stock)
        def on_copies(*args: Any, **kwargs: Any) -> Any:
            pairs = []

            def copy(value: Any) -> Any:
                if not isinstance(value, torch.Tensor):
                    return value
                other = torch.from_numpy(np.empty(value.shape, np.float32 if value.is_floating_point() else np.int64))
                pairs.append((value, other))
                return other.copy_(value)

            work = stock(*map(copy, args), **{name: copy(value) for name, value in kwargs.items()})
            if work is not None:
                work.wait()
            for value, other in pairs:
                value.copy_(other)
            return work

        return on_copies

    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, torch.no_grad()(apart(getattr(dist, name))))


def held(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that tensors, or the shards of them in this process, take."""
    tensors = list(tensors)
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    local += [t.ds_tensor for t in tensors if hasattr(t, "ds_tensor")]  # ZeRO-3's part; small ones are whole besides
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in local)}
    return sum(storages.values())


def under(engine: str, net: nn.Module, batch_size: int, bucket: int) -> tuple[Any, nn.Module, Any]:
    """A training step of `net` under an engine, the model as the engine has it, and the optimiser."""
    if engine in ("zero2", "zero3"):
        return under_deepspeed(engine, net, batch_size, bucket)
    if engine == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(net, init_sync=False)  # all processes have made the same model
    else:
        from torch.distributed.fsdp import fully_shard

        for name in blocks_to_shard(net):
            fully_shard(net.get_submodule(name))
        wrapped = fully_shard(net)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])

    def step(batch: dict[str, torch.Tensor]) -> None:
        wrapped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, wrapped, optimizer


def under_deepspeed(engine: str, net: nn.Module, batch_size: int, bucket: int) -> tuple[Any, nn.Module, Any]:
    import deepspeed

    trained = [p for p in net.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": batch_size,
        # Its own linear layer would keep the input of every frozen layer, and hide the layer from what makes codes.
        "zero_optimization": {
            "stage": int(engine[-1]),
            "reduce_bucket_size": bucket,
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
    }
    wrapped, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(trained), config=config)

    def step(batch: dict[str, torch.Tensor]) -> None:
        wrapped.backward(wrapped(**batch).loss)
        wrapped.step()

    return step, net, wrapped.optimizer


def estimate(model: str, method: str, engine: str, batch_size: int, bucket: int = BUCKET) -> dict[str, Any]:
    """What is estimated for the same."""
    net = METHODS[method].apply(find_model(model).build("cpu"))
    setting = {"reduce_bucket_size": bucket} if engine in ("zero2", "zero3") else {}
    report = estimate_memory(net, batch_size, processes=PROCESSES, sharding=engine, **setting)
    parts = ("parameters", "batch", "optimizer", "gradients", "kept", "working", "engine")
    return {
        "peak_bytes": report.peak_bytes,
        "parameter_bytes": report.parameter_bytes,
        "phase": report.peak.phase,
        "parts": {part: getattr(report.peak, part) for part in parts},
    }


def compare(model: str, methods: Sequence[str], engines: Sequence[str], batch_size: int) -> list[dict[str, Any]]:
    """Measured in two processes, and estimated in this one: a row for each engine and method."""
    is_deepspeed = [engine.startswith("zero") for engine in engines]
    apart = [
        [engine] for engine, alone in zip(engines, is_deepspeed, strict=True) if alone
    ]  # it replaces parts of torch
    together = [engine for engine, alone in zip(engines, is_deepspeed, strict=True) if not alone]
    rows = [row for some in ([together] if together else []) + apart for row in run(model, methods, some, batch_size)]
    for row in rows:
        row["estimated"] = estimate(model, row["method"], row["engine"], batch_size)
    return rows


def run(model: str, methods: Sequence[str], engines: Sequence[str], batch_size: int) -> list[dict[str, Any]]:
    """What two processes are measured to hold."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        probe.close()
        settings = {"model": model, "methods": methods, "engines": engines, "batch_size": batch_size, "to": folder}
        workers = []
        for rank in range(PROCESSES):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
            workers.append(
                subprocess.Popen(
                    [sys.executable, __file__, "--worker", json.dumps(settings)],
                    env={**os.environ, **address, **place, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                )
            )  # fmt: skip
        output = [worker.communicate()[0] for worker in workers]
        if any(worker.returncode for worker in workers):
            raise RuntimeError("\n".join(text[-3000:] for text in output))
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    return [
        {**ours[0], "measured": max((one["measured"] for one in ours), key=lambda one: one["peak_bytes"])}
        for ours in zip(*found, strict=True)
    ]


def work(settings: dict[str, Any]) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    keep_from_gloo()
    if any(engine.startswith("zero") for engine in settings["engines"]):
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    rows = []
    for engine in settings["engines"]:
        for method in settings["methods"]:
            case = {"model": settings["model"], "method": method, "engine": engine}
            case["batch_size"] = settings["batch_size"]
            rows.append({**case, "processes": PROCESSES, "measured": measure(**case)})
    (Path(settings["to"]) / f"{dist.get_rank()}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="+", default=["vit-b"], metavar="MODEL", help="as for `peft-s2a plan`")
    parser.add_argument("--methods", nargs="+", default=list(METHODS_SHOWN), choices=METHODS)
    parser.add_argument("--engines", nargs="+", default=["ddp", "fsdp2"], choices=["ddp", "fsdp2", "zero2", "zero3"])
    parser.add_argument("--batch-size", type=int, default=4, help="images in each process")
    args = parser.parse_args()
    if args.worker is not None:
        work(args.worker)
        return
    rows = [row for model in args.models for row in compare(model, args.methods, args.engines, args.batch_size)]
    done = {(row["model"], row["method"], row["engine"]) for row in rows}
    if RESULT.is_file():
        earlier = json.loads(RESULT.read_text())["rows"]
        rows = [row for row in earlier if (row["model"], row["method"], row["engine"]) not in done] + rows
    for row in rows:
        measured, estimated = row["measured"]["peak_bytes"], row["estimated"]["peak_bytes"]
        print(f"{row['model']} {row['method']} {row['engine']}: {measured:,} {estimated:,} {estimated / measured:.3f}")
    settings = {"reduce_bucket_size": BUCKET}
    write_result(RESULT, {"environment": describe_environment(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
