"""The ops on CPUs in fused C++ kernels (`cpu/`), compiled once with the machine's compiler and kept in a cache.

They register themselves with torch's dispatcher through LibTorch's stable ABI. There is a library for every instruction
set; which one is built and loaded goes by what the processor reports, or by PEFT_S2A_CPU_CAPABILITY (AVX512, AVX2 or
DEFAULT) where that asks for less. Without a compiler the reference runs instead, after one warning.

The cache is a folder of the user's own. A build lies there in a folder named by a hash of all that it depends on, with
the hash of the library, which is checked before it is loaded: a broken one is built again. Where there is no such
folder, a temporary one serves this process alone.
"""

import atexit
import functools
import hashlib
import logging
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch


logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).with_name("cpu")
_TORCH = Path(torch.__file__).parent
_TIME_LIMIT = 600  # seconds for one run of the compiler
# Sums may be reordered, so that loops over them vectorise; unlike -ffast-math, this leaves the process's handling of
# denormal numbers and of NaN alone.
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-w", "-fno-math-errno", "-fno-trapping-math")
_FLAGS += ("-fno-signed-zeros", "-fassociative-math", f"-I{_TORCH / 'include'}")
_LINKING = (f"-L{_TORCH / 'lib'}", "-ltorch_cpu")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
# by what torch calls them, the plainest first
CAPABILITIES = {
    "DEFAULT": (),
    "AVX2": _AVX2,
    "AVX512": (*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq"))),
}


class CompilationError(RuntimeError):
    """The kernels could not be compiled."""


def capability() -> str:
    """The instruction set of the kernels on this machine, a key of `CAPABILITIES`."""
    names = list(CAPABILITIES)
    found = torch.backends.cpu.get_cpu_capability()
    found = found if found in names else "DEFAULT"
    asked = os.environ.get("PEFT_S2A_CPU_CAPABILITY", found).upper()
    if asked not in names:
        raise ValueError(f"PEFT_S2A_CPU_CAPABILITY must be one of {names}, not {asked!r}")
    return min(asked, found, key=names.index)


@functools.cache
def library() -> Path | None:
    """The kernels' library, loaded; None, after one warning, where it cannot be had."""
    try:
        path = _build()
        torch.ops.load_library(path)
    except (CompilationError, OSError) as error:
        warnings.warn(
            f"The fused CPU kernels are not available ({error}); quantised activations fall back to the slow "
            "reference backend. Install a C++ compiler (g++ or clang++, or name one in CXX), or pass "
            'backend="reference" to silence this.',
            stacklevel=2,
        )
        return None
    return path


def _build() -> Path:
    """Path of the shared library, compiled if the cache does not have it."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        raise CompilationError("no C++ compiler found")
    flags = (*_FLAGS, *CAPABILITIES[capability()])
    sources = [path.read_text() for path in sorted(_SOURCES.glob("*.[ch]*"))]
    build = [compiler, _output_of(compiler, "--version"), *flags, *_LINKING, platform.machine(), torch.__version__]
    name = hashlib.sha256("\0".join([*sources, *build]).encode()).hexdigest()[:32]
    try:
        folder = _own_folder()
    except OSError as error:
        logger.warning("The fused CPU kernels are compiled for this process alone: %s.", error)
        return _compiled(compiler, flags, _temporary_folder() / name)
    if _is_whole(folder / name):
        return folder / name / "kernels.so"
    try:
        return _compiled(compiler, flags, folder / name)
    except OSError as error:  # a full disk, or one that may not be written
        logger.warning("The fused CPU kernels are compiled for this process alone: %s.", error)
        return _compiled(compiler, flags, _temporary_folder() / name)


def _own_folder() -> Path:
    """The cache, made if need be; OSError where it is not a folder that this user, and nobody else, can write to."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(root) if root else Path.home() / ".cache") / "peft_s2a"
    except RuntimeError as error:
        raise OSError(str(error)) from error
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise OSError(f"{folder} is not a folder of this user")
    if status.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


@functools.cache
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="peft_s2a-")  # 0700, under a name that cannot be foreseen
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _is_whole(build: Path) -> bool:
    """Whether a build is there, this user's, and as it was written."""
    library, digest = build / "kernels.so", build / "sha256"
    try:
        if any(path.lstat().st_uid != os.geteuid() for path in (build, library, digest)):
            return False
        return digest.read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def _compiled(compiler: str, flags: tuple[str, ...], build: Path) -> Path:
    """Compile the kernels as ``build``, whole or not at all, whoever else does the same at the same time."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=build.parent, prefix="building-", ignore_cleanup_errors=True) as work:
        fresh = Path(work) / "fresh"
        fresh.mkdir(mode=0o700)
        output = fresh / "kernels.so"
        objects = _compiled_objects(compiler, flags, Path(work))
        _output_of(compiler, "-shared", *objects, *_LINKING, "-o", str(output))
        if not output.is_file():
            raise CompilationError(f"{compiler} wrote no library")
        (fresh / "sha256").write_text(hashlib.sha256(output.read_bytes()).hexdigest())
        while not _is_whole(build) and not _moved(fresh, build):
            if build.exists() and not _is_whole(build):  # a broken one is in the way
                build.rename(Path(work) / f"broken-{time.monotonic_ns()}")
    logger.warning("Compiled the fused CPU kernels in %.1f s; kept in %s.", time.perf_counter() - start, build.parent)
    return build / "kernels.so"


def _compiled_objects(compiler: str, flags: tuple[str, ...], work: Path) -> list[str]:
    """The sources, compiled on all processors at once; several files in one go where there are fewer of those, since of each
    file a third of the time goes into torch's headers."""
    sources = sorted(_SOURCES.glob("*.cpp"))
    units = min(len(sources), os.cpu_count() or 1)
    objects = [str(work / f"{unit}.o") for unit in range(units)]

    def compile_unit(unit: int) -> None:
        together = work / f"{unit}.cpp"
        together.write_text("".join(f'#include "{source}"\n' for source in sources[unit::units]))
        _output_of(compiler, "-c", str(together), *flags, "-o", objects[unit])

    with ThreadPoolExecutor(units) as pool:
        for _ in pool.map(compile_unit, range(units)):
            pass  # what one of them raises is raised here
    return objects


