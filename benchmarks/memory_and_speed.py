"""What a training step takes in memory and time: S2A, what a user could pick instead, and S2A without each of its
tricks.

    python benchmarks/memory_and_speed.py                          # ViT-B/16, Swin-T, ResNet-50, ConvNeXt-T at batch 8, fp32
    python benchmarks/memory_and_speed.py vit-b --rounds 3         # only one of them
    python benchmarks/memory_and_speed.py --preset bf16            # the four under bfloat16 autocast
    python benchmarks/memory_and_speed.py --preset wide            # four backbones, all of PEFT's methods, on a CPU
    python benchmarks/memory_and_speed.py --preset full            # eight backbones, all of PEFT's methods, on a GPU
    python benchmarks/memory_and_speed.py --preset full --resume   # what an earlier run of it left out
    python benchmarks/memory_and_speed.py --preset budget          # images a second within 0.25 to 8 GiB, on a CPU
    python benchmarks/memory_and_speed.py --preset compiled        # LoRA and S2A under torch.compile

Models have random weights from their configurations, 100 labels, 224 x 224 images. All methods of a backbone live in
one process and take their steps in turn, so that a machine that slows down hits all alike. What is measured, by
`peft_s2a.profile_memory`:

saved   bytes autograd keeps for backward (unique storages, parameters and buffers excluded), per image
peak    highest live bytes during a training step, above parameters, optimiser state and batch

and step, the median seconds of a training step with AdamW, with its smallest and largest value. Methods that a
backbone or PEFT does not support are listed with the reason. Growth with batch size, tokens and blocks is a line
fitted to a few points. For budgets see `budgets.py`. Of compiled methods, whose steps no operator of can be watched,
only the peak and the time are given; the first call, which compiles, is timed apart.

Writes `benchmarks/results/memory_and_speed-<preset>-<device>.json`, and beside it a plot (.png).
"""

from __future__ import annotations

import argparse
import collections
import functools
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import budgets
import numpy as np
import torch
import torch._functorch.config
from environment import describe_environment, result_file, write_result
from peft import (
    IA3Config,
    LNTuningConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    VeloraConfig,
    get_peft_model,
)
from peft.optimizers import create_lorafa_optimizer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._inductor.utils import fresh_cache
from tqdm.auto import tqdm

from peft_s2a import ActivationQuantizationConfig, S2AConfig, profile_memory
from peft_s2a.activations.quantizer import Quantizer
from peft_s2a.anatomy import find_task_heads
from peft_s2a.memory.methods import METHODS as PLANNED
from peft_s2a.memory.methods import checkpointed, lora, lora_targets
from peft_s2a.memory.models import find_model
from peft_s2a.memory.profile import allocator_peak


MiB = 2**20
NUM_LABELS = 100
Apply = Callable[[nn.Module], nn.Module]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
SKIPPING = (ValueError, TypeError, AttributeError, RuntimeError, MemoryError)  # out of memory is a RuntimeError


class WithoutTokenMean(ActivationQuantizationConfig):
    """Queries, keys and values are coded as they are, not minus their mean over tokens."""

    def quantizer(self, kind: str, module_name: str = "", channels: int | None = None) -> Quantizer:
        return replace(super().quantizer(kind, module_name, channels), center_attention=False)


def s2a(**settings: Any) -> Apply:
    return lambda model: get_peft_model(model, S2AConfig(**settings))


def s2a_with(quantization: ActivationQuantizationConfig | None) -> Apply:
    return s2a(activation_quantization=quantization)


def tuned(make_config: Callable[[nn.Module], PeftConfig]) -> Apply:
    """A method of PEFT, with the task head trained beside it."""

    def apply(model: nn.Module) -> nn.Module:
        config = make_config(model)
        config.modules_to_save = find_task_heads(model)
        return get_peft_model(model, config)

    return apply


def prompted(config_type: type[PromptLearningConfig]) -> Apply:
    """PEFT's prompt methods, eight tokens. It has none for vision yet: the attempt says why."""

    def apply(model: nn.Module) -> nn.Module:
        try:
            return get_peft_model(model, config_type(task_type="FEATURE_EXTRACTION", num_virtual_tokens=8))
        except (AttributeError, ValueError) as error:
            raise ValueError("PEFT's prompt and prefix tuning need a text model") from error

    return apply


