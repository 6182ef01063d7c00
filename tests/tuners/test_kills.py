"""Runs of Trainer and of Accelerate that are killed (SIGKILL) end, resumed, with the undisturbed run's adapter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 10])
def test_killed_runs_end_alike(kills, tmp_path):
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_runs.py")), str(kills), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-3000:]
    for kind in ("trainer", "accelerate"):
        killed, resumed = map(int, re.search(rf"{kind}: (\d+) kills, (\d+) resumed", run.stdout).groups())
        assert killed == kills and resumed > 0
    print(run.stdout)
