"""Ten thousand steps of training in which nothing grows, with plans and without."""

import gc
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from peft import get_peft_model

from peft_s2a import S2AConfig


BATCHES, RESOLUTIONS = (1, 2, 3, 5), (32, 48, 64)
WARM_UP, STEPS, TIMES = 500, 10_000, 5


def live() -> tuple[int, int, int]:
    """Bytes of the tensors that are alive, how many Python objects there are, and the process's resident bytes."""
    gc.collect()
    storages, objects = {}, gc.get_objects()
    for thing in objects:
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return sum(storages.values()), len(objects), resident


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("mode", ["plans", "functions"])
def test_ten_thousand_steps_of_a_vit(mode, capsys):
    model = get_peft_model(FAMILIES["vit"](), S2AConfig()).train()
    wrapped = [module for module in model.modules() if hasattr(module, "_activation_settings")]
    assert any(module._activation_settings.planner is not None for module in wrapped)
    if mode == "functions":
        for module in wrapped:
            module._activation_settings.planner = None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def train(steps: range) -> None:
        for step in steps:
            size = RESOLUTIONS[step // 4 % 3]
            images, labels = torch.randn(BATCHES[step % 4], 3, size, size), torch.arange(BATCHES[step % 4])
            model(pixel_values=images, labels=labels, interpolate_pos_encoding=True).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    train(range(WARM_UP))
    found = [live()]
    for part in range(TIMES):
        train(range(part * STEPS // TIMES, (part + 1) * STEPS // TIMES))
        found.append(live())
    tensors, objects, resident = ([later - earlier for earlier, later in pairwise(row)] for row in zip(*found))
    with capsys.disabled():
        print(f"\n{mode}: growth in {TIMES} times {STEPS // TIMES} steps: tensors {tensors} B, objects {objects}, "
              f"resident {[round(x / 2**10) for x in resident]} KiB")  # fmt: skip
    assert sum(tensors) <= 0
    assert sum(objects) < 500  # less than one in 20 steps
    assert sum(resident) < 8 * 2**20  # less than a kilobyte a step