def ia3(model: nn.Module) -> IA3Config:
    """Keys, values and what follows the MLPs' activation functions (Liu et al. 2022), or all convolutions."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    mlp = [name for name in names if name.endswith(("fc2", "mlp.down_proj", "output.dense", "pwconv2"))]
    attention = [name for name in names if name.endswith(("k_proj", "v_proj", "key", "value"))]
    convolutions = [] if attention or mlp else lora_targets(model)
    return IA3Config(target_modules=attention + mlp + convolutions, feedforward_modules=mlp)


def oft(model: nn.Module) -> OFTConfig:
    """On convolutions larger than 1 x 1 it does not start as the base model (PEFT 0.21 adds up overlapping patches),
    which leaves its memory and time what they are."""
    if model.config.model_type == "convnext":  # as of PEFT 0.21, and it fails with a message about shapes
        raise ValueError("PEFT's OFT takes the inputs of linear layers for images where they have four dimensions")
    return OFTConfig(oft_block_size=32, target_modules=lora_targets(model))


def ln_tuning(model: nn.Module) -> LNTuningConfig:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    if not names:
        raise ValueError("the model has no layer normalisation")
    return LNTuningConfig(target_modules=names)


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning.

    Attributes:
        optimizer: None: AdamW.
        micro_batch: Images that pass through the model at once, their gradients being added up; None: all of the batch.
        compiled: Whether `torch.compile` has been applied to the model.
    """

    apply: Apply
    optimizer: MakeOptimizer | None = None
    micro_batch: int | None = None
    compiled: bool = False


def compiled(apply: Apply, activation_memory_budget: float = 1.0) -> Method:
    """The same under `torch.compile`. Of what autograd would keep, a budget below 1 lets the compiler keep that part
    and recompute the rest (`torch._functorch.config.activation_memory_budget`)."""

    def apply_compiled(model: nn.Module) -> nn.Module:
        model = apply(model)
        plain_forward = model.forward

        def compiled_forward(*args: Any, **kwargs: Any) -> Any:
            return plain_forward(*args, **kwargs)

        # A code object of its own: else what was compiled for another model of this class, under another budget, is
        # taken.
        compiled_forward.__code__ = compiled_forward.__code__.replace(co_name=f"compiled_forward_{id(model)}")
        forward = torch.compile(compiled_forward)

        def call(*args: Any, **kwargs: Any) -> Any:
            with torch._functorch.config.patch(activation_memory_budget=activation_memory_budget):
                return forward(*args, **kwargs)

        model.forward = call
        return model

    return Method(apply_compiled, compiled=True)


def offloaded(apply: Apply) -> Apply:
    """With checkpointing, and what the blocks are recomputed from held in the host's memory."""

    def apply_offloaded(model: nn.Module) -> nn.Module:
        if next(model.parameters()).device.type != "cuda":
            raise ValueError("activations are offloaded from a GPU's memory to the host's: needs a CUDA device")
        return checkpointed(apply, offload=True)(model)

    return apply_offloaded


