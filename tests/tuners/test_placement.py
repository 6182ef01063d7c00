"""Placement on any vision model: the defaults give an adapter that starts equal, trains all it declares, and reloads."""

from __future__ import annotations

import logging
import re

import families
import pytest
import torch
import zoo
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from placement_checks import check
from torch import nn

from peft_s2a import S2ABiasConfig, S2AConfig, S2ASideConfig
from peft_s2a.anatomy import find_task_heads, observe, usage


# What the defaults once got wrong, in structures, heads or reloading.
ONCE_WRONG = [
    "hgnet_v2 classification",
    "metaclip-2 classification",
    "poolformer classification",
    "swiftformer classification",
    "clipseg segmentation",
    "glpn depth",
    "owlvit detection",
    "aimv2 features",
    "lw-detr detection",
    "siglip2 classification",
    "llava",
    "timm cait",
    "timm repvit",
    "autoencoder",
]


@pytest.mark.parametrize("name", ONCE_WRONG)
def test_what_was_once_wrong(name, tmp_path):
    check(name, S2AConfig(), tmp_path, steps=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_zoo(name, tmp_path):
    check(name, S2AConfig(), tmp_path)


class TestHeads:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("hgnet_v2 classification", ["fc"]),
            ("swiftformer classification", ["head", "dist_head"]),  # not `norm`, an ending of seven other names
            ("poolformer classification", ["classifier"]),
            ("dpt depth", ["neck", "head.head"]),  # PEFT would take `head` for `head.head` too
            ("glpn depth", ["decoder", "head.head"]),
            ("vitmatte matting", ["decoder"]),
            ("detr detection", ["class_labels_classifier", "bbox_predictor"]),
            ("llava", []),
            ("paligemma", []),
            ("smolvlm", []),
            ("qwen2.5-vl", []),
            ("clip towers", []),
            ("timm repvit", ["head.head", "head.head_dist"]),
            ("timm crossvit", ["head.0", "head.1"]),
            ("sd unet", []),
        ],
    )
    def test_they_are_found(self, name, expected):
        with torch.device("meta"):
            model = zoo.ZOO[name][0]()
        assert find_task_heads(model) == expected

    def test_every_head_of_a_detector_that_calls_them_inside_its_decoder(self):
        heads = find_task_heads(zoo.build("rt-detr detection"))
        assert {"model.enc_score_head", "model.enc_bbox_head"} <= set(heads)
        assert {f"model.decoder.{kind}_embed.{layer}" for kind in ("class", "bbox") for layer in (0, 1)} <= set(heads)


class TestDiffusion:
    @pytest.mark.parametrize("name", ["sd unet", "sd3 transformer", "flux transformer"])
    def test_prompts_sit_on_attention_layers(self, name):
        """Whose output projection stands in a list with a dropout."""
        targets = get_peft_model(zoo.build(name), S2AConfig()).peft_config["default"].structure_targets
        assert targets["prompt"] and all(".attn" in target for target in targets["prompt"])

    @pytest.mark.parametrize("name", ["dit", "flux2 transformer"])
    def test_they_train_and_reload(self, name, tmp_path):
        check(name, S2AConfig(), tmp_path, steps=4)

    def test_diffusers_own_methods(self):
        inputs = zoo.batch("sd unet")
        unet = zoo.build("sd unet")
        plain = zoo.run(unet, inputs)[0]
        unet.add_adapter(S2AConfig(init_weights=False))
        adapted = zoo.run(unet, inputs)[0]
        assert not torch.equal(adapted, plain)
        unet.disable_adapters()
        assert torch.equal(zoo.run(unet, inputs)[0], plain)
        unet.enable_adapters()
        assert torch.equal(zoo.run(unet, inputs)[0], adapted)

        other = zoo.build("sd unet")
        other.add_adapter(S2AConfig())
        set_peft_model_state_dict(other, get_peft_model_state_dict(unet))
        assert torch.equal(zoo.run(other, inputs)[0], adapted)


class TestTowers:
    @pytest.mark.parametrize("name", ["clip towers", "siglip towers"])
    def test_both_are_adapted(self, name):
        targets = get_peft_model(zoo.build(name), S2AConfig()).peft_config["default"].structure_targets
        for structure in ("bias", "prompt", "side"):
            towers = {target.partition(".")[0] for target in targets[structure]}
            assert {"text_model", "vision_model"} <= towers


