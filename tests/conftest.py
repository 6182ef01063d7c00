"""Shared by all tests: how timm is found, and small models of every supported family."""

import os
import sys
from pathlib import Path

import pytest
import torch


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


# Python code takes half as long again while coverage follows it, that of torch too, which is most of what these run; the
# lines of the package that they reach are reached by others too.
NOT_FOLLOWED = {
    "test_agreement.py", "test_batch_norm.py", "test_checkpointing.py", "test_compile.py", "test_compiled.py",
    "test_corpus.py", "test_coverage.py", "test_ddp.py", "test_export.py", "test_families.py", "test_faults.py",
    "test_fsdp.py", "test_independence.py", "test_inline.py", "test_peft_api.py", "test_placement.py", "test_plan_surprises.py", "test_random.py",
    "test_synchronization.py", "test_triton.py",
}  # fmt: skip
NOT_FOLLOWED_FOLDERS = {"benchmarks", "examples"}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in NOT_FOLLOWED or item.path.parent.name in NOT_FOLLOWED_FOLDERS:
            item.add_marker(pytest.mark.no_cover)


@pytest.fixture
def function_mode(monkeypatch):
    """No block gets a plan: for tests of something else, since making plans of a small model takes longer than training
    it. That a block does the same with a plan and without is shown in `activations/test_plans.py`."""
    monkeypatch.setattr("peft_s2a.activations.plans.planner._unfit", lambda: "this test has no need of plans")


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Random inputs are the same in every run, whichever tests run before."""
    torch.manual_seed(20250316)
