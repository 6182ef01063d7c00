"""The command line, `peft-s2a`: plan and measure the memory of fine-tuning, and show the environment."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape


EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOTHING_FITS = 3

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Fine-tune vision backbones with little memory: see what a training step costs before you run it.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no method fits the budget.",
)
errors = Console(stderr=True)


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class AutocastDType(str, Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"


class Sharding(str, Enum):
    none = "none"
    ddp = "ddp"
    fsdp2 = "fsdp2"
    zero2 = "zero2"
    zero3 = "zero3"


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A known name (vit-b, swin-b, resnet50, dinov2-g, ...), a model type of transformers (segformer), a "
        "folder with a config.json, or the id of a checkpoint on the Hub. Only the configuration is read."
    ),
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images in a batch.")]
ImageSizeOption = Annotated[
    int | None, typer.Option(min=1, help="Pixels of the square images; left out: the model's own.")
]
LabelsOption = Annotated[int | None, typer.Option(min=1, help="Number of classes; left out: the model's own.")]
DTypeOption = Annotated[DType, typer.Option(help="Of parameters and images.")]
AutocastOption = Annotated[AutocastDType | None, typer.Option(help="Forward pass under torch.autocast in this dtype.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print plain data, sizes in bytes, instead of tables.")]


@app.command(
    epilog="Examples: `peft-s2a plan vit-b --budget 8GiB` · `peft-s2a plan dinov2-g -b 64 -m lora -m s2a --autocast "
    "bfloat16` · `peft-s2a plan ./my-checkpoint --image-size 384 --plot plan.png --html plan.html` · `peft-s2a plan "
    "dinov2-g --processes 8 --sharding fsdp2`"
)
def plan(
    model: ModelArgument,
    batch_size: BatchSizeOption = 8,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Memory that a training step may take, such as 16GiB, 24GB or 800MiB: adds the largest batch."
        ),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="Compare only this method; may be given several times.")
    ] = None,
    image_size: ImageSizeOption = None,
    labels: LabelsOption = None,
    dtype: DTypeOption = DType.float32,
    autocast: AutocastOption = None,
    device: Annotated[
        Device, typer.Option(help="Whose kernels the step runs on; cuda needs a CUDA build of PyTorch.")
    ] = Device.cpu,
    processes: Annotated[
        int, typer.Option("--processes", "-n", min=1, help="Processes that train together, each on a batch.")
    ] = 1,
    sharding: Annotated[
        Sharding,
        typer.Option(
            help="Their engine: DistributedDataParallel (ddp, also for none), torch's fully_shard (fsdp2), DeepSpeed's "
            "ZeRO (zero2, zero3)."
        ),
    ] = Sharding.none,
    reduce_bucket_size: Annotated[
        int | None,
        typer.Option(min=1, help="DeepSpeed's setting of this name, in elements; left out: its 500,000,000."),
    ] = None,
    as_json: JsonOption = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the comparison to this file (.png, .svg, .pdf).")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write it as one page with pictures, to open in a browser.")
    ] = None,
) -> None:
    """Compare ways of fine-tuning MODEL: trainable parameters, memory kept for backward, peak, largest batch.

    Nothing is allocated and no weights are read: the training step runs on shapes alone. "saved" is what is kept for
    backward; "peak" is everything that is live at once, parameters and optimiser included; "of it the step" is what
    the step adds to those. With several processes all of it is that of one, and so are batch and budget.
    """
    budget_bytes = _parse_size(budget) if budget is not None else None
    from .memory.methods import METHODS

    methods = METHODS
    if method:
        if unknown := [name for name in method if name not in METHODS]:
            raise typer.BadParameter(
                f"unknown method {unknown[0]!r}; known: {', '.join(METHODS)}", param_hint="--method"
            )
        methods = {name: METHODS[name] for name in method}
    with _reported_errors():
        from .memory.models import find_model
        from .memory.plan import plan_memory

        result = plan_memory(
            find_model(model, image_size, labels),
            methods,
            batch_size=batch_size,
            budget=budget_bytes,
            image_size=image_size,
            dtype=_torch_dtype(dtype),
            autocast=_torch_dtype(autocast),
            device=device.value,
            processes=processes,
            sharding=sharding.value,
            reduce_bucket_size=reduce_bucket_size,
            track=_with_progress,
        )
        if plot is not None:
            result.plot(plot)
        if html is not None:
            from .memory.html import plan_page

            html.write_text(plan_page(result), encoding="utf-8")
    _print(result, as_json)
    if all(row.report is None for row in result.rows):
        _fail(f"{model}: supports none of the methods asked for")
    if budget_bytes is not None and not any(row.largest_batch_size for row in result.rows):
        raise typer.Exit(EXIT_NOTHING_FITS)


@app.command(
    epilog="Examples: `peft-s2a profile vit-b --method s2a -b 8` · `peft-s2a profile resnet50 -m full --device cuda "
    "--plot step.png`"
)
def profile(
    model: ModelArgument,
    method: Annotated[str, typer.Option("--method", "-m", help="How it is fine-tuned.")] = "s2a",
    batch_size: BatchSizeOption = 8,
    image_size: ImageSizeOption = None,
    labels: LabelsOption = None,
    dtype: DTypeOption = DType.float32,
    autocast: AutocastOption = None,
    device: Annotated[Device | None, typer.Option(help="Where to run; left out: cuda if there is one.")] = None,
    as_json: JsonOption = False,
    plot: Annotated[Path | None, typer.Option(help="Draw live memory over the step to this file.")] = None,
) -> None:
    """Run real training steps of MODEL (random weights and images) and show where their memory goes.

    The report splits the peak into parameters, optimiser state, gradients, kept activations and working set, says at
    which module it stands, and lists what is kept for backward by operator and by module.
    """
    from .memory.methods import METHODS

    if method not in METHODS:
        raise typer.BadParameter(f"unknown method {method!r}; known: {', '.join(METHODS)}", param_hint="--method")
    with _reported_errors(), errors.status("running training steps"):
        import torch

        from .memory import image_batch, profile_memory
        from .memory.models import find_model

        target = device.value if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
        if target == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: PyTorch sees no CUDA device; use --device cpu, or `peft-s2a plan`")
        found = find_model(model, image_size, labels)
        tuned = METHODS[method].apply(found.build(target, _torch_dtype(dtype)))
        batch = image_batch(tuned, batch_size, image_size)
        batch = {name: torch.zeros_like(tensor, device=target) for name, tensor in batch.items()}
        batch["pixel_values"].normal_()
        report = profile_memory(tuned, batch, loss_fn=found.loss_fn, autocast=_torch_dtype(autocast))
        if plot is not None:
            report.plot(plot)
    _print(report, as_json)


@app.command()
def env(as_json: JsonOption = False) -> None:
    """Show versions, devices and which implementations of the quantised operators can run here."""
    with _reported_errors():
        facts = environment()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    Console().print(table)


def environment() -> dict[str, Any]:
    """Versions, devices and backends, as plain data."""
    import platform

    import torch

    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("peft-s2a", "torch", "peft", "transformers", "accelerate", "triton", "timm", "matplotlib"):
        facts[package] = _version(package)
    facts["cpu threads"] = torch.get_num_threads()
    facts["cpu capability"] = torch.backends.cpu.get_cpu_capability()
    facts["onednn"] = torch.backends.mkldnn.is_available()
    facts["backends"] = _backends()
    facts["cuda devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return facts


def _backends() -> list[str]:
    """The backends of the quantised operators that can run here."""
    import importlib.util

    import torch

    from .activations.backends import compiled

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says what is missing
        found = ["reference"] + (["compiled"] if compiled.library() is not None else [])
    has_triton = importlib.util.find_spec("peft_s2a.activations.backends.triton") and importlib.util.find_spec(
        "triton"
    )
    return found + (["triton"] if has_triton and torch.cuda.is_available() else [])


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Entry point of the `peft-s2a` command."""
    # Warnings of libraries would only get between the reader and the tables.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore", FutureWarning)
    app()


