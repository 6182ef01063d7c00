"""How fast the quantised operators are, beside the stock ones and beside what memory bandwidth allows.

    python benchmarks/kernel_speed.py                              # every operator, every backend found
    python benchmarks/kernel_speed.py gelu layer_norm --rounds 50

Operators work on tensors as in ViT-B/16 and ResNet-50 at the given batch size. Forward and backward pass are timed
apart, stock and quantised versions and a plain copy in turn; figures are medians over rounds. The limit is the time in
which a copy at the measured speed would move the bytes that a pass cannot do without: its inputs, its results, and the
codes it writes or reads. Attention is bound by arithmetic rather than by bandwidth, and given for comparison.

Writes `benchmarks/results/kernels-<setting>-<device>.json`, and beside it a plot (.png).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import describe_environment, result_file, write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from peft_s2a.activations import operators
from peft_s2a.activations.quantizer import Quantizer


Function = Callable[..., Tensor]
TOKENS, WIDTH, HEADS = 197, 768, 12  # of ViT-B/16 at 224 x 224


@dataclass(frozen=True)
class Operator:
    """An operator on ``inputs`` tensors of one shape: the stock one, and that which keeps codes (of ``quantizer``)."""

    shape: Callable[[int], tuple[int, ...]]
    stock: Function
    ours: Function
    inputs: int = 1


def tokens(width: int) -> Callable[[int], tuple[int, ...]]:
    return lambda batch: (batch, TOKENS, width)


def maps(channels: int, size: int) -> Callable[[int], tuple[int, ...]]:
    return lambda batch: (batch, channels, size, size)


def activation(name: str) -> Function:
    return functools.partial(operators.activation, name=name)


def heads(batch: int) -> tuple[int, ...]:
    return (batch, HEADS, TOKENS, WIDTH // HEADS)


def live_batch_norm(x: Tensor, **quantizer: Quantizer) -> Tensor:
    function = operators.batch_norm if quantizer else F.batch_norm
    return function(x, None, None, training=True, **quantizer)


OPERATORS: dict[str, Operator] = {
    "gelu": Operator(tokens(4 * WIDTH), F.gelu, activation("gelu")),
    "silu": Operator(tokens(4 * WIDTH), F.silu, activation("silu")),
    "relu": Operator(maps(256, 56), F.relu, activation("relu")),
    "layer_norm": Operator(
        tokens(WIDTH), lambda x: F.layer_norm(x, (WIDTH,)), lambda x, **q: operators.layer_norm(x, (WIDTH,), **q)
    ),
    "rms_norm": Operator(
        tokens(WIDTH), lambda x: F.rms_norm(x, (WIDTH,)), lambda x, **q: operators.rms_norm(x, (WIDTH,), **q)
    ),
    "group_norm": Operator(
        maps(256, 28), lambda x: F.group_norm(x, 32), lambda x, **q: operators.group_norm(x, 32, **q)
    ),
    "batch_norm": Operator(maps(256, 28), live_batch_norm, live_batch_norm),
    "attention": Operator(heads, F.scaled_dot_product_attention, operators.scaled_dot_product_attention, 3),
    "softmax": Operator(
        lambda batch: (batch, HEADS, TOKENS, TOKENS),
        lambda x: x.softmax(-1),
        lambda x, **q: operators.softmax(x, -1, **q),
    ),
    "gated_silu": Operator(
        tokens(4 * WIDTH),
        lambda gate, up: F.silu(gate) * up,
        lambda gate, up, **q: operators.gated_activation(gate, up, "silu", **q),
        2,
    ),
    "max_pool2d": Operator(
        maps(64, 112), lambda x: F.max_pool2d(x, 3, 2, 1), lambda x, **q: operators.max_pool2d(x, 3, 2, 1, **q)
    ),
    "dropout": Operator(tokens(WIDTH), lambda x: F.dropout(x, 0.1), lambda x, quantizer: operators.dropout(x, 0.1)),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    batch_size: int
    rounds: int
    dtype: str


SETTINGS = {
    "full": Setting(64, 50, "bfloat16"),
    "medium": Setting(8, 30, "float32"),
    "reduced": Setting(4, 10, "float32"),
}


def backends(device: str) -> list[str]:
    """The backends that have kernels for the device, the reference first."""
    from peft_s2a.cli import environment

    found = environment()["backends"]
    return [name for name in found if name == "reference" or (name == "triton") == (device != "cpu")]


def kept_bytes(output: Callable[[], Tensor], exclude: tuple[Tensor, ...]) -> int:
    """Bytes of the storages that ``output`` keeps for backward, inputs included unless in ``exclude``."""
    own = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = output()
    del result
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def medians(functions: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Seconds of each function, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 2):  # two to warm up
        for name, function in functions.items():
            if device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = function()
            if device != "cpu":
                torch.cuda.synchronize()
            if round_ > 1:
                times[name].append(time.perf_counter() - start)
            del result
    return {name: statistics.median(values) for name, values in times.items()}


def measure(name: str, bits: int, setting: Setting, device: str, seed: int) -> list[dict[str, Any]]:
    """A row for the stock operator and one for each backend."""
    operator = OPERATORS[name]
    dtype = getattr(torch, setting.dtype)
    torch.manual_seed(seed)
    inputs = tuple(
        torch.randn(operator.shape(setting.batch_size), device=device, dtype=dtype).requires_grad_()
        for _ in range(operator.inputs)
    )
    versions: dict[str, Callable[[], Tensor]] = {"stock": lambda: operator.stock(*inputs)}
    for backend in backends(device):
        quantizer = Quantizer(bits=bits, backend=backend)
        versions[backend] = functools.partial(operator.ours, *inputs, quantizer=quantizer)
    outputs = {version: run() for version, run in versions.items()}
    grad = torch.randn_like(outputs["stock"])
    size_in, size_out = sum(x.nbytes for x in inputs), grad.nbytes
    source = inputs[0].detach()
    target = torch.empty_like(source)
    functions: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    for version, run in versions.items():
        functions[f"{version} forward"] = run
        functions[f"{version} backward"] = functools.partial(
            torch.autograd.grad, outputs[version], inputs, grad, retain_graph=True
        )
    seconds = medians(functions, setting.rounds, device)
    bandwidth = 2 * source.nbytes / seconds["copy"]
    rows = []
    for version, run in versions.items():
        kept = kept_bytes(run, ())
        # what the stock operators keep are their inputs and results, which are counted already
        written = kept if version != "stock" else 0
        rows.append(
            {
                "operator": name,
                "version": version,
                "shape": list(inputs[0].shape),
                "kept_bytes": kept,
                "forward_seconds": seconds[f"{version} forward"],
                "backward_seconds": seconds[f"{version} backward"],
                "forward_limit_seconds": (size_in + size_out + written) / bandwidth,
                "backward_limit_seconds": (size_out + size_in + kept) / bandwidth,
                "bandwidth_bytes_per_second": bandwidth,
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table("operator", "version", "kept MiB", "forward ms", "limit", "backward ms", "limit", "both / stock")
    stock = {row["operator"]: row for row in rows if row["version"] == "stock"}

    def both(row: dict[str, Any]) -> float:
        return row["forward_seconds"] + row["backward_seconds"]

    for row in rows:
        times = [
            f"{1e3 * row[f'{phase}_{kind}']:.2f}"
            for phase in ("forward", "backward")
            for kind in ("seconds", "limit_seconds")
        ]
        ratio = f"{both(row) / both(stock[row['operator']]):.2f}"
        table.add_row(row["operator"], row["version"], f"{row['kept_bytes'] / 2**20:.2f}", *times, ratio)
    return table


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Forward and backward time of the fastest quantised version as multiples of the stock operator's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["operator"] for row in rows))[::-1]
    found = {(row["operator"], row["version"]): row for row in rows}
    fused = [version for version in dict.fromkeys(row["version"] for row in rows) if version != "stock"][-1]
    figure = Figure(figsize=(8, 1.5 + 0.45 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for offset, version, color in ((0.2, "stock", "#7570b3"), (-0.2, fused, "#1b9e77")):
        picked = [found[name, version] for name in names]
        places = [index + offset for index in range(len(names))]
        forward = [1e3 * row["forward_seconds"] for row in picked]
        backward = [1e3 * row["backward_seconds"] for row in picked]
        limits = [1e3 * (row["forward_limit_seconds"] + row["backward_limit_seconds"]) for row in picked]
        axes.barh(places, forward, 0.38, color=color, label=f"{version}, forward")
        axes.barh(places, backward, 0.38, forward, color=color, alpha=0.5, label=f"{version}, backward")
        axes.plot(
            limits, places, "|", color="black", markersize=10, label="bandwidth limit" if version == fused else None
        )
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=", ".join(OPERATORS))
    parser.add_argument("--setting", choices=SETTINGS, help="full on a GPU, medium elsewhere")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, help="instead of the setting's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if unknown := set(args.operators) - set(OPERATORS):
        parser.error(f"unknown operators {sorted(unknown)}; known: {sorted(OPERATORS)}")
    name = args.setting or ("medium" if args.device == "cpu" else "full")
    setting = SETTINGS[name]
    setting = Setting(setting.batch_size, args.rounds or setting.rounds, setting.dtype)
    warnings.filterwarnings("ignore")
    rows = []
    for operator in tqdm(args.operators or OPERATORS, unit="operator"):
        rows += measure(operator, args.bits, setting, args.device, args.seed)
    path = args.out or result_file("kernels", name, args.device)
    settings = {"setting": name, **vars(setting), "bits": args.bits, "seed": args.seed}
    write_result(path, {"environment": describe_environment(args.device), "settings": settings, "rows": rows})
    console = Console(width=120)
    console.print(table_of(rows))
    plot(rows, path.with_suffix(".png"))
    console.print(f"{describe_environment(args.device)['device']}, written to {path}")


if __name__ == "__main__":
    main()
