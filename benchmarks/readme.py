"""Writes the results in README.md from the files in `benchmarks/results`, so that text and data cannot drift apart.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def demo(data: dict[str, Any]) -> str:
    """The table that `make demo` printed."""
    header = (
        "| method | test accuracy, % | trainable parameters | kept for backward, KiB/image | peak, MiB | training, s |"
    )
    rows = [
        f"| {row['method']} | {row['accuracy']} | {row['trainable']:,} | {row['saved_kib_per_image']:,} | "
        f"{row['peak_mib']} | {row['seconds']} |"
        for row in data["rows"]
    ]
    note = (
        f"`make demo`, mean and standard deviation over {data['seeds']} seeds, on {data['environment']['device']} "
        f"(torch {data['environment']['torch']}). {data.get('note', '')}".strip()
    )
    return "\n".join([header, "|---|---|---|---|---|---|", *rows, "", note])


def memory(data: dict[str, Any]) -> str:
    """S2A beside what a user could pick instead: ratios to LoRA of the same run."""
    header = "| backbone | method | kept for backward, MiB/image | peak, MiB | step / LoRA |"
    lora = {row["backbone"]: row for row in data["rows"] if row["method"] == "LoRA"}
    rows = [
        f"| {row['backbone']} | {row['method']} | {row['saved_bytes_per_image'] / 2**20:.1f} | "
        f"{row['peak_bytes'] / 2**20:.0f} | {row['step_seconds'] / lora[row['backbone']]['step_seconds']:.2f} |"
        for row in data["rows"]
        if "skipped" not in row
    ]
    settings = data["settings"]
    note = (
        f"`benchmarks/memory_and_speed.py`, batch {settings['batch_size']}, 224 x 224, fp32, random weights, on "
        f"{data['environment']['device']} (torch {data['environment']['torch']}). Peak: what a training step adds to "
        f"parameters, optimiser state and batch. {data.get('note', '')}".strip()
    )
    return "\n".join([header, "|---|---|---|---|---|", *rows, "", note])


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("demo.json", demo),
    "memory": ("memory_and_speed.json", memory),
}


def render(readme: str) -> str:
    """`readme` with every `<!-- results: NAME -->` section written anew; sections without a result file stay empty."""

    def section(match: re.Match) -> str:
        file, write = SECTIONS[match["name"]]
        path = RESULTS / file
        body = write(json.loads(path.read_text())) + "\n" if path.is_file() else ""
        return f"<!-- results: {match['name']} -->\n{body}<!-- /results -->"

    return re.sub(r"<!-- results: (?P<name>\w+) -->\n.*?<!-- /results -->", section, readme, flags=re.DOTALL)


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
