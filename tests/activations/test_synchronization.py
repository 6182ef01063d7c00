"""A training step asks no tensor for its values, and can therefore run ahead of its device, be traced and be captured."""

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from peft_s2a import S2AConfig
from peft_s2a.activations.config import ActivationQuantizationConfig
from peft_s2a.activations.interception import OperatorMode


_WAITING = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::item"}
_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_PLAIN = {**_WIDTHS, "image_size": 32, "patch_size": 8}
_WINDOWS = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}

CONFIGS = {
    "ViT": transformers.ViTConfig(**_PLAIN),
    "BEiT": transformers.BeitConfig(**_PLAIN, use_relative_position_bias=True),
    "BEiT, one bias for all layers": transformers.BeitConfig(**_PLAIN, use_shared_relative_position_bias=True),
    "Swin": transformers.SwinConfig(**_WINDOWS),
    "SwinV2": transformers.Swinv2Config(**_WINDOWS),
    "ResNet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2]),
}


def small_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForImageClassification.from_config(CONFIGS[name])


class _Waits(TorchDispatchMode):
    """Notes the operators that wait for their device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in _WAITING:
            self.seen.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "autocast"),
    [
        pytest.param(name, autocast, marks=pytest.mark.slow if autocast and name != "ViT" else ())
        for name in CONFIGS
        for autocast in (False, True)
    ],
)
def test_no_step_waits_for_the_device(name, autocast):
    model = get_peft_model(small_model(name), S2AConfig()).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with _Waits() as waits:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert waits.seen == []


def test_waiting_is_noticed():
    with _Waits() as waits:
        assert torch.ones(2).sum().item() == 2 and torch.equal(torch.ones(1), torch.ones(1))
    assert waits.seen == ["aten::_local_scalar_dense", "aten::equal"]


@pytest.mark.parametrize(
    ("name", "kind", "shape", "options"),
    [
        ("ViT", "ViTLayer", (2, 17, 32), {}),
        ("BEiT", "BeitLayer", (2, 17, 32), {"resolution": (32, 32)}),
        ("Swin", "SwinLayer", (2, 256, 16), {"input_dimensions": (16, 16)}),
    ],
)
def test_blocks_can_be_traced_forward_and_backward(name, kind, shape, options):
    blocks = [module for module in small_model(name).modules() if type(module).__name__ == kind]
    # of Swin, the one whose windows are shifted; in eval mode no path is dropped at random
    block = blocks[1].requires_grad_(False).eval()
    operators = OperatorMode(ActivationQuantizationConfig(backend="reference"), "block")

    def step(x, grad):
        x = x.detach().requires_grad_()
        with operators:
            y = block(x, **options)
        return torch.autograd.grad(y[0] if isinstance(y, tuple) else y, x, grad)[0]

    x, grad, other = (torch.randn(shape) for _ in range(3))
    graph = make_fx(step)(x, grad)
    assert torch.equal(graph(x, grad), step(x, grad))
    assert torch.equal(graph(other, grad), step(other, grad))
