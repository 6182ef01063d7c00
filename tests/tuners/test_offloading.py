"""accelerate's hooks: of models spread over devices, and of offloaded ones, whose tensors have no values but during the
calls of the modules that hold them."""

from __future__ import annotations

import families
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import attach_align_device_hook_on_blocks
from kept import Kept
from methods import S2A, base_model, logits, make_config
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def spread(model: nn.Module) -> nn.Module:
    """The hooks of a model whose blocks lie on several devices; here all of them are the CPU."""
    places = dict.fromkeys(["", *(name for name, module in model.named_modules() if list(module.children()))], CPU)
    attach_align_device_hook_on_blocks(model, execution_device=places, offload=dict.fromkeys(places, False))
    assert any(hasattr(module, "_hf_hook") for module in model.modules() if isinstance(module, nn.Linear))
    return model


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "convolution")
        return function(*args, **(kwargs or {}))


def step(model: nn.Module) -> tuple[dict[str, torch.Tensor], int, int]:
    """(gradients, bytes that autograd keeps, matrix products) of one training step."""
    images, labels = families.batch("vit")
    model.train()
    model.zero_grad()
    with Products() as products, Kept(model, images) as kept:
        loss = nn.functional.cross_entropy(families.logits(model, images), labels)
    loss.backward()
    return (
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        kept.nbytes,
        products.count,
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", S2A)
@pytest.mark.parametrize("bits", [None, 4])
def test_a_model_that_is_spread_trains_as_one_that_is_not(method, when, bits):
    quantization = None if bits is None else {"bits": bits}
    config = make_config(method, random_start=True, activation_quantization=quantization)
    model = get_peft_model(base_model(), config)
    if when == "before":
        placed = get_peft_model(spread(base_model()), config)
    else:
        placed = spread(get_peft_model(base_model(), config))
    placed.load_state_dict(model.state_dict())
    expected, kept, products = step(model)
    actual, kept_too, products_too = step(placed)
    assert kept_too == kept
    assert bits is not None or products_too == products  # what plans compute is not seen one by one
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)
