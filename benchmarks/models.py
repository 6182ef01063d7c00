"""Does `S2AConfig()` find its way into a model, for every architecture and task of `tests/zoo.py`?

    python benchmarks/models.py                       # all of them: about half an hour on one core
    python benchmarks/models.py "vit classification"  # some of them, the rest as recorded
    python benchmarks/models.py --render              # only writes docs/models.md from the recorded results

Each tiny model, with random weights, goes through the checks of `tests/placement_checks.py`: its output is the stock
model's at the start, a gradient reaches all that is declared trained, the loss falls within eight steps of Adam at a
learning rate of 5e-3 (within thirty where a wide head overshoots in the first, as it does when it is trained alone), and a
saved adapter gives an equal model. Then the bytes that a training step keeps are measured.

Writes `benchmarks/results/models.json` and `docs/models.md`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

from environment import RESULTS, describe_environment, write_result
from tqdm.auto import tqdm

from peft_s2a.memory.trace import StepTrace


ROOT = Path(__file__).parent.parent
RESULT = RESULTS / "models.json"
SIZES = RESULTS / "default_sizes.json"
DENSE = RESULTS / "dense_prediction.json"
PAGE = ROOT / "docs" / "models.md"
INTRODUCTION = """# Models and tasks

<!-- written by benchmarks/models.py -->

What `S2AConfig()` does on {count} tiny models with random weights, of every task that vision models are used for. On each it is
checked that the output is the stock model's at the start, bit for bit; that a gradient reaches everything that is declared trained;
that the loss falls within eight steps of Adam at a learning rate of 5e-3 (within thirty on MViTv2 and VOLO, whose wide heads overshoot
in the first step, alone and under LoRA too); and that a saved adapter gives an equal model when it is loaded. {passed} of {count} pass{failures}

Columns: on how many modules each structure sits; which modules are trained in full; and what share of the bytes kept for the backward
pass is still in full precision. The shares are those of tiny models; `peft-s2a profile` measures
yours. The tests under `make test-slow` hold the same checks.
"""


def task_of(name: str) -> str:
    from zoo import DIFFUSERS, TIMM

    if name in TIMM:
        return "classification, timm"
    if name in DIFFUSERS:
        return "diffusion"
    tasks = {
        "masks": "prompts and masks", "pretraining": "masked images", "masked images": "masked images",
        "features": "features", "backbone": "features",
    }  # fmt: skip
    known = ("classification", "segmentation", "detection", "depth", "pose", "super-resolution", "matting", "towers")
    ending = next((task for task in (*tasks, *known) if name.endswith(f" {task}")), None)
    return "vision and language" if ending is None else tasks.get(ending, ending)


def measure(name: str) -> dict[str, Any]:
    """What comes of one model: its placement and bytes, or where it failed."""
    import zoo
    from placement_checks import check

    from peft_s2a import S2AConfig

    row: dict[str, Any] = {"model": name, "task": task_of(name)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = check(name, S2AConfig(), Path(folder))
    except Exception as error:
        return {**row, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    config = model.peft_config["default"]
    row["targets"] = {structure: len(targets) for structure, targets in config.structure_targets.items()}
    row["heads"] = list(config.modules_to_save or ())
    row["dropped"] = config.dropped_targets or {}
    batch = zoo.batch(name)
    trace = StepTrace(model, batch, None, _OnlyRuns())
    with trace:
        zoo.loss(model, batch).backward()
    kept = trace.kept()[0].values()
    return {
        **row,
        "saved_bytes": sum(use.total for use in kept),
        "full_precision_bytes": sum(use.full_precision for use in kept),
    }


class _OnlyRuns:
    """A meter for what is kept alone, which needs no look into operators."""

    def call(self, trace: StepTrace, function: Any, args: tuple, kwargs: dict) -> Any:
        return function(*args, **kwargs)

    def peaks(self, trace: StepTrace) -> list[int]:
        return [0] * len(trace.moments)


def render(rows: list[dict[str, Any]], unrecorded: list[str]) -> str:
    failed = [row for row in rows if "failed" in row]
    failures = "; the others stand at the end with what failed, and are not to be relied on." if failed else "."
    text = INTRODUCTION.format(count=len(rows), passed=len(rows) - len(failed), failures=failures)
    if unrecorded:
        text += f"\nNot yet walked: {', '.join(unrecorded)}.\n"
    tasks = defaultdict(list)
    for row in rows:
        if "failed" not in row:
            tasks[row["task"]].append(row)
    for task, found in tasks.items():
        text += f"\n## {task.capitalize()}\n\n| model | bias | prompt | side | trained in full | in full precision |\n"
        text += "|---|---|---|---|---|---|\n"
        for row in found:
            counts = " | ".join(str(row["targets"].get(kind, 0) or "-") for kind in ("bias", "prompt", "side"))
            share = f"{row['full_precision_bytes'] / row['saved_bytes']:.0%}" if row.get("saved_bytes") else "-"
            heads = ", ".join(f"`{head}`" for head in row["heads"][:3]) + (", ..." if len(row["heads"]) > 3 else "")
            name = row["model"].removeprefix("timm ").removesuffix(f" {task}")
            text += f"| {name} | {counts} | {heads or '-'} | {share} |\n"
    if SIZES.exists():
        text += render_sizes(json.loads(SIZES.read_text()))
    if DENSE.exists():
        text += render_dense(json.loads(DENSE.read_text()))
    if failed:
        text += "\n## What fails\n\n| model | what |\n|---|---|\n"
        text += "".join(f"| {row['model']} | {row['failed'].replace('|', '/')} |\n" for row in failed)
    return text


def render_sizes(result: dict[str, Any]) -> str:
    """The section on classifiers at their default sizes, from the result of `benchmarks/default_sizes.py`."""
    rows = sorted((row for row in result["rows"] if "failed" not in row), key=lambda row: -row["s2a"] / row["full"])
    failed = {row["model"]: row["failed"] for row in result["rows"] if "failed" in row}
    text = f"""
