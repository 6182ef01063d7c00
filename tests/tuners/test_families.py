"""The table of supported models: every family with every structure, alone, together and as a ladder."""

from __future__ import annotations

import families
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.initialization import no_init_weights

from peft_s2a import S2ABiasConfig, S2AConfig, S2APromptConfig, S2ASideConfig


CONFIGS = {
    "bias": S2ABiasConfig,
    "prompt": S2APromptConfig,
    "side": S2ASideConfig,
    "all": S2AConfig,
    "ladder": lambda **kwargs: S2ASideConfig(side_mode="ladder", **kwargs),
}
# SDPA rounds differently when its mask, here the relative position bias, requires grad; freezing the base avoids that.
ROW = "{:18} {:7} {:>10} {:>13} {:>12} {:>13}"


@pytest.fixture(scope="module")
def table():
    rows = [ROW.format("family", "S2A", "trainable", "equal at init", "loss falls", "reloads equal")]
    yield rows
    print("\n" + "\n".join(rows))


def frozen_model(family: str) -> nn.Module:
    return families.build(family).eval().requires_grad_(False)


def eval_logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return families.logits(model, images)


def eval_loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return nn.functional.cross_entropy(eval_logits(model, images).double(), labels).item()


def gradients(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(0)
    model.train()
    model.zero_grad()
    nn.functional.cross_entropy(families.logits(model, images), labels).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def descend(model: nn.Module, lr: float) -> None:
    """One step along the normalised gradient, by the structures alone: the head must not stand in for them."""
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name]
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter -= lr * parameter.grad / norm


@pytest.mark.parametrize(("family", "structure"), families.each_in("all", "bias", "prompt", "side", "ladder"))
def test_family(family, structure, table, tmp_path, request):
    if structure not in ("all", "ladder"):
        request.getfixturevalue("function_mode")
    images, labels = families.batch(family)
    base = frozen_model(family)
    expected = eval_logits(base, images)
    model = get_peft_model(base, CONFIGS[structure]())

    assert torch.equal(eval_logits(model, images), expected)
    assert any("modules_to_save" in name for name, _ in model.named_parameters()), "the head was not found"

    start = eval_loss(model, images, labels)
    gradients(model, images, labels)
    descend(model, lr=0.05)
    assert eval_loss(model, images, labels) < start

    # Zero gates and projections hide what is behind them in the first step.
    gradients(model, images, labels)
    descend(model, lr=0.05)
    without = [name for name, g in gradients(model, images, labels).items() if g is None or not g.abs().sum() > 0]
    assert not without
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not frozen

    trained = eval_logits(model, images)
    assert not torch.equal(trained, expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(frozen_model(family), tmp_path)
    assert torch.equal(eval_logits(loaded, images), trained)

    count, total = model.get_nb_trainable_parameters()
    table.append(ROW.format(family, structure, f"{count / total:.2%}", "yes", "yes", "yes"))


@pytest.mark.parametrize("structure", ["bias", "prompt", "side", "all"])
def test_vit_base_trains_about_one_percent(structure, table):
    with no_init_weights(), torch.device("meta"):
        model = ViTForImageClassification(ViTConfig())
    model = get_peft_model(model, CONFIGS[structure](modules_to_save=[]))
    count, total = model.get_nb_trainable_parameters()
    table.append(ROW.format("ViT-B/16, no head", structure, f"{count / total:.2%}", "", "", ""))
    assert count / total < 0.01
    if structure == "all":
        assert 0.005 <= count / total


@pytest.mark.usefixtures("function_mode")
@pytest.mark.parametrize("family", families.FAMILIES)
def test_random_starts_survive_a_reload(family, tmp_path):
    images, _ = families.batch(family)
    model = get_peft_model(frozen_model(family), S2AConfig(init_weights=False, side_init="svd"))
    expected = eval_logits(model, images)
    model.save_pretrained(tmp_path)
    assert torch.equal(eval_logits(PeftModel.from_pretrained(frozen_model(family), tmp_path), images), expected)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_unload_gives_the_base_model_back(family):
    images, _ = families.batch(family)
    base = frozen_model(family)
    expected = eval_logits(base, images)
    names = [name for name, _ in base.named_modules()]
    for structure in CONFIGS:
        model = get_peft_model(base, CONFIGS[structure](init_weights=False, modules_to_save=[]))
        assert not torch.allclose(eval_logits(model, images), expected)
        base = model.unload()
        assert torch.equal(eval_logits(base, images), expected)
        assert [name for name, _ in base.named_modules()] == names


@pytest.mark.parametrize("family", families.FAMILIES)
def test_biases_of_every_family_can_be_merged(family):
    images, _ = families.batch(family)
    model = get_peft_model(frozen_model(family), S2ABiasConfig(init_weights=False))
    expected = eval_logits(model, images)
    torch.testing.assert_close(eval_logits(model.merge_and_unload(), images), expected, rtol=1e-4, atol=1e-5)