class _reported_errors:
    """Ends the command with a message instead of a traceback where the input is at fault."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, (ValueError, ImportError, OSError)):
            _fail(str(error))


def _fail(message: str) -> NoReturn:
    errors.print("[red]error:[/red]", escape(message), highlight=False)
    raise typer.Exit(EXIT_FAILED)


def _print(result: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        console = Console()
        console = console if console.is_terminal else Console(width=140)
        console.print(result, highlight=False)


def _with_progress(methods: Iterable[Any]) -> Iterable[Any]:
    from rich.progress import Progress

    methods = list(methods)
    with Progress(console=errors, transient=True) as progress:
        task = progress.add_task("estimating", total=len(methods))
        for method in methods:
            progress.update(task, description=f"estimating {method.name}")
            yield method
            progress.advance(task)


def _parse_size(text: str) -> int:
    units = {"": 2**30, "b": 1, "mb": 10**6, "mib": 2**20, "gb": 10**9, "gib": 2**30, "tb": 10**12, "tib": 2**40}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    size = int(float(match[1]) * units.get(match[2].lower(), 0)) if match else 0
    if size <= 0:
        raise typer.BadParameter(
            f"{text!r} is no size; give a number and MiB, GiB, MB or GB (none: GiB), such as 16GiB",
            param_hint="--budget",
        )
    return size


def _torch_dtype(dtype: DType | AutocastDType | None) -> Any:
    import torch

    return getattr(torch, dtype.value) if dtype is not None else None


if __name__ == "__main__":
    main()
