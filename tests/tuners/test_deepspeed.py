"""DeepSpeed ZeRO-2 and ZeRO-3 in two processes on the CPU train as one process does, where DeepSpeed is installed."""

import importlib.util

import pytest
from two_processes import launch


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_train_as_one(stage):
    launch("deepspeed_worker.py", str(stage), timeout=900)
