"""What a benchmark was run on, and where its result goes: files name their hardware, inside and in their names."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


RESULTS = Path(__file__).parent / "results"


def result_file(question: str, setting: str, device: str = "cpu") -> Path:
    """Where the answer to a question is kept: one file for each setting and each kind of hardware."""
    return RESULTS / f"{question}-{setting}-{slug(describe_environment(device)['device'])}.json"


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes ``result`` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def describe_environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, hardware and date, as plain JSON data."""
    packages = ("peft-s2a", "torch", "peft", "transformers", "accelerate")
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"{_cpu_name()}, {_cores()} cores",
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        **{package: _version(package) for package in packages},
    }


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