def _moved(fresh: Path, build: Path) -> bool:
    """Give a build its name; False where there is one of that name already."""
    try:
        fresh.rename(build)
    except OSError:
        if not build.exists():
            raise
        return False
    return True


def _output_of(*command: str) -> str:
    """What a command prints; CompilationError if it fails, crashes or hangs."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise CompilationError(f"{command[0]}: {error}") from error
    try:
        output, errors = process.communicate(timeout=_TIME_LIMIT)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)  # with the compiler's own processes
        process.communicate()
        raise CompilationError(f"{command[0]} took more than {_TIME_LIMIT} s") from error
    if process.returncode:
        message = errors.decode(errors="replace").strip()[-500:] or f"exit status {process.returncode}"
        raise CompilationError(f"{command[0]}: {message}")
    return output.decode(sys.getfilesystemencoding(), errors="replace")


def attention_workspace(length: int, keys: int, dim: int, value_dim: int) -> int:
    """Float32 values that each thread of the attention's backward pass needs room for, as in `cpu/attention.h`."""

    def padded(n: int) -> int:
        return -(-n // 16) * 16

    most = max(24576 // padded(keys), 6) if keys else max(length, 6)
    tiles = -(-length // most)
    rows = -(-length // tiles) if tiles else 0
    e, ev, s = padded(dim), padded(value_dim), padded(keys)
    own = length * e + 2 * keys * e + keys * ev + (dim + value_dim) * s
    return own + rows * (2 * s + e + ev) + padded(e + ev)