def lorafa_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Freezes the A matrices too, whose inputs are then not kept. It inverts A A^T, which kernels of convolutions do
    not have."""
    if any(parameter.dim() != 2 for name, parameter in model.named_parameters() if "lora_A" in name):
        raise ValueError("PEFT's optimiser for LoRA-FA does not support convolutions")
    return create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=1e-3)


BASELINES: dict[str, Method] = {
    "full fine-tuning": Method(PLANNED["full"].apply),
    "linear probe": Method(PLANNED["linear"].apply),
    "BitFit": Method(PLANNED["bias"].apply),
    "LoRA": Method(PLANNED["lora"].apply),
    "DoRA": Method(functools.partial(lora, use_dora=True)),
    "LoRA-FA": Method(lora, lorafa_optimizer),
    "VeLoRA": Method(functools.partial(lora, velora_config=VeloraConfig())),
    "IA3": Method(tuned(ia3)),
    "OFT": Method(tuned(oft)),
    "LN tuning": Method(tuned(ln_tuning)),
    "prompt tuning": Method(prompted(PromptTuningConfig)),
    "prefix tuning": Method(prompted(PrefixTuningConfig)),
}
CHECKPOINTED = {
    f"{name} + checkpointing": Method(checkpointed(method.apply), method.optimizer)
    for name, method in BASELINES.items()
    if name not in ("linear probe", "prompt tuning", "prefix tuning")
}
FRUGAL_LORA = {  # LoRA's other ways to save memory, between all and nothing
    "LoRA + checkpointing every 2nd block": Method(checkpointed(lora, 2)),
    "LoRA + checkpointing every 4th block": Method(checkpointed(lora, 4)),
    "LoRA, micro-batch 1": Method(lora, micro_batch=1),
}
STRUCTURES = {
    "S2A": Method(s2a()),
    "S2A + checkpointing": Method(checkpointed(s2a())),
    "S2A bias": Method(s2a(structures=("bias",))),
    "S2A prompt": Method(s2a(structures=("prompt",))),
    "S2A side": Method(s2a(structures=("side",))),
    "S2A ladder": Method(s2a(structures=("side",), side_mode="ladder")),
}
TRICKS = {
    "S2A, activations in full precision": Method(s2a_with(None)),
    "S2A, eager backend": Method(s2a_with(ActivationQuantizationConfig(backend="reference"))),
    "S2A, no tiles": Method(s2a_with(ActivationQuantizationConfig(mlp_tiles=1))),
    "S2A, no token mean": Method(s2a_with(WithoutTokenMean())),
}
OFFLOADED = {"LoRA + checkpointing, offloaded": Method(offloaded(lora))}
COMPILED = {
    "LoRA, compiled": compiled(lora),
    "LoRA, compiled, keeps half": compiled(lora, 0.5),
    "LoRA, compiled, keeps a fifth": compiled(lora, 0.2),
    "S2A, compiled": compiled(s2a()),
}
METHODS: dict[str, Method] = BASELINES | CHECKPOINTED | FRUGAL_LORA | STRUCTURES | TRICKS
EVERY = collections.ChainMap(METHODS, OFFLOADED, COMPILED)

FEW = ("full fine-tuning", "LoRA", "LoRA + checkpointing", "S2A")
RIVALS = ("full fine-tuning", "LoRA", "LoRA + checkpointing", *FRUGAL_LORA, "S2A")
MAIN = ("full fine-tuning", "BitFit", *RIVALS[1:], *TRICKS)
FRUGAL = ("LoRA", "LoRA + checkpointing", *FRUGAL_LORA, "S2A", "S2A + checkpointing")  # what fits a small memory
KINDS = ("vit-b", "swin-t", "resnet50", "convnext-t")  # one backbone of each
BACKBONES = ("vit-b", "vit-l", "dinov2-s", "dinov2-b", "swin-t", "swin-b", "resnet50", "convnext-t")


@dataclass(frozen=True)
class Case:
    """Methods that take their steps in turn.

    Attributes:
        layers: Number of transformer blocks, None for the model's own.
        autocast: Whether the forward pass runs under bfloat16 autocast.
        axis: Along which a line is to be fitted through this and other cases: "images", "tokens" or "blocks"; "budget":
            the batch is one that a budget gave.
    """

    backbone: str
    methods: tuple[str, ...]
    batch_size: int = 8
    image_size: int = 224
    layers: int | None = None
    autocast: bool = False
    axis: str | None = None


def growth(backbone: str, batch_sizes: tuple[int, ...], image_sizes: tuple[int, ...], depths: tuple[int, ...],
           batch_size: int, methods: tuple[str, ...] = FEW) -> Iterator[Case]:  # fmt: skip
    """Cases that differ in one thing at a time."""
    for size in batch_sizes:
        yield Case(backbone, methods, size, axis="images")
    for size in image_sizes:
        yield Case(backbone, methods, batch_size, image_size=size, axis="tokens")
    for layers in depths:
        yield Case(backbone, methods, batch_size, layers=layers, axis="blocks")


@dataclass(frozen=True)
class Preset:
    """Cases to measure.

    Attributes:
        rounds: Timed steps of each method.
        budgets: Bytes for which the largest micro-batch is sought, from cases of the axis "images".
        longest_step: Seconds of a step up to which that micro-batch is measured.
    """

    cases: tuple[Case, ...]
    rounds: int
    budgets: tuple[int, ...] = ()
    longest_step: float = 3.0


GROWTH_ON_CPUS = tuple(growth("vit-s", (2, 4, 8), (112, 160, 224), (4, 8, 12), 4))
PRESETS = {
    "main": Preset(tuple(Case(backbone, MAIN) for backbone in KINDS), 5),
    "bf16": Preset(
        tuple(Case(backbone, (*RIVALS, "S2A, no tiles"), autocast=True) for backbone in KINDS), 5
    ),
    "reduced": Preset(
        (
            *(Case(backbone, MAIN, 4) for backbone in ("dinov2-s", "swin-t", "resnet50")),
            *GROWTH_ON_CPUS,
        ),
        3,
    ),
    "wide": Preset(
        (
            *(Case(backbone, tuple(METHODS), 4) for backbone in ("dinov2-s", "swin-t", "resnet50", "convnext-t")),
            *GROWTH_ON_CPUS,
        ),
        3,
    ),
    "budget": Preset(
        tuple(Case(backbone, FRUGAL, size, axis="images") for backbone in KINDS for size in (1, 4)),
        2,
        tuple(int(size * 2**30) for size in (0.25, 0.5, 1, 2, 4, 8)),
    ),
    "compiled": Preset(
        tuple(Case(backbone, ("LoRA", *list(COMPILED)[:3], "S2A", *list(COMPILED)[3:])) for backbone in ("vit-b", "resnet50")),
        5,
    ),
    "full": Preset(
        (
            *(
                Case(backbone, (*METHODS, *OFFLOADED), batch_size, autocast=autocast)
                for backbone in BACKBONES
                for autocast in (False, True)
                for batch_size in (8, 64)
            ),
            *growth("vit-b", (8, 16, 32, 64), (224, 320, 448), (4, 8, 12, 16), 32, (*FEW, "S2A + checkpointing", "S2A ladder")),
        ),
        10,
    ),
}  # fmt: skip


def build(case: Case, device: str) -> nn.Module:
    found = find_model(case.backbone, case.image_size, NUM_LABELS)
    if case.layers is not None:
        if not hasattr(found.config, "num_hidden_layers"):
            raise ValueError(f"{case.backbone}: has no uniform blocks whose number could be changed")
        found.config.num_hidden_layers = case.layers
    return found.build(device)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])


class SharedParameters:
    """Storage of frozen parameters that the models of a case have in common: all of them are alive at once, and most
    of what each holds is equal."""

    def __init__(self) -> None:
        self._found: dict[tuple, list[torch.Tensor]] = collections.defaultdict(list)

    def share(self, model: nn.Module) -> None:
        """Each frozen parameter that equals one of an earlier model takes its storage. Within a model nothing is
        merged."""
        unused = {key: list(tensors) for key, tensors in self._found.items()}
        for parameter in model.parameters():
            if parameter.requires_grad:
                continue
            key = (parameter.shape, parameter.stride(), parameter.dtype, parameter.device)
            candidates = unused.get(key, [])
            index = next((i for i, tensor in enumerate(candidates) if torch.equal(tensor, parameter)), None)
            if index is None:
                self._found[key].append(parameter.detach())
            else:
                parameter.data = candidates.pop(index)


def loss_of(micro_batch: int | None) -> Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]:
    """The loss as a function of model and batch. With micro-batches all but the last one have gone through the backward
    pass already when it returns."""
    if micro_batch is None:
        return lambda model, batch: model(**batch).loss

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        count = len(batch["labels"])
        starts = range(0, count, micro_batch)
        done: float | torch.Tensor = 0.0
        for start in starts:
            part = {name: tensor[start : start + micro_batch] for name, tensor in batch.items()}
            share = model(**part).loss * (len(part["labels"]) / count)
            if start != starts[-1]:
                with torch.autocast(share.device.type, enabled=False):
                    share.backward()
                done = done + share.detach()
        return share + done

    return loss


def training_step(model: nn.Module, batch: dict[str, torch.Tensor], make_optimizer: MakeOptimizer, autocast: bool,
                  micro_batch: int | None = None) -> Callable[[], torch.Tensor]:  # fmt: skip
    """A step of training, whose loss is returned."""
    compute_loss = loss_of(micro_batch)
    optimizer = make_optimizer(model)
    device = batch["pixel_values"].device.type

    def step() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = compute_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def prepare(case: Case, method: Method, batch: dict[str, torch.Tensor], seed: int,
            shared: SharedParameters) -> tuple[Callable[[], torch.Tensor], dict[str, Any]]:  # fmt: skip
    """A training step, taken once, and what it takes in memory."""
    torch.manual_seed(seed)
    device = batch["pixel_values"].device
    model = method.apply(build(case, str(device))).to(device).train()
    shared.share(model)
    make_optimizer = method.optimizer or adamw
    if method.compiled:
        return prepare_compiled(model, case, batch, seed)
    report = profile_memory(
        model,
        batch,
        optimizer=lambda parameters: make_optimizer(model),
        loss_fn=loss_of(method.micro_batch),
        autocast=torch.bfloat16 if case.autocast else None,
    )
    step = training_step(model, batch, make_optimizer, case.autocast, method.micro_batch)
    torch.manual_seed(seed)  # equal drop paths, however many random numbers a method has taken for its weights
    return step, {
        "trainable": report.trainable_parameters,
        "parameters": report.total_parameters,
        "saved_bytes_per_image": report.saved_bytes / case.batch_size,
        "peak_bytes": report.step_peak_bytes,
        "total_bytes": report.peak_bytes,
        "first_loss": step().item(),
    }


def prepare_compiled(
    model: nn.Module, case: Case, batch: dict[str, torch.Tensor], seed: int
) -> tuple[Callable[[], torch.Tensor], dict[str, Any]]:
    """The same of a compiled model. Its operators run eagerly where they are watched, so they are not: the peak is the
    allocator's."""
    step = training_step(model, batch, adamw, case.autocast)
    torch.manual_seed(seed)
    with fresh_cache():  # or what earlier runs have compiled would be found again
        start = time.perf_counter()
        first_loss = step().item()
        first_seconds = time.perf_counter() - start
    step()
    return step, {
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_bytes": allocator_peak(step, batch["pixel_values"].device),
        "first_loss": first_loss,
        "first_step_seconds": first_seconds,
    }


