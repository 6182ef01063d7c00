"""Exporting a model in eval mode, with gradients on or off: plain operators, and the outputs it has in eager mode."""

import families
import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_s2a import S2AConfig, S2ASideConfig, quantize_activations


class Logits(nn.Module):
    """A model as a function from images to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return families.logits(self.model, images)


METHODS = {
    "s2a": lambda model: get_peft_model(model, S2AConfig(init_weights=False)),
    "ladder": lambda model: get_peft_model(model, S2ASideConfig(side_mode="ladder", init_weights=False)),
    "full": quantize_activations,
}
CASES = [("s2a", "vit"), ("s2a", "resnet"), ("ladder", "vit"), ("full", "swin")]


def adapted(method, family):
    return Logits(METHODS[method](families.build(family))).eval()


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize(("method", "family"), CASES)
def test_export_holds_no_operators_of_ours(method, family):
    model, (images, _) = adapted(method, family), families.batch(family)
    expected = model(images)
    assert expected.requires_grad
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    assert not [name for name in operators(program) if "s2a" in name or "autograd" in name.lower()]
    exported = program.module()
    torch.testing.assert_close(exported(images), expected)
    torch.testing.assert_close(exported(images[:2]), model(images[:2]))
    assert torch.uint8 in kept_dtypes(model, images)  # afterwards it trains as before, in eval mode too


def kept_dtypes(model, images):
    dtypes = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: dtypes.add(t.dtype) or t, lambda t: t):
        model(images)
    return dtypes


# torch cannot export transformers' Swin to ONNX, with or without this package
@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("s2a", "vit"), ("full", "dinov2"), pytest.param("s2a", "resnet", marks=pytest.mark.slow),
        pytest.param("ladder", "vit", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_onnx_computes_the_same(method, family, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, (images, _) = adapted(method, family), families.batch(family)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(outputs, model(images).detach().numpy(), rtol=1e-3, atol=1e-4)
