"""Two processes with a model each (DistributedDataParallel) train as one process does, with any option of DDP's."""

from two_processes import launch


def test_two_processes_train_as_one():
    launch("ddp_worker.py")
