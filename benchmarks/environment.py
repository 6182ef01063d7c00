"""What a benchmark was run on: every result file says it."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


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