def duration(step: Callable[[], torch.Tensor]) -> float:
    """Seconds that a step takes."""
    start = time.perf_counter()
    step().item()  # waits for the device
    return time.perf_counter() - start


def reason(error: Exception) -> str:
    """Why a method was skipped, in a line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def release_memory() -> None:
    """Gives back what a failed step held, which the cycles of its models and tracebacks would keep for a while."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(case: Case, rounds: int, seed: int, device: str) -> list[dict[str, Any]]:
    """One row a method: `case`, and either what was measured or why it was skipped."""
    generator = torch.Generator().manual_seed(seed)
    size = case.image_size
    batch = {
        "pixel_values": torch.randn(case.batch_size, 3, size, size, generator=generator).to(device),
        "labels": torch.randint(0, NUM_LABELS, (case.batch_size,), generator=generator).to(device),
    }
    circumstances = {name: value for name, value in asdict(case).items() if name != "methods"}
    measured: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], torch.Tensor]] = {}
    shared = SharedParameters()
    label = f"{case.backbone}, batch {case.batch_size}, {size} px"
    for name in tqdm(case.methods, desc=f"{label}: prepare"):
        try:
            steps[name], measured[name] = prepare(case, EVERY[name], batch, seed, shared)
        except SKIPPING as error:
            measured[name] = {"skipped": reason(error)}
        if name not in steps:  # only here, where no traceback is alive any more
            release_memory()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(rounds), desc=f"{label}: rounds"):
        for name in list(steps):
            try:
                seconds[name].append(duration(steps[name]))
            except SKIPPING as error:  # memory that sufficed for a while
                measured[name] = {"skipped": reason(error)}
                del steps[name]
            if name not in steps:
                release_memory()
    for name in steps:
        measured[name] |= {
            "step_seconds": statistics.median(seconds[name]),
            "all_step_seconds": seconds[name],
        }
    return [{**circumstances, "method": name, **values} for name, values in measured.items()]


