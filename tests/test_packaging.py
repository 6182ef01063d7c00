"""The wheel and the source distribution: what is in them, and that they work where nothing else of this project is."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent

STEP = """
import warnings, torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification
import peft_s2a
from peft_s2a.activations.levels import *  # reads the level tables
sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8)
model = get_peft_model(ViTForImageClassification(ViTConfig(**sizes)), peft_s2a.S2AConfig())
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    for _ in range(2):
        model(pixel_values=torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1])).loss.backward()
print(peft_s2a.__file__)
print("warnings:", sum("fused CPU kernels are not available" in str(warning.message) for warning in found))
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The wheel and the source distribution, built from a copy of what git would track."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    for name in listed:
        if not name.startswith("benchmarks/results/") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,), (archive,) = ((source / "dist").glob(pattern) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, archive


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(distributions):
    names = {Path(name) for name in zipfile.ZipFile(distributions[0]).namelist()}
    assert {name.parts[0].partition("-")[0] for name in names} == {"peft_s2a"}
    package = {
        path.relative_to(ROOT)
        for path in (ROOT / "peft_s2a").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package == {name for name in names if name.parts[0] == "peft_s2a"}


@pytest.mark.slow
def test_the_source_distribution_holds_what_building_and_testing_needs(distributions):
    with tarfile.open(distributions[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints/pinned.txt", "tests/conftest.py"}
    assert names >= {"peft_s2a/py.typed", "examples/demo.py", "examples/backbone/model.safetensors"}
    assert not any("__pycache__" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1], ids=["wheel", "source"])
def test_it_installs_into_a_fresh_environment_and_works_without_a_compiler(distributions, index, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    here = sysconfig.get_path("purelib")
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", site, distributions[index]], check=True, capture_output=True)
    # The dependencies are those of this environment, after the installed package and without the editable one.
    environment = {"PATH": str(tmp_path), "PYTHONPATH": f"{site}:{here}", "HF_HUB_OFFLINE": "1", "CC": "", "CXX": ""}
    environment |= {
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
        "LD_LIBRARY_PATH": os.getenv("LD_LIBRARY_PATH", ""),
    }
    printed = subprocess.run(
        [python, "-c", STEP], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert Path(printed[-2]).is_relative_to(site)
    assert printed[-1] == "warnings: 1"


def test_the_version_stands_in_one_place():
    version = next(
        line.split('"')[1]
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if line.startswith("version =")
    )
    for folder in ("peft_s2a", "docs", ".github"):
        for path in (ROOT / folder).rglob("*.py"):
            assert f'"{version}"' not in path.read_text(), path
