"""Runs the examples as a user does: as scripts, in processes of their own, offline."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CLASSES = ("dark", "grey", "light")  # of the image folders in conftest.py


def run_script(*arguments: str | Path, launcher: tuple[str, ...] = (), columns: int = 200, quiet: bool = False) -> str:
    """Runs `python *arguments` in the repository, offline, and returns what it prints. `launcher` goes in between;
    `quiet`: warnings, of whatever library, are a failure."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": str(columns),
        "TERM": "dumb",
    }
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    finished = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert not quiet or "Warning" not in finished.stderr, finished.stderr
    return finished.stdout