AXES: dict[str, Callable[[dict[str, Any]], int]] = {
    "images": lambda row: row["batch_size"],
    "tokens": lambda row: (row["image_size"] // 16) ** 2 + 1,
    "blocks": lambda row: row["layers"],
}


def slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines through the rows that differ along one axis: bytes and seconds for each image, token (of every image) or
    block."""
    found = []
    for axis, position in AXES.items():
        along = [row for row in rows if row["axis"] == axis and "skipped" not in row]
        for backbone, method in dict.fromkeys((row["backbone"], row["method"]) for row in along):
            points = [row for row in along if (row["backbone"], row["method"]) == (backbone, method)]
            if len(points) < 2:
                continue
            x = [position(row) for row in points]
            row = {
                "backbone": backbone,
                "method": method,
                "axis": axis,
                "at": x,
                "batch_size": points[0]["batch_size"],
            }
            for quantity in ("peak_bytes", "step_seconds"):
                row[f"{quantity}_slope"], row[f"{quantity}_intercept"] = np.polyfit(
                    x, [p[quantity] for p in points], 1
                )
            found.append(row)
    return found


def lora_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """LoRA under the same circumstances."""
    return next(
        (other for other in rows if other["method"] == "LoRA" and "skipped" not in other and same_case(other, row)),
        None,
    )


def same_case(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row[field.name] == other[field.name] for field in fields(Case) if field.name != "methods")


def resumed(earlier: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run of the same settings and versions, on the same hardware, measured.

    Raises:
        ValueError: If anything of these is different.
    """
    for part in ("environment", "settings"):
        for name, now in result[part].items():
            if name != "date" and (before := earlier[part].get(name)) != now:
                raise ValueError(f"was measured with {name} {before!r}, this run would be with {now!r}; rename it")
    return {name: earlier[name] for name in ("rows", "slopes")}


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "backbone", "batch", "method", "saved MiB/image", "peak MiB", "step s (min-max)", "saved / LoRA", "peak / LoRA",
        "step / LoRA",
    )  # fmt: skip
    for row in rows:
        title = row["backbone"] + (f", {row['image_size']} px" if row["image_size"] != 224 else "")
        title += f", {row['layers']} blocks" if row["layers"] else ""
        batch = f"{row['batch_size']}{' bf16' if row['autocast'] else ''}"
        if "skipped" in row:
            table.add_row(title, batch, row["method"], f"[dim]{row['skipped'][:60]}[/dim]")
            continue
        base = lora_of(row, rows)
        names = ("saved_bytes_per_image", "peak_bytes", "step_seconds")
        ratios = [f"{row[name] / base[name]:.2f}" if base and name in row else "" for name in names]
        times = row["all_step_seconds"]
        table.add_row(
            title,
            batch,
            row["method"],
            f"{row['saved_bytes_per_image'] / MiB:.2f}" if "saved_bytes_per_image" in row else "",
            f"{row['peak_bytes'] / MiB:.0f}",
            f"{row['step_seconds']:.3f} ({min(times):.3f}-{max(times):.3f})",
            *ratios,
        )
    return table


