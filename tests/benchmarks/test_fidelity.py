"""The fidelity benchmark's logic, on a backbone of a few thousand parameters."""

import fidelity
import pytest
import torch
from images import fashion_mnist, pixel_values
from peft import get_peft_model
from transformers import Dinov2Config, Dinov2ForImageClassification

from peft_s2a import ActivationQuantizationConfig, S2AConfig


@pytest.fixture
def model():
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    model = Dinov2ForImageClassification(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias") or "norm" in name
    return model


@pytest.fixture
def data():
    return [{"pixel_values": torch.randn(4, 3, 28, 28), "labels": torch.arange(4) % 2} for _ in range(2)]


def test_more_bits_are_closer_to_the_exact_gradient(model, data):
    exact = [fidelity.gradient(model, batch) for batch in data]
    found = [
        fidelity.compare(model, data, exact, ActivationQuantizationConfig(bits=bits, group_size=16))
        for bits in (2, 4, 8)
    ]
    errors = [result["relative_error"] for result in found]
    assert errors[0] > errors[1] > errors[2] > 0
    assert 0.99 < found[2]["worst_cosine"] <= found[2]["cosine"] <= 1
    assert all(torch.equal(fidelity.gradient(model, batch), e) for batch, e in zip(data, exact)), "left quantised"


def test_gradients_are_compared_while_an_adapter_is_trained(model, data):
    tuned = get_peft_model(model, S2AConfig(activation_quantization=None)).train()
    started = {name: parameter.clone() for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    head = sum(parameter.numel() for name, parameter in tuned.named_parameters() if ".modules_to_save." in name)
    sizes = []
    original = fidelity.gradient

    def watched(model, batch, parameters):
        found = original(model, batch, parameters)
        sizes.append(found.numel())
        return found

    fidelity.gradient = watched
    try:
        config = ActivationQuantizationConfig(bits=2, group_size=16)
        rows = list(fidelity.along_training(tuned, data * 2, data, config, 1e-2, (0, 1, 3)))
    finally:
        fidelity.gradient = original
    assert [row["step"] for row in rows] == [0, 1, 3] and rows[0]["loss"] is None and rows[2]["loss"] > 0
    assert all(-1 <= row["worst_cosine"] <= row["cosine"] < 1 and row["relative_error"] > 0 for row in rows)
    assert len({row["relative_error"] for row in rows}) == 3
    assert head > 0 and set(sizes) == {sum(parameter.numel() for parameter in started.values()) - head}
    changed = [name for name, value in started.items() if not torch.equal(value, tuned.get_parameter(name))]
    assert len(changed) > 0.9 * len(started)


def test_every_kind_is_compared_at_every_width(model, data):
    names = [name for name, _ in fidelity.variants(model, data[0], "auto")]
    nearest = {(name["operator"], name["bits"]) for name in names if name["variant"] == "nearest"}
    kinds = (fidelity.ALL, *fidelity.KINDS)
    assert nearest == {(kind, bits) for kind in kinds for bits in fidelity.WIDTHS}
    assert [name["bits"] for name in names if name["variant"] == "calibrated"] == [4, 3]


def test_images_are_resized_and_normalised():
    pixels = pixel_values(torch.full((2, 8, 8), 0.5), 28)
    assert pixels.shape == (2, 3, 28, 28)
    expected = [(0.5 - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(expected))


def test_missing_images_are_named_with_where_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        fashion_mnist("test", tmp_path / "nowhere")
