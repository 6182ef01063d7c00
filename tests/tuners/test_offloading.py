"""accelerate's offloading: tensors without values, which hooks fetch for the calls of the modules that hold them."""

from __future__ import annotations

import families
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from methods import S2A, base_model, logits, make_config
from peft import PeftModel, get_peft_model

from peft_s2a import S2AConfig, S2ASideConfig


CPU = torch.device("cpu")


def offloaded(model: PeftModel, how: str, folder) -> PeftModel:
    if how == "disk":
        disk_offload(model, folder, CPU)
    else:
        cpu_offload(model, CPU, offload_buffers=how == "with buffers")
    assert any(parameter.is_meta for parameter in model.parameters())
    return model


@pytest.mark.parametrize("how", ["without buffers", "with buffers", "disk"])
@pytest.mark.parametrize("method", S2A)
def test_outputs_are_the_same(method, how, tmp_path):
    model = get_peft_model(base_model(), make_config(method, random_start=True))
    expected = logits(model)
    offloaded(model, how, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), expected, atol=1e-3)


@pytest.mark.parametrize("how", ["without buffers", "with buffers"])
@pytest.mark.parametrize("freeze", [True, False])
def test_statistics_of_batch_norms(freeze, how, tmp_path):
    images, _ = families.batch("resnet")
    model = get_peft_model(
        families.build("resnet"), S2AConfig(init_weights=False, freeze_batch_norm_stats=freeze)
    ).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer.add_(torch.randn_like(buffer))
        expected = families.logits(model, images)
        offloaded(model, how, tmp_path)
        torch.testing.assert_close(families.logits(model, images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", S2A)
def test_gradients_that_would_be_lost_are_refused(method, tmp_path):
    model = offloaded(get_peft_model(base_model(), make_config(method, modules_to_save=[])), "with buffers", tmp_path)
    model.train()
    with pytest.raises(RuntimeError, match=r"would be lost"):
        model(torch.randn(2, 3, 32, 32))


def test_branches_without_values_are_refused():
    model = get_peft_model(base_model(), S2ASideConfig(modules_to_save=[], activation_quantization=None))
    for module in model.modules():
        if hasattr(module, "s2a_up"):
            module.s2a_up.to("meta")
    with pytest.raises(RuntimeError, match="has no values"):
        logits(model)
