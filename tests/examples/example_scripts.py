"""Runs the examples as a user does: as scripts, in processes of their own, offline."""

import os
import subprocess
import sys
from pathlib import Path

from forked import ROOT, ranks, run_scripts


EXAMPLES = ROOT / "examples"
CLASSES = ("dark", "grey", "light")  # of the image folders in conftest.py


def run_script(
    *arguments: str | Path, launcher: tuple[str, ...] = (), processes: int = 1, columns: int = 200, quiet: bool = False
) -> str:
    """Runs `python *arguments` in the repository, offline, and returns what it prints. `launcher` goes in between;
    `processes`: as many that train together, without a launcher; `quiet`: warnings, of whatever library, are a failure,
    those of its import as well."""
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": str(columns), "TERM": "dumb"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if launcher or quiet:
        command = [sys.executable, *launcher, *map(str, arguments)]
        finished = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    else:
        each = ranks(processes) if processes > 1 else [{}]
        finished, *others = run_scripts(*[arguments] * processes, environments=[environment | own for own in each])
        assert not any(other.returncode for other in others), others
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert not quiet or "Warning" not in finished.stderr, finished.stderr
    return finished.stdout
