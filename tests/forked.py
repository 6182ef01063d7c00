"""Runs scripts in new processes that have the libraries already.

A new interpreter imports torch, transformers and PEFT for nine seconds. These processes are forked from one that has
imported them and has run nothing else.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock


ROOT = Path(__file__).resolve().parents[1]
TORCHVISION = str(Path(sys.prefix) / "timm")  # the tests' own, see conftest.py: transformers would use it

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["peft_s2a", "transformers.trainer", "accelerate", "datasets", "evaluate"])


def run_scripts(
    *commands: Sequence[str | Path], environments: Sequence[dict[str, str]] = ({},), timeout: float = 500
) -> list[CompletedProcess]:
    """Run scripts with their arguments at once, in the folder of the repository, and wait for all of them.

    Args:
        environments: one for every command, on top of the environment of the tests. Variables that libraries read while
            they are imported have no effect.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[Path(folder, f"{number}.{name}") for name in ("out", "err")] for number in range(len(commands))]
        processes = [
            _context.Process(target=_run, args=(list(map(str, command)), os.environ | environment, *files))
            for command, environment, files in zip(commands, environments, outputs, strict=True)
        ]
        with mock.patch.object(sys, "path", [path for path in sys.path if path != TORCHVISION]):
            for process in processes:
                process.start()
        for process in processes:
            process.join(timeout)
            process.kill()
            process.join()
        return [
            CompletedProcess(command, process.exitcode, *(file.read_text() if file.exists() else "" for file in files))
            for command, process, files in zip(commands, processes, outputs)
        ]


def run_code(code: str, *arguments: str, **environment: str) -> None:
    """Run a script that is written out, which has to succeed."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(textwrap.dedent(code))
        (process,) = run_scripts([script, *arguments], environments=[environment])
    assert process.returncode == 0, process.stderr


def ranks(count: int = 2) -> list[dict[str, str]]:
    """The environments of processes that train together, as `torchrun` gives them."""
    with socket.create_server(("localhost", 0)) as free:
        common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _run(command: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = command
    sys.path[:0] = [str(Path(command[0]).parent), str(ROOT)]
    runpy.run_path(command[0], run_name="__main__")