def slopes_table(found: list[dict[str, Any]]) -> Table:
    table = Table("backbone", "method", "for each", "peak MiB", "step ms", "points", title="Growth")
    for row in found:
        table.add_row(
            row["backbone"],
            row["method"],
            {"images": "image", "tokens": f"token of {row['batch_size']} images", "blocks": "block"}[row["axis"]],
            f"{row['peak_bytes_slope'] / MiB:.3f}",
            f"{1e3 * row['step_seconds_slope']:.2f}",
            ", ".join(map(str, row["at"])),
        )
    return table


def budget_table(found: list[dict[str, Any]]) -> Table:
    sizes = [budgets.gib(fitted["budget_bytes"]) for fitted in found[0]["fits"]]
    table = Table("backbone", "method", "one image, MiB", *sizes, title="Images a second (micro-batch); ~: planned")
    for row in found:
        smallest = f"{row['smallest_bytes'] / MiB:,.0f}"
        table.add_row(row["backbone"], row["method"], smallest, *map(budgets.cell, row["fits"]))
    return table


def budget_cases(cases: list[Case], rows: list[dict[str, Any]], preset: Preset) -> list[Case]:
    """What the budgets ask to be measured, methods of a backbone with equal micro-batches together."""
    found: dict[tuple[str, int], list[str]] = collections.defaultdict(list)
    for backbone, method in dict.fromkeys((case.backbone, name) for case in cases for name in case.methods):
        mine = budgets.rows_of(rows, backbone, method)
        if EVERY[method].micro_batch is not None or not any(row["axis"] == "images" for row in mine):
            continue
        for size in budgets.to_measure(mine, preset.budgets, preset.longest_step):
            found[backbone, size].append(method)
    return [Case(backbone, tuple(methods), size, axis="budget") for (backbone, size), methods in found.items()]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """For each backbone, at its largest batch, in fp32 where there is any, bars of the peak and of the step time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {*MAIN, *STRUCTURES, *COMPILED}  # all methods of the full preset would not fit a page
    rows = [row for row in rows if row["axis"] is None and row["method"] in shown and "skipped" not in row]
    autocast = all(row["autocast"] for row in rows)
    rows = [row for row in rows if row["autocast"] == autocast]
    largest = {row["backbone"]: row["batch_size"] for row in sorted(rows, key=lambda row: row["batch_size"])}
    backbones = {
        key: [row for row in rows if (row["backbone"], row["batch_size"]) == key]
        for key in dict.fromkeys((row["backbone"], largest[row["backbone"]]) for row in rows)
    }
    if not backbones:
        return
    count = max(map(len, backbones.values()))
    figure = Figure(figsize=(10, len(backbones) * (0.9 + 0.24 * count)), layout="constrained")
    FigureCanvasAgg(figure)
    for (left, right), ((backbone, batch_size), found) in zip(
        figure.subplots(len(backbones), 2, squeeze=False, sharey="row"), backbones.items()
    ):
        names = [row["method"] for row in found][::-1]
        colors = ["#1b9e77" if name.startswith("S2A") else "#7570b3" for name in names]
        peaks = [row["peak_bytes"] / MiB for row in found][::-1]
        left.bar_label(left.barh(names, peaks, color=colors), [f" {peak:,.0f}" for peak in peaks], fontsize=8)
        left.set(title=f"{backbone}, batch {batch_size}", xlabel="peak of a step, MiB")
        times = [row["step_seconds"] for row in found][::-1]
        spread = [
            [time - min(row["all_step_seconds"]), max(row["all_step_seconds"]) - time]
            for row, time in zip(found[::-1], times)
        ]
        bars = right.barh(names, times, xerr=np.array(spread).T, color=colors, ecolor="#555555")
        right.bar_label(bars, [f" {time:.2f}" for time in times], fontsize=8)
        right.set(xlabel="step, s")
        for axes in (left, right):
            axes.margins(x=0.15)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "backbones", nargs="*", metavar="BACKBONE", help=f"only these of the preset: {', '.join(BACKBONES)}, ..."
    )
    parser.add_argument("--preset", default="main", choices=PRESETS)
    parser.add_argument("--methods", nargs="+", choices=list(EVERY), metavar="METHOD", help="instead of the preset's")
    parser.add_argument("--batch-size", type=int, help="instead of the preset's")
    parser.add_argument("--rounds", type=int, help="timed steps of each method, instead of the preset's")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast everywhere")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--resume", action="store_true", help="keep the cases that the JSON file has")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    cases = [case for case in preset.cases if not args.backbones or case.backbone in args.backbones]
    if unknown := set(args.backbones) - {case.backbone for case in preset.cases}:
        parser.error(f"backbones {sorted(unknown)} are not in preset {args.preset}")
    changes = {
        "methods": args.methods and tuple(args.methods),
        "batch_size": args.batch_size,
        "autocast": args.autocast,
    }
    cases = [replace(case, **{name: value for name, value in changes.items() if value}) for case in cases]
    rounds = args.rounds or preset.rounds
    path = args.out or result_file("memory_and_speed", args.preset, args.device)
    warnings.filterwarnings("ignore")
    result: dict[str, Any] = {
        "environment": describe_environment(args.device),
        "settings": {"preset": args.preset, "rounds": rounds, "seed": args.seed, "device": args.device},
        "rows": [],
        "slopes": [],
    }
    if args.resume and path.is_file():
        try:
            result |= resumed(json.loads(path.read_text()), result)
        except ValueError as error:
            parser.error(f"--resume: {path}: {error}")

    def measure_missing(cases: list[Case]) -> None:
        for case in cases:
            if {row["method"] for row in result["rows"] if same_case(row, asdict(case))} >= set(case.methods):
                continue
            result["rows"] += measure(case, rounds, args.seed, args.device)
            result["slopes"] = slopes(result["rows"])
            write_result(path, result)  # after every case, so that a cut loses little

    measure_missing(cases)
    console = Console(width=150)
    console.print(table_of(result["rows"]))
    if preset.budgets:
        while asked := budget_cases(cases, result["rows"], preset):
            measure_missing(asked)
        result["budgets"] = budgets.figures(result["rows"], preset.budgets, lambda name: EVERY[name].micro_batch)
        write_result(path, result)
        console.print(budget_table(result["budgets"]))
        budgets.plot(result["budgets"], path.with_suffix(".png"))
    elif result["slopes"]:
        console.print(slopes_table(result["slopes"]))
    plot(result["rows"], path.with_suffix(".png"))
    console.print("{device}, torch {torch}".format(**result["environment"]), f"written to {path}")


if __name__ == "__main__":
    main()
