"""Every supported family trains with quantised activations: stock outputs, faithful gradients, little in full
precision."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, IMAGE_SIZE, NUM_LABELS, WithHead, batch, build, each_in
from torch import nn
from transformers import (
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    LevitConfig,
    LevitForImageClassification,
    MobileViTConfig,
    MobileViTForImageClassification,
    PvtV2Config,
    PvtV2ForImageClassification,
)

from peft_s2a.activations.config import ActivationQuantizationConfig
from peft_s2a.activations.wrap import quantize_activations
from peft_s2a.memory.profile import profile_memory


def _timm(name, **options):
    def model():
        timm = pytest.importorskip("timm")
        return timm.create_model(name, num_classes=NUM_LABELS, **options)

    return model


# more of what models are made of: gated MLPs, convolutional stems, squeeze-and-excitation, pooling, other libraries
MORE = {
    "dinov2_swiglu": lambda: Dinov2ForImageClassification(
        Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=8,
            use_swiglu_ffn=True,
            num_labels=NUM_LABELS,
        )
    ),
    "convnextv2": lambda: ConvNextV2ForImageClassification(
        ConvNextV2Config(num_stages=2, hidden_sizes=[8, 16], depths=[1, 2], num_labels=NUM_LABELS, patch_size=2)
    ),
    "dinov3_convnext": lambda: WithHead(
        DINOv3ConvNextModel(DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1])), 16
    ),
    "pvt_v2": lambda: PvtV2ForImageClassification(
        PvtV2Config(
            image_size=IMAGE_SIZE,
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[2, 4],
            mlp_ratios=[2, 2],
            num_labels=NUM_LABELS,
        )
    ),
    "levit": lambda: LevitForImageClassification(
        LevitConfig(
            image_size=64,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 2],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
            down_ops=[["Subsample", 8, 2, 2, 2, 2], ["Subsample", 8, 2, 2, 2, 2]],
            num_labels=NUM_LABELS,
        )
    ),
    "mobilevit": lambda: MobileViTForImageClassification(
        MobileViTConfig(
            image_size=64,
            hidden_sizes=[16, 16, 16],
            neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32],
            num_attention_heads=2,
            num_labels=NUM_LABELS,
        )
    ),
    "timm_swin": _timm(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
    ),
    "timm_efficientnet": _timm("efficientnet_lite0"),
    "timm_eva": _timm("eva02_tiny_patch14_224", img_size=28, embed_dim=32, depth=2, num_heads=2),
}
LARGER = {"levit": 64, "mobilevit": 64, "timm_swin": 32, "timm_eva": 28}
ALL = [*FAMILIES, *MORE]
# Of these hardly two blocks are alike, so that recording them for two sizes takes long.
MANY_PLANS = {"mobilevit", "timm_swin", "timm_resnet", "timm_efficientnet"}
IN_TILES = [  # of the others every third, in the usual run
    pytest.param(name, marks=pytest.mark.slow if name in MANY_PLANS or index % 3 else ())
    for index, name in enumerate(ALL)
]


def model_and_batch(name):
    if name in FAMILIES:
        return build(name), *batch(name)
    torch.manual_seed(0)
    side = LARGER.get(name, IMAGE_SIZE)
    return MORE[name](), torch.randn(4, 3, side, side), torch.arange(4) % NUM_LABELS


def tune_biases(model):
    """Train biases and the head; statistics of batch normalisation stay as they are."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = (
            name.endswith("bias") or re.search(r"\b(classifier|head|fc)\.weight$", name) is not None
        )
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def outputs(model, images):
    result = model(images)
    return result if isinstance(result, torch.Tensor) else result.logits


def step(model, images, labels):
    torch.manual_seed(7)
    model.zero_grad()
    output = outputs(model, images)
    F.cross_entropy(output, labels).backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(expected, actual):
    assert expected.keys() == actual.keys()
    one, other = (torch.cat([g.flatten() for g in gradients.values()]).double() for gradients in (expected, actual))
    return F.cosine_similarity(one, other, dim=0).item()


class TestFamilies:
    @pytest.mark.parametrize("name", ALL)
    @pytest.mark.parametrize("training", [True, False])
    def test_outputs_are_the_stock_ones_bit_for_bit(self, name, training, request):
        if not training:  # so that it is shown with plans and without
            request.getfixturevalue("function_mode")
        model, images, _ = model_and_batch(name)
        model.train(training)
        twin = quantize_activations(copy.deepcopy(model), ActivationQuantizationConfig(backend="reference"))
        results = []
        for one in (model, twin):
            torch.manual_seed(7)
            results.append(outputs(one, images))
        assert torch.equal(*results)
        for one, other in zip(model.buffers(), twin.buffers()):
            assert torch.equal(one, other)

    @pytest.mark.parametrize(("name", "tuned"), each_in("everything", "biases", names=ALL, slow=MANY_PLANS))
    def test_gradients_are_faithful_in_tiles(self, name, tuned):
        model, images, labels = model_and_batch(name)
        model = tune_biases(model) if tuned == "biases" else model.train()
        twin = copy.deepcopy(model)
        quantize_activations(twin, ActivationQuantizationConfig(bits=8, group_size=32, mlp_tiles=2))
        output, expected = step(model, images, labels)
        quantized_output, actual = step(twin, images, labels)
        torch.testing.assert_close(quantized_output, output, rtol=1e-4, atol=1e-5)
        assert compare(expected, actual) > 0.999

    @pytest.mark.parametrize("name", IN_TILES)
    def test_little_stays_in_full_precision(self, name):
        model, images, labels = model_and_batch(name)
        images, labels = torch.cat([images, images]), torch.cat([labels, labels])  # masks and statistics do not grow
        tune_biases(model)

        def loss(model, batch):
            return F.cross_entropy(outputs(model, batch), labels)

        stock = profile_memory(model, images, loss_fn=loss)
        quantize_activations(model)
        report = profile_memory(model, images, loss_fn=loss)
        full = {op: kept.full_precision for op, kept in report.by_operator.items() if kept.full_precision}
        assert report.saved_bytes < stock.saved_bytes / 4, report
        assert sum(full.values()) < 0.03 * stock.saved_bytes, full
