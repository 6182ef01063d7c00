"""The demo behind `make demo`: no download, a few minutes on two cores.

    python examples/demo.py

The small ViT in `examples/backbone` was pretrained on Fashion-MNIST. Here it learns scikit-learn's handwritten digits
(real scans of 8 x 8 pixels, UCI "Optical Recognition of Handwritten Digits") from 1,000 images with S2A, LoRA, a
linear probe and in full; the other 797 are for testing. One table and one picture compare accuracy and memory. Then the S2A adapter
is saved and loaded by `inference.py`, in a process of its own, which must classify test images just as the trained
model did.

Every method gets the same epochs, batches, schedule and optimizer (AdamW), and the learning rate below. To search them
on equal terms, `python examples/demo.py --search` tries five rates for each method, trained on 800 of the training
images and compared on the other 200, mean of the seeds. The test images are not used there.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from accelerate_loop import LoopArguments, evaluate, fine_tune
from finetuning import (
    METHODS,
    MethodArguments,
    ModelArguments,
    load_backbone,
    prepare_model,
    trainable_parameters,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peft import PeftModel
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, HfArgumentParser, PreTrainedModel, default_data_collator

from peft_s2a import MemoryReport, profile_memory, quantize_activations


EXAMPLES = Path(__file__).resolve().parent
BACKBONE = ModelArguments(model_name_or_path=str(EXAMPLES / "backbone"))
LABELS = [str(digit) for digit in range(10)]
LEARNING_RATES = {"linear": 1e-2, "lora": 2e-3, "s2a": 2e-3, "full": 1e-4}
SEARCH_FACTORS = (1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass
class Arguments:
    output_dir: str = field(default="outputs/demo", metadata={"help": "Where the adapter and test images are saved."})
    methods: list[str] = field(
        default_factory=lambda: list(LEARNING_RATES), metadata={"help": "Methods of finetuning.METHODS to compare."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run of each method for each."})
    num_train_epochs: int = 8
    batch_size: int = 50
    num_train: int = field(default=1000, metadata={"help": "Training images, of 1,797."})
    num_test: int | None = field(default=None, metadata={"help": "Test images, of the rest; None: all of them."})
    num_classified: int = field(default=100, metadata={"help": "Test images the reloaded adapter classifies."})
    search: bool = field(default=False, metadata={"help": "Search the learning rates instead."})


@dataclass
class Run:
    """One method trained with one seed: accuracy on the images held out, seconds of training, the trained model."""

    accuracy: float
    seconds: float
    model: PreTrainedModel | PeftModel


def digits() -> tuple[list[Image.Image], np.ndarray]:
    """The 1,797 images, 8 x 8 grey levels, and their labels 0-9."""
    bunch = load_digits()
    levels = (bunch.images * (255 / 16)).round().astype(np.uint8)  # scikit-learn's are 0-16
    return [Image.fromarray(image) for image in levels], bunch.target


def examples(images: list[Image.Image], labels: np.ndarray, indices: np.ndarray) -> list[dict]:
    """The chosen images, as the model takes them."""
    image_processor = AutoImageProcessor.from_pretrained(BACKBONE.model_name_or_path)
    pixel_values = image_processor([images[index] for index in indices], return_tensors="pt")["pixel_values"]
    return [
        {"pixel_values": pixels, "labels": int(labels[index])}
        for pixels, index in zip(pixel_values, indices, strict=True)
    ]


def compile_kernels() -> None:
    """What `peft_s2a` compiles when its operators first run on a machine, and keeps for all later processes: some seconds
    that are no method's training time."""
    quantize_activations(torch.nn.Sequential(torch.nn.GELU()))(torch.zeros(8, requires_grad=True)).sum().backward()


def run(method: str, learning_rate: float, seed: int, train: list[dict], held_out: list[dict], args: Arguments) -> Run:
    set_seed(seed)
    model, _ = load_backbone(BACKBONE, LABELS)
    model.classifier.reset_parameters()  # the ten classes of the checkpoint are not these
    model = prepare_model(model, MethodArguments(method=method))
    accelerator = Accelerator(cpu=True)
    loop = LoopArguments(
        num_train_epochs=args.num_train_epochs, batch_size=args.batch_size, learning_rate=learning_rate, seed=seed
    )
    batches = DataLoader(train, args.batch_size, shuffle=True, collate_fn=default_data_collator)
    start = time.perf_counter()
    for _ in fine_tune(accelerator, model, batches, loop):
        pass
    seconds = time.perf_counter() - start
    held_out_batches = accelerator.prepare(DataLoader(held_out, 200, collate_fn=default_data_collator))
    return Run(evaluate(accelerator, model, held_out_batches), seconds, model)


def search(train: list[dict], args: Arguments) -> Table:
    """Accuracy of each learning rate on a fifth of the training images."""
    part, held_out = train_test_split(
        train, test_size=0.2, random_state=1, stratify=[item["labels"] for item in train]
    )
    table = Table(
        "method", *(f"{factor:g} x" for factor in SEARCH_FACTORS), title="Accuracy on held-out training images"
    )
    with tqdm(total=len(args.methods) * len(SEARCH_FACTORS) * len(args.seeds), desc="search") as progress:
        for method in args.methods:
            cells = []
            for factor in SEARCH_FACTORS:
                learning_rate = factor * METHODS[method].learning_rate
                accuracies = []
                for seed in args.seeds:
                    accuracies.append(run(method, learning_rate, seed, part, held_out, args).accuracy)
                    progress.update()
                cells.append(f"{np.mean(accuracies):.2%} (lr {learning_rate:g})")
                progress.write(f"{METHODS[method].title}: {cells[-1]}")
            table.add_row(METHODS[method].title, *cells)
    return table


