"""Shared by all tests: how timm is found, and small models of every supported family."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings


os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Triton's kernels run in its interpreter where there is no GPU. It has to know before it is imported, as by PEFT.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# transformers imports torchvision wherever it is installed, and torchvision's wheels for CUDA refuse to be imported
# beside a CPU-only torch: they cannot load their own library, and then describe two operators that are not there. So
# timm and torchvision live in a folder of their own (the Makefile's), and where the import fails the operators are
# declared.
TIMM_FOLDER = Path(sys.prefix) / "timm"
if TIMM_FOLDER.is_dir():
    sys.path.append(str(TIMM_FOLDER))
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        TORCHVISION = torch.library.Library("torchvision", "DEF")
        TORCHVISION.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        TORCHVISION.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# Python code, that of torch too, takes two thirds longer while coverage follows it. These files reach 91 % of the package's
# lines in an eighth of the time that all tests take.
FOLLOWED = {
    "test_argument_forms.py", "test_bias.py", "test_card.py", "test_cli.py", "test_config.py", "test_device.py", "test_docs.py",
    "test_interception.py", "test_kernel_cache.py", "test_ladder.py", "test_levels.py", "test_loading.py", "test_masks.py",
    "test_not_finite.py", "test_operators.py", "test_ops.py", "test_parallelism.py",
    "test_peft_contract.py", "test_plan.py", "test_precision.py", "test_recorder.py", "test_report.py",
    "test_sharding.py", "test_side.py", "test_structures.py",
}  # fmt: skip
# Few tests that take long: begun first, for at the end one of two processes would wait for the other.
BEGUN_FIRST = {"test_ddp.py", "test_fsdp.py", "test_plans.py", "test_compile.py"}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """pytest-cov's own marker for this, `no_cover`, changes nothing in the processes of pytest-xdist."""
    trace = sys.gettrace()
    is_coverage = type(trace).__module__.split(".")[0] == "coverage"  # and no debugger
    if is_coverage and item.path.name not in FOLLOWED:
        sys.settrace(None)
    yield
    sys.settrace(trace)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not (item.path.name in BEGUN_FIRST or item.path.parent.name == "examples"))


def pytest_configure(config):
    """Examples that hypothesis draws are the same in every usual run; the slow one looks for others."""
    settings.register_profile("usual", derandomize=config.option.markexpr == "not slow")
    settings.load_profile("usual")


@pytest.fixture
def function_mode(monkeypatch):
    """No block gets a plan: for tests of something else, since making plans of a small model takes longer than training
    it. That a block does the same with a plan and without is shown in `activations/test_plans.py`."""
    monkeypatch.setattr("peft_s2a.activations.plans.planner._unfit", lambda: "this test has no need of plans")


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Random inputs are the same in every run, whichever tests run before."""
    torch.manual_seed(20250316)
