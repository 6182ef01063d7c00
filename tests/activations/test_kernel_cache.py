"""The cache of the compiled kernels: whose it is, what is believed, and every way in which a build can fail.

A stand-in for the compiler copies the true library, and loading is looked at instead of done: a process has one set of
kernels. Processes of their own load it in earnest.
"""

import logging
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from forked import run_scripts

from peft_s2a.activations.backends import compiled


pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler")

SCRIPT = """
    import torch, warnings
    warnings.simplefilter("error")
    from peft_s2a.activations.backends import compiled
    from peft_s2a.activations.ops import op_set
    assert op_set("compiled").encode_groups(torch.ones(2, 8), 4, 8, None)[0].shape == (2, 4)
    print("loaded", compiled.library())
"""


class Machine:
    """A home, a cache and a compiler of the test's own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cache, self.monkeypatch = folder, folder / "cache", monkeypatch
        self.calls = folder / "calls"
        self.compiler = folder / "c++"
        self.true_library = compiled.library().read_bytes()
        self.compiles()
        monkeypatch.setenv("CXX", str(self.compiler))
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.cache))
        monkeypatch.setattr(torch.ops, "load_library", self.load)

    def load(self, path: Path) -> None:
        if path.read_bytes() != self.true_library:
            raise OSError(f"{path} is no library")

    def compiles(self, body: str = "", version: str = "echo stand-in 1.0") -> None:
        """Have the compiler run ``body`` (sh; ``$output`` is the file to write) before it copies a true library."""
        self.compiler.write_text(
            "#!/bin/sh\n"
            f'if [ "$1" = --version ]; then {version}; exit 0; fi\n'
            f'[ "$1" = -c ] || echo linked >> {self.calls}\n'
            'while [ "$1" != -o ]; do shift; done; output="$2"\n'
            f'{body}\ncp {compiled.library()} "$output"\n'
        )
        self.compiler.chmod(0o755)

    def times_built(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    def run(self) -> str:
        """Have the kernels loaded; what is said about it."""
        messages = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())
        compiled.logger.addHandler(handler)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                messages.append(f"loaded {compiled.library.__wrapped__()}")
        finally:
            compiled.logger.removeHandler(handler)
        return "\n".join([*messages, *(f"warning {warning.message}" for warning in caught)])

    def library(self) -> Path:
        (path,) = self.cache.glob("peft_s2a/*/kernels.so")
        return path


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def assert_loaded(output: str, folder: Path | None = None) -> None:
    assert "loaded /" in output and "warning" not in output, output
    assert folder is None or f"loaded {folder}" in output, output


def assert_reference(output: str, reason: str) -> None:
    assert "loaded None" in output and output.count("warning") == 1 and reason in output, output


class TestWhoseItIs:
    def test_a_folder_of_the_users_own_and_one_build(self, machine):
        assert_loaded(machine.run(), machine.cache)
        assert_loaded(machine.run(), machine.cache)
        assert machine.times_built() == 1
        assert stat.S_IMODE((machine.cache / "peft_s2a").stat().st_mode) == 0o700
        assert not list((machine.cache / "peft_s2a").glob("building-*"))

    def test_a_folder_that_others_may_write_to_is_closed(self, machine):
        (machine.cache / "peft_s2a").mkdir(parents=True)
        (machine.cache / "peft_s2a").chmod(0o777)
        assert_loaded(machine.run(), machine.cache)
        assert stat.S_IMODE((machine.cache / "peft_s2a").stat().st_mode) == 0o700

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
    def test_a_planted_folder_of_another_user_is_not_used(self, machine):
        assert_loaded(machine.run(), machine.cache)
        for path in (machine.cache / "peft_s2a", *(machine.cache / "peft_s2a").rglob("*")):
            os.chown(path, 12345, 12345)
        output = machine.run()
        assert_loaded(output)
        assert f"loaded {machine.cache}" not in output and "this process alone" in output

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
    def test_a_planted_library_of_another_user_is_not_loaded(self, machine):
        machine.run()
        os.chown(machine.library(), 12345, 12345)
        assert_loaded(machine.run(), machine.cache)
        assert machine.times_built() == 2 and machine.library().stat().st_uid == os.geteuid()

    def test_a_link_in_the_folders_place_is_not_followed(self, machine):
        machine.cache.mkdir()
        (machine.folder / "elsewhere").mkdir()
        (machine.cache / "peft_s2a").symlink_to(machine.folder / "elsewhere")
        output = machine.run()
        assert_loaded(output)
        assert "this process alone" in output and not list((machine.folder / "elsewhere").iterdir())


class TestKey:
    def test_compiler_version_and_instruction_set_are_in_it(self, machine):
        machine.run()
        machine.compiles(version="echo stand-in 2.0")
        machine.run()
        expected = 2 if compiled.capability() == "DEFAULT" else 3
        machine.monkeypatch.setenv("PEFT_S2A_CPU_CAPABILITY", "DEFAULT")
        machine.run()
        built = len(list(machine.cache.glob("peft_s2a/*/kernels.so")))
        assert built == machine.times_built() == expected

    def test_an_instruction_set_that_the_processor_lacks_is_never_taken(self, monkeypatch):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
        monkeypatch.setenv("PEFT_S2A_CPU_CAPABILITY", "AVX512")
        assert compiled.capability() == "AVX2"
        assert not any("native" in flag for flags in compiled.CAPABILITIES.values() for flag in flags)

    def test_a_name_that_is_no_instruction_set_is_refused(self, monkeypatch):
        monkeypatch.setenv("PEFT_S2A_CPU_CAPABILITY", "SSE9")
        with pytest.raises(ValueError, match="SSE9"):
            compiled.capability()


class TestBrokenFiles:
    @pytest.mark.parametrize("damage", ["truncated", "empty", "changed", "gone", "no hash", "hash of other bytes"])
    def test_are_built_again(self, machine, damage):
        machine.run()
        path = machine.library()
        content = path.read_bytes()
        digest = path.with_name("sha256")
        match damage:
            case "truncated":
                path.write_bytes(content[: len(content) // 2])
            case "empty":
                path.write_bytes(b"")
            case "changed":
                path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            case "gone":
                path.unlink()
            case "no hash":
                digest.unlink()
            case _:
                digest.write_bytes(b"\xff" * 64)
        assert_loaded(machine.run(), machine.cache)
        assert machine.times_built() == 2
        assert_loaded(machine.run(), machine.cache)
        assert machine.times_built() == 2


class TestPlaces:
    def test_many_processes_at_once(self, machine):
        machine.compiles('case "$output" in *.so) sleep 3; esac')  # until all of them have compiled
        script = machine.folder / "script.py"
        script.write_text(textwrap.dedent(SCRIPT))
        processes = run_scripts(*[[script]] * 3, environments=[{}] * 3, timeout=240)
        assert [process.returncode for process in processes] == [0] * 3, processes[0].stderr
        assert machine.times_built() > 1
        assert {process.stdout.split()[-1] for process in processes} == {str(machine.library())}
        assert not list((machine.cache / "peft_s2a").glob("building-*"))

    @pytest.mark.parametrize("place", ["a file", "under /proc"])
    def test_a_cache_that_cannot_be_written(self, machine, place):
        machine.cache.write_text("no folder")
        if place == "under /proc":
            machine.monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self/no-such")
        output = machine.run()
        assert_loaded(output)
        assert "this process alone" in output
        temporary = Path(output.split("loaded ")[1].splitlines()[0]).parent.parent
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o700 and temporary.stat().st_uid == os.geteuid()

    def test_no_home_and_no_entry_for_the_user(self, machine):
        def home():
            raise RuntimeError("Could not determine home directory.")

        machine.monkeypatch.delenv("XDG_CACHE_HOME")
        machine.monkeypatch.setattr(Path, "home", home)
        output = machine.run()
        assert_loaded(output)
        assert "home" in output and "this process alone" in output

    def test_a_full_disk(self, machine):
        def full(*args):
            raise OSError(28, "No space left on device")

        with machine.monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            assert_reference(machine.run(), "No space left")
        assert_loaded(machine.run(), machine.cache)


class TestCompilers:
    def test_that_fail(self, machine):
        machine.compiles("echo cannot do it >&2; exit 1")
        assert_reference(machine.run(), "cannot do it")

    def test_that_crash(self, machine):
        machine.compiles("kill -SEGV $$")
        assert_reference(machine.run(), "exit status -11")

    def test_that_warn(self, machine):
        machine.compiles("echo beware >&2")
        assert_loaded(machine.run(), machine.cache)

    def test_that_hang(self, machine):
        machine.compiles("sleep 600 & wait")
        machine.monkeypatch.setattr(compiled, "_TIME_LIMIT", 1)
        assert_reference(machine.run(), "more than 1 s")

    def test_that_write_nothing_and_say_that_all_is_well(self, machine):
        machine.compiles("exit 0")
        assert_reference(machine.run(), "wrote no library")

    def test_that_write_what_is_no_library(self, machine):
        machine.compiles('echo text > "$output"; exit 0')
        assert_reference(machine.run(), "fused CPU kernels")

    def test_whose_words_are_not_utf8(self, machine):
        machine.compiles(r"printf '\377\376 bad' >&2; exit 1", version=r"printf '\377\376'")
        assert_reference(machine.run(), "bad")

    def test_that_are_not_there(self, machine):
        machine.compiler.unlink()
        assert_reference(machine.run(), "C++ compiler")

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["g++", "clang++"])
    def test_that_are_common(self, machine, name):
        if shutil.which(name) is None:
            pytest.skip(f"no {name}")
        machine.monkeypatch.setenv("CXX", name)
        result = subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True)
        assert result.returncode == 0 and str(machine.cache) in result.stdout, result.stderr