class TestChecks:
    def test_a_default_that_cannot_carry_a_structure_is_left_out_with_one_line(self, caplog):
        with caplog.at_level(logging.WARNING, logger="peft_s2a"):
            config = get_peft_model(zoo.build("timm xcit"), S2AConfig()).peft_config["default"]
        dropped = config.dropped_targets["side"]
        assert all(name not in config.structure_targets["side"] for name in dropped)
        lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("No side on")]
        for name in dropped:
            assert sum(name in re.split(r", |: | on ", line) for line in lines) == 1

    def test_it_is_said_where_nothing_can_be_checked(self, caplog):
        class OfTwo(nn.Sequential):
            def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return super().forward(x + y)

        with caplog.at_level(logging.WARNING, logger="peft_s2a"):
            get_peft_model(OfTwo(nn.Linear(4, 4)), S2AConfig(structures=("bias",)))
        assert "No input could be made that OfTwo takes" in caplog.text

    @pytest.mark.parametrize("size", [96, 128])
    @pytest.mark.parametrize("name", ["hiera_tiny_224", "twins_svt_small", "volo_d1_224"])
    def test_timm_models_made_for_other_images_than_their_checkpoints_are_checked(self, name, size):
        timm = pytest.importorskip("timm")
        try:
            model = timm.create_model(name, num_classes=3, img_size=size)
        except AssertionError:
            pytest.skip(f"{name} takes no images of {size}")
        assert observe(model) is not None

    def test_heads_and_what_was_left_out_can_be_printed(self, capsys):
        model = get_peft_model(zoo.build("timm xcit"), S2AConfig())
        model.print_placement()
        printed = capsys.readouterr().out
        assert "trained in full: head\n" in printed
        for structure, reasons in model.peft_config["default"].dropped_targets.items():
            assert all(f"no {structure} on {name}: it {reason}\n" in printed for name, reason in reasons.items())

    def test_a_named_module_that_cannot_carry_anything_is_refused(self):
        with pytest.raises(ValueError, match="on which 'side' cannot sit"):
            get_peft_model(zoo.build("aimv2 features"), S2ASideConfig(target_modules=["head"]))

    def test_observing_leaves_the_model_as_it_was(self):
        model = zoo.build("vit classification").train()
        before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
        assert observe(model).is_complete
        for name, tensor in model.state_dict(keep_vars=True).items():
            assert tensor is before[name][0] and torch.equal(tensor, before[name][1])
        assert model.training and not any(module._forward_hooks for module in model.modules())

    @pytest.mark.parametrize("family", ["beit", "dinov3"])
    def test_observing_leaves_nothing_in_the_caches_of_functions(self, family):
        """Of a static method and of a function beside the classes, which hold tables of positions."""
        model = families.build(family)
        assert observe(model).is_complete
        assert type(families.logits(model, families.batch(family)[0])) is torch.Tensor

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_models_can_be_observed(self, dtype):
        assert observe(zoo.build("timm vit").to(dtype)).is_complete


@pytest.mark.parametrize("name", ["timm resnet18", "timm mobilenetv3"])
def test_timm_checkpointing_does_not_skip_side_branches(name):
    inputs = zoo.batch(name)
    model = get_peft_model(zoo.build(name), S2AConfig(activation_quantization=None, init_weights=False)).eval()
    base = model.base_model.model
    expected = zoo.run(model, inputs)[0]
    base.set_grad_checkpointing(True)
    torch.testing.assert_close(zoo.run(model, inputs)[0], expected)
    zoo.loss(model, inputs).backward()
    without = [key for key, p in model.named_parameters() if "s2a_up" in key and p.grad is None]
    assert not without


class LayerNorm2dNoBias(nn.LayerNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("size", [8, 5])
def test_the_offset_of_a_norm_on_images_lies_on_the_channels(size):
    """Eight channels and eight columns: silent where the offset lies on the wrong axis."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), LayerNorm2dNoBias(8))
    x = torch.randn(2, 3, size, size)
    expected = model(x)
    model = get_peft_model(model, S2ABiasConfig(target_modules=["1"]))
    offset = torch.arange(8.0)
    model.base_model.model[1].s2a_bias["default"].data.copy_(offset)
    torch.testing.assert_close(model(x), expected + offset[:, None, None])


@pytest.mark.parametrize(
    "name", ["poolformer classification", pytest.param("cvt classification", marks=pytest.mark.slow)]
)
def test_what_is_checked_does_not_depend_on_the_default_device(name):
    """Models that are planned are made, and adapted, on the meta device."""
    found = []
    for device in ("cpu", "meta"):
        usage._known.clear()
        model = zoo.build(name).to(device)
        with torch.device(device):
            found.append(get_peft_model(model, S2AConfig()).peft_config["default"].structure_targets)
    assert found[0] == found[1]