def compare(train: list[dict], test: list[dict], args: Arguments) -> tuple[Table, list[dict], dict[str, Run]]:
    """The table of the methods, its figures as plain data, and the first run of each."""
    runs: dict[str, list[Run]] = {method: [] for method in args.methods}
    with tqdm(total=len(args.methods) * len(args.seeds), leave=False) as progress:
        for seed in args.seeds:
            for method in args.methods:
                progress.set_description(f"{METHODS[method].title}, seed {seed}")
                learning_rate = LEARNING_RATES.get(method, METHODS[method].learning_rate)
                runs[method].append(run(method, learning_rate, seed, train, test, args))
                progress.update()
    table = Table(
        title=f"{len(train)} training images, {len(test)} test images, {args.num_train_epochs} epochs, "
        f"batches of {args.batch_size}, {len(args.seeds)} seeds",
        caption="Accuracy: mean and deviation over the seeds. Kept: activations for the backward pass. Peak: what a "
        "training step adds to parameters and optimizer state. Time: of the training.",
    )
    table.add_column("method", no_wrap=True)
    for heading in ("accuracy\n%", "trainable\nparameters", "kept\nKiB/image", "peak\nMiB", "time\ns"):
        table.add_column(heading, justify="right", no_wrap=True)
    batch = default_data_collator(train[: args.batch_size])
    rows, reports = [], {}
    for method, results in runs.items():
        memory = reports[METHODS[method].title] = profile_memory(results[0].model, batch)
        accuracies = 100 * np.array([result.accuracy for result in results])
        spread = f" ± {accuracies.std(ddof=1):.2f}" if len(results) > 1 else ""
        row = {
            "method": METHODS[method].title,
            "accuracy": f"{accuracies.mean():.2f}{spread}",
            "trainable": trainable_parameters(results[0].model),
            "saved_kib_per_image": round(memory.saved_bytes / args.batch_size / 2**10),
            "peak_mib": round(memory.step_peak_bytes / 2**20, 1),
            "seconds": round(float(np.mean([result.seconds for result in results])), 1),
        }
        rows.append(row)
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    draw(reports, Path(args.output_dir, "memory.png"))
    return table, rows, {method: results[0] for method, results in runs.items()}


def draw(reports: dict[str, MemoryReport], path: Path) -> None:
    """Live memory over a training step of each method: what its operators have in use beside parameters and optimizer."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = {"linear probe": "#bbbbbb", "LoRA": "#7570b3", "S2A": "#1b9e77", "full fine-tuning": "#555555"}
    for title, report in reports.items():
        live = [sum(sizes) / 2**20 for phase, *sizes in report.timeline if phase != "optimizer"]
        label = f"{title}: {report.step_peak_bytes / 2**20:.0f} MiB"
        axes.plot(np.linspace(0, 100, len(live)), live, label=label, color=colors.get(title))
    axes.set(
        xlabel="forward and backward pass, % of their operators", ylabel="live memory, MiB", xlim=(0, 100), ylim=0
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def reload_and_classify(model: PeftModel, images: list[Image.Image], test: list[dict], args: Arguments) -> str:
    """Save the adapter, classify `images` with it in a new process, and compare with what `model` says.

    Raises:
        RuntimeError: if the two differ.
    """
    adapter, folder = Path(args.output_dir, "adapter"), Path(args.output_dir, "digits")
    model.save_pretrained(adapter)
    model.config.save_pretrained(adapter)  # the labels
    AutoImageProcessor.from_pretrained(BACKBONE.model_name_or_path).save_pretrained(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{index:03d}.png" for index in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    command = [sys.executable, str(EXAMPLES / "inference.py"), "--adapter", str(adapter), "--json", "--images", *files]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    reloaded = [result["labels"][0] for result in json.loads(output)]

    model.eval()
    with torch.inference_mode():
        batch = default_data_collator(test[: len(images)])
        trained = [LABELS[index] for index in model(pixel_values=batch["pixel_values"]).logits.argmax(-1)]
    if reloaded != trained:
        raise RuntimeError(f"The reloaded adapter says {reloaded}, the trained model said {trained}.")
    right = sum(LABELS[item["labels"]] == label for item, label in zip(test, reloaded, strict=False))
    return (
        f"{adapter} ({(adapter / 'adapter_model.safetensors').stat().st_size / 2**10:.0f} KiB), loaded in a new "
        f"process, classifies {right} of {len(images)} test digits right, every one as the trained model did."
    )


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    unknown = set(args.methods) - set(METHODS)
    if unknown:
        raise SystemExit(f"--methods: unknown {', '.join(sorted(unknown))}; known are {', '.join(METHODS)}.")
    console = Console()
    compile_kernels()
    images, labels = digits()
    train_indices, test_indices = train_test_split(
        np.arange(len(images)), train_size=args.num_train, test_size=args.num_test, random_state=0, stratify=labels
    )
    train = examples(images, labels, train_indices)
    if args.search:
        console.print(search(train, args))
        return
    test = examples(images, labels, test_indices)
    table, rows, first_runs = compare(train, test, args)
    console.print(table)
    console.print(f"Memory over the step: {Path(args.output_dir, 'memory.png')}", soft_wrap=True)
    results = Path(args.output_dir, "results.json")
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps({"seeds": len(args.seeds), "rows": rows}, indent=1) + "\n")
    if "s2a" in first_runs:
        classified = [images[index] for index in test_indices[: args.num_classified]]
        console.print(reload_and_classify(first_runs["s2a"].model, classified, test, args))


if __name__ == "__main__":
    main()
