"""Two processes that share a model's parameters (FSDP2, FSDP1) train as one process does."""

import pytest
from two_processes import launch


@pytest.mark.parametrize("version", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_two_processes_train_as_one(version, tmp_path):
    launch(f"fsdp{version}_worker.py", str(tmp_path))
