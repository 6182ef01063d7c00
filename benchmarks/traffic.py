"""What training on many processes sends over the network in a step, by engine and method. Calculated, not measured.

    python benchmarks/traffic.py                        # ViT-B/16 and DINOv2-g

Numbers of parameters come from the models as they would be trained, on the meta device: no weights are read, nothing runs.

Writes `benchmarks/results/traffic.json`.
"""

from __future__ import annotations

import argparse
import math
import warnings
from typing import Any

from environment import RESULTS, describe_environment, write_result
from torch import nn

from peft_s2a.memory import blocks_to_shard
from peft_s2a.memory.methods import METHODS
from peft_s2a.memory.models import find_model


RESULT = RESULTS / "traffic.json"
MODELS = ("vit-b", "dinov2-g")
METHODS_SHOWN = ("full", "lora", "s2a")
PROCESSES = (8, 64, 512, 4096)
BYTES = 4  # of a number: fp32

# What the times are calculated with, for want of a measurement: 25 GB/s is the line rate of a 200 Gbit/s adapter.
BYTES_PER_SECOND = 25e9
HOP_SECONDS = 5e-6


def all_reduce(size: float, processes: int) -> float:
    """Bytes that each process sends (and receives) so that all have the sum of tensors of `size` bytes: a reduce-scatter
    and an all-gather, which is the least possible (Patarasuk and Yuan 2009, J. Parallel Distrib. Comput. 69)."""
    return 2 * all_gather(size, processes)


def all_gather(size: float, processes: int) -> float:
    """The same so that all have all of a tensor of `size` bytes of which each has a part, or, the other way round, each
    has its part of the sum (reduce-scatter)."""
    return size * (processes - 1) / processes


def seconds(sent: float, rounds: int, messages: int = 1) -> float:
    """Time of collective operations that send `sent` bytes, in `messages` calls of `rounds` hops one after the other: the
    model of latency and bandwidth (Hockney 1994, Parallel Computing 20)."""
    return messages * rounds * HOP_SECONDS + sent / BYTES_PER_SECOND


def sizes(model: str, method: str) -> dict[str, int]:
    """Numbers of values: all, trained ones, and those of blocks, which FSDP2 gathers a second time in the backward pass."""
    net: nn.Module = METHODS[method].apply(find_model(model).build())
    blocks = [net.get_submodule(name) for name in blocks_to_shard(net)]
    in_blocks = sum(p.numel() for block in blocks for p in block.parameters())
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "trained": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "in_blocks": in_blocks,
        "blocks": len(blocks),
    }


def sent(engine: str, counts: dict[str, int], processes: int) -> float:
    """Bytes that each process sends in a step."""
    trained, parameters = BYTES * counts["trained"], BYTES * counts["parameters"]
    if engine in ("ddp", "zero2"):  # ZeRO-2: gradients are reduced to parts, updated parameters gathered from them
        return all_reduce(trained, processes)
    if engine == "fsdp2":
        gathered = parameters + BYTES * counts["in_blocks"]
        return all_gather(gathered + trained, processes)
    raise ValueError(f"engine: must be ddp, zero2 or fsdp2, got {engine!r}")


def buckets(counts: dict[str, int]) -> int:
    """How many calls DDP makes of it: a bucket of 1 MiB, which is the first to be full, and others of 25 MiB."""
    return 1 + math.ceil(max(BYTES * counts["trained"] - 2**20, 0) / (25 * 2**20))


def rows() -> list[dict[str, Any]]:
    found = []
    for model in MODELS:
        for method in METHODS_SHOWN:
            counts = sizes(model, method)
            for engine in ("ddp", "fsdp2"):
                calls = buckets(counts) if engine == "ddp" else 3 * counts["blocks"] + 2
                for processes in PROCESSES:
                    volume = sent(engine, counts, processes)
                    rounds = {"ring": processes - 1, "tree": math.ceil(math.log2(processes))}
                    passes = 2 if engine == "ddp" else 1  # an all-reduce goes there and back
                    found.append(
                        {
                            "model": model, "method": method, "engine": engine, "processes": processes, **counts,
                            "sent_bytes": volume,
                            **{f"{name}_seconds": seconds(volume, passes * hops, calls) for name, hops in rounds.items()},
                        }
                    )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    warnings.filterwarnings("ignore")
    settings = {"bytes_per_second": BYTES_PER_SECOND, "hop_seconds": HOP_SECONDS, "bytes": BYTES}
    write_result(RESULT, {"environment": describe_environment(), "settings": settings, "rows": rows()})
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