## Image classifiers at their default sizes

What a training step keeps for the backward pass, in MiB for each image, in batches of {result["batch_size"]}, float32: estimated from
shapes (`benchmarks/default_sizes.py`), for {len(rows)} of transformers' image classifiers, the largest share first.

| model | full fine-tuning | S2A | S2A / full | in full precision |
|---|---|---|---|---|
"""
    for row in rows:
        share = row["full_precision"] / row["s2a"]
        sizes = f"{row['full'] / 2**20:.1f} | {row['s2a'] / 2**20:.1f} | {row['s2a'] / row['full']:.1%} | {share:.0%}"
        text += f"| {row['model']} | {sizes} |\n"
    if failed:
        text += "\nWithout a figure:\n\n"
        text += "".join(f"* {name}: {reason.replace('|', '/')}\n" for name, reason in failed.items())
    if missing := [name for name in result["known"] if name not in {row["model"] for row in result["rows"]}]:
        text += f"\nNot yet measured: {', '.join(missing)}.\n"
    return text


def render_dense(result: dict[str, Any]) -> str:
    """The section on dense prediction, from the result of `benchmarks/dense_prediction.py`."""
    text = f"""
## Dense prediction at default sizes

Heads are trained in full, and what their layers read is kept in full precision unless
`ActivationQuantizationConfig(compress_linear_inputs=True)` codes that too: where they predict a value for every pixel that may be most
of what is left. MiB for each image, in batches of {result["batch_size"]}, float32, estimated from shapes (`benchmarks/dense_prediction.py`).

| model | pixels | full fine-tuning | S2A | S2A, inputs coded |
|---|---|---|---|---|
"""
    for row in result["rows"]:
        sizes = " | ".join(f"{row[method] / 2**20:.1f}" for method in ("full", "s2a", "s2a_coded_inputs"))
        text += f"| {row['model']} | {row['image_size']} | {sizes} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names of tests/zoo.py; none: all")
    parser.add_argument("--render", action="store_true", help="write the page from recorded results alone")
    args = parser.parse_args()
    # Before zoo, which builds timm's models: the tests' conftest makes timm importable.
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest  # noqa: F401
    import zoo

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = {row["model"]: row for row in json.loads(RESULT.read_text())["rows"]} if RESULT.exists() else {}
    if unknown := set(args.models) - zoo.ZOO.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are the names in tests/zoo.py")
    for name in [] if args.render else tqdm(args.models or list(zoo.ZOO)):
        rows[name] = measure(name)
        ordered = [rows[known] for known in zoo.ZOO if known in rows]
        write_result(RESULT, {"environment": describe_environment(), "rows": ordered})
    recorded = [rows[known] for known in zoo.ZOO if known in rows]
    PAGE.write_text(render(recorded, [known for known in zoo.ZOO if known not in rows]))


if __name__ == "__main__":
    main()
