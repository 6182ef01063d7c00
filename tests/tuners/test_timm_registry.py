"""One small model of every module of timm's registry, as a user who never looked at ours would bring it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn

from peft_s2a import S2AConfig


timm = pytest.importorskip("timm")

# Parts of the names of small models, the smallest first.
SIZES = ("atto", "femto", "pico", "nano", "xxs", "xx_small", "_xs", "tiny", "_t0", "_t1", "_t_", "_s0", "_m0", "0_5", "26", "18",
         "small", "_s", "base", "b0")  # fmt: skip


def smallest(module: str) -> str:
    names = timm.list_models(module=module)
    return min(
        (name for size in SIZES for name in names if size in name),
        key=lambda name: (_rank(name), len(name), name),
        default=names[0],
    )


def _rank(name: str) -> int:
    return next(index for index, size in enumerate(SIZES) if size in name)


def build(name: str) -> tuple[nn.Module, int]:
    """The model, and the size of its images: the first that it can be made for and takes, or what it insists on."""
    for size in (128, 112):
        settings = {"img_size": size} if _can_be_made(name, img_size=size) else {}
        model = timm.create_model(name, num_classes=5, **settings).eval()
        if _takes(model, size):
            return model, size
    return timm.create_model(name, num_classes=5).eval(), model.default_cfg["input_size"][-1]


def _can_be_made(name: str, **settings: int) -> bool:
    try:
        with torch.device("meta"):
            timm.create_model(name, num_classes=5, **settings)
    except (TypeError, AssertionError, RuntimeError, ValueError):
        return False
    return True


def _takes(model: nn.Module, size: int) -> bool:
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError):
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("module", timm.list_modules())
def test_defaults_on_a_model_nobody_tuned_for(module, tmp_path):
    torch.manual_seed(0)
    model, size = build(smallest(module))
    model.requires_grad_(False)  # which changes the kernels that torch takes
    base, images = copy.deepcopy(model), torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = base(images)
    model = get_peft_model(model, S2AConfig()).eval()
    config = model.peft_config["default"]
    assert config.structure_targets.get("side") and config.modules_to_save
    assert torch.equal(model(images), expected)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.tensor([0, 1])).backward()
        optimizer.step()
    assert [name for name, p in parameters.items() if p.grad is None or not p.grad.isfinite().all()] == []
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
