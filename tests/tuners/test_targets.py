"""Where the structures go: found by rules from module types and names, on listed models and on any other."""

from __future__ import annotations

import families
import pytest
import torch
from forked import run_code
from methods import assert_untouched, base_model, snapshot
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import (
    CLIPModel,
    CLIPVisionModel,
    DINOv3ViTBackbone,
    SiglipVisionModel,
    SwinModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTModel,
)

from peft_s2a import S2ABiasConfig, S2AConfig, S2APromptConfig, S2ASideConfig
from peft_s2a.anatomy import find_attention, find_blocks, find_mlps, find_stages, find_task_heads
from peft_s2a.tuners.targets import recorded_in


HEADS = {
    "timm_vit": ["timm_model.head"],
    "timm_resnet": ["timm_model.fc"],
    "timm_convnext": ["timm_model.head.fc"],
    "plain_cnn": ["head"],
    "plain_transformer": ["head"],
}
TRANSFORMERS = ["vit", "deit", "beit", "dinov2", "dinov3", "siglip", "clip", "swin", "swinv2", "timm_vit", "segformer"]
CONVOLUTIONAL = ["resnet", "convnext", "timm_resnet", "timm_convnext", "plain_cnn"]


def targets(model: nn.Module, config) -> dict[str, list[str]]:
    return get_peft_model(model, config).peft_config["default"].structure_targets


class Attention(nn.Module):
    def __init__(self, width: int = 8, names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")) -> None:
        super().__init__()
        self.num_heads = 2
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (getattr(self, name)(x).unflatten(-1, (2, -1)).movedim(-2, -3) for name in self.names[:3])
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return getattr(self, self.names[3])(out.movedim(-3, -2).flatten(-2))


class Block(nn.Module):
    def __init__(self, width: int = 8, **kwargs) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width, **kwargs)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.ffn(self.norm(x))


class Unlisted(nn.Module):
    """A transformer nobody listed."""

    def __init__(self, depth: int = 3, **kwargs) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(**kwargs) for _ in range(depth))
        self.score = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.score(x.mean(1))


class TestHeads:
    @pytest.mark.parametrize("family", families.FAMILIES)
    def test_every_family_has_one(self, family):
        model = families.build(family)
        expected = HEADS.get(family, ["classifier"])
        assert find_task_heads(model) == expected
        peft_model = get_peft_model(model, S2ABiasConfig())
        wrapped = [n for n, m in peft_model.base_model.model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
        assert wrapped == expected
        assert find_task_heads(peft_model.base_model.model) == expected

    def test_finding_them_imports_no_other_models(self):
        """transformers' table of configurations imports eight hundred of them where somebody reads its values."""
        run_code("""
            import sys, transformers, zoo
            from peft_s2a.anatomy import find_task_heads

            def imported():
                return {name for name in sys.modules if name.startswith("transformers.models.")}

            model = transformers.LwDetrForObjectDetection(zoo.lw_detr())
            before = imported()
            assert "class_embed" in find_task_heads(model)
            assert imported() == before, imported() - before
        """)

    @pytest.mark.parametrize(
        "build",
        [
            lambda: families.build("vit").vit,
            lambda: families.build("dinov2").dinov2,
            lambda: families.build("swin").swin,
            lambda: families.build("resnet").resnet,
            lambda: families.build("dinov3").backbone,
            lambda: DINOv3ViTBackbone(families.build("dinov3").backbone.config),
            lambda: CLIPVisionModel(families.build("clip").config.vision_config),
            lambda: CLIPModel(families.build("clip").config),
            lambda: SiglipVisionModel(families.build("siglip").config.vision_config),
        ],
    )
    def test_a_bare_backbone_has_none(self, build):
        model = build()
        assert find_task_heads(model) == []
        config = get_peft_model(model, S2ABiasConfig()).peft_config["default"]
        assert config.modules_to_save == []

    def test_dense_prediction_heads(self):
        images = torch.randn(2, 3, 32, 32)
        model = upernet()
        assert find_task_heads(model) == ["decode_head", "auxiliary_head"]
        expected = model(images).logits
        model = get_peft_model(model, S2AConfig()).eval()
        with torch.no_grad():
            assert torch.equal(model(images).logits, expected)
        model.train()(images, labels=torch.zeros(2, 32, 32, dtype=torch.long)).loss.backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without

    def test_heads_of_several_feature_maps_are_no_place_for_a_ladder(self):
        model = upernet()
        before = snapshot(model)
        with pytest.raises(ValueError, match="`side_mode='residual'` instead of a ladder"):
            get_peft_model(model, S2ASideConfig(side_mode="ladder"))
        assert_untouched(model, before)


def upernet() -> UperNetForSemanticSegmentation:
    backbone = families.build("swin").config
    backbone.out_features = ["stem", "stage1", "stage2"]
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_channels=8, num_labels=3)
    return UperNetForSemanticSegmentation(config).eval().requires_grad_(False)


class TestDefaults:
    @pytest.mark.parametrize("family", TRANSFORMERS)
    def test_transformers_get_prompts_on_attention_and_sides_on_attention_and_mlps(self, family):
        model = families.build(family)
        attention = list(find_attention(model))
        mlps = [name for name in find_mlps(model) if name != "vision_model.head.mlp"]  # SigLIP's, which goes unused
        depth = len(find_blocks(model))
        assert len(attention) == len(mlps) == depth
        found = targets(model, S2AConfig())
        assert found["prompt"] == attention
        assert set(found["side"]) == {*attention, *mlps}

    @pytest.mark.parametrize("family", CONVOLUTIONAL)
    def test_convolutional_networks_get_an_input_prompt_and_sides_on_stages(self, family):
        model = families.build(family)
        first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
        blocks = find_stages(model)
        found = targets(model, S2AConfig())
        assert found["prompt"] == [first]
        assert found["side"] == (blocks if blocks and family != "convnext" else find_mlps(families.build(family)))

    @pytest.mark.parametrize(
        ("name", "blocks"),
        [
            ("resnet26", [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]),
            (
                "tf_efficientnet_lite0",
                [f"blocks.{s}.{b}" for s, n in enumerate((1, 2, 2, 3, 3, 4, 1)) for b in range(n)],
            ),
        ],
    )
    def test_timms_convolutional_networks_get_sides_on_the_blocks_of_their_stages(self, name, blocks):
        timm = pytest.importorskip("timm")
        assert targets(timm.create_model(name, num_classes=4), S2AConfig())["side"] == blocks

    def test_key_biases_are_left_out(self):
        found = targets(base_model(), S2ABiasConfig())["bias"]
        assert not any("k_proj" in name for name in found)
        assert any("q_proj" in name for name in found)

    def test_unused_parts_are_left_out(self):
        for family in ("clip", "siglip"):
            found = targets(families.build(family), S2AConfig())
            assert not any("text_model" in name for names in found.values() for name in names)

    def test_norm_scales_decide_about_norms_without_bias(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
        assert targets(model, S2ABiasConfig(train_norm_scale=True))["bias"] == ["0", "1"]
        model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
        assert targets(model, S2ABiasConfig(train_norm_scale=False))["bias"] == ["0"]

    def test_layers_of_nested_stages_count_by_the_first_index(self):
        found = targets(families.build("swin"), S2AConfig(layers_to_transform=[1]))
        assert found["prompt"] == [f"swin.encoder.layers.1.blocks.{i}.attention" for i in (0, 1)]
        assert all(name.startswith("swin.encoder.layers.1.") for names in found.values() for name in names)

    def test_a_model_without_a_place_names_structure_and_model(self):
        cases = [
            (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), S2ABiasConfig(), "'bias'"),
            (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), S2APromptConfig(), "'prompt'"),
            (nn.Sequential(nn.LayerNorm(4), nn.ReLU()), S2ASideConfig(), "'side'"),
            (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), S2ASideConfig(side_mode="ladder"), "'ladder'"),
        ]
        for model, config, structure in cases:
            before = snapshot(model)
            with pytest.raises(ValueError, match=f"{structure} has no place to go in Sequential"):
                get_peft_model(model, config)
            assert_untouched(model, before)
        with pytest.raises(ValueError, match=r"train without it: `structures=\('bias',\)`"):
            get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), S2AConfig(structures=("bias", "prompt")))

    def test_default_structures_without_a_place_are_left_out_and_logged(self, caplog):
        model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), S2AConfig())
        assert model.peft_config["default"].structure_targets == {"bias": ["0"], "side": ["0"]}
        assert [record.message for record in caplog.records] == [
            "Sequential has no place for prompt, and is adapted without. `target_modules` can name one."
        ]
        with pytest.raises(ValueError, match="has no place to go in Sequential"):
            get_peft_model(nn.Sequential(nn.ReLU()), S2AConfig())


class TestUnlistedModels:
    @pytest.mark.parametrize(
        "names",
        [
            ("q_proj", "k_proj", "v_proj", "out_proj"),
            ("to_q", "to_k", "to_v", "to_out"),
            ("query", "key", "value", "proj"),
        ],
    )
    def test_projections_are_known_by_their_usual_names(self, names):
        model = Unlisted(names=names)
        assert list(find_attention(model)) == [f"blocks.{i}.attn" for i in range(3)]
        assert find_mlps(model) == [f"blocks.{i}.ffn" for i in range(3)]
        assert find_blocks(model) == [f"blocks.{i}" for i in range(3)]
        assert find_task_heads(model) == ["score"]

    @pytest.mark.parametrize("config", [S2AConfig, lambda: S2ASideConfig(side_mode="ladder")])
    def test_they_train(self, config):
        torch.manual_seed(0)
        model = Unlisted().eval()
        x = torch.randn(4, 5, 8)
        expected = model(x)
        model = get_peft_model(model, config())
        assert torch.equal(model(x), expected)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
        assert model(x).square().mean() < loss

    def test_wrapped_layers_still_show_their_attributes(self):
        model = get_peft_model(Unlisted(), S2ABiasConfig()).base_model.model
        block = model.blocks[0]
        assert block.norm.eps == 1e-5 and block.norm.normalized_shape == (8,)
        assert block.ffn[0].in_features == 8 and block.ffn[0].weight.shape == (16, 8)
        with pytest.raises(AttributeError, match="no_such_attribute"):
            _ = block.norm.no_such_attribute


class TestNamedTargets:
    def test_each_structure_takes_what_it_can_serve(self):
        names = ["attention", "mlp", "fc1", "layernorm_before"]
        found = targets(base_model(), S2AConfig(target_modules=names))
        ends = {structure: {name.rpartition(".")[2] for name in found[structure]} for structure in found}
        assert ends == {
            "bias": {"fc1", "layernorm_before"},
            "prompt": {"attention"},
            "side": {"attention", "mlp", "fc1"},
        }

    def test_lists_of_modules_are_not_served(self):
        found = targets(base_model(), S2ASideConfig(target_modules=["layers", "mlp"]))
        assert {name.rpartition(".")[2] for name in found["side"]} == {"mlp"}

    def test_ladders_beside_named_blocks(self):
        found = targets(base_model(), S2ASideConfig(side_mode="ladder", target_modules=r"vit\.layers\.\d"))
        assert found["ladder"] == ["vit.layers.0", "vit.layers.1"]

    def test_the_error_names_the_structure_and_the_given_targets(self):
        with pytest.raises(ValueError, match=r"'prompt' has no place .* target_modules=\{'fc1'\}"):
            get_peft_model(base_model(), S2APromptConfig(target_modules=["fc1"]))
        with pytest.raises(ValueError, match="`exclude_modules` and `layers_to_transform` considered"):
            get_peft_model(base_model(), S2APromptConfig(layers_to_transform=[9]))

    def test_plain_modules(self):
        model = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.GELU(), nn.Conv1d(8, 8, 3, padding=1), nn.Flatten())
        found = targets(model, S2AConfig(structures=("bias", "side"), target_modules=["0", "2"]))
        assert found == {"bias": ["0", "2"], "side": ["0", "2"]}

    def test_a_module_that_returns_no_tensor_says_so(self):
        model = families.build("vit")
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"names 'vit', a ViTModel, .* single tensors.* `exclude_modules`"):
            get_peft_model(model, S2ASideConfig(target_modules=["vit"]))
        assert_untouched(model, before)


class TestRecordedTargets:
    @pytest.mark.parametrize("family", ["vit", "swinv2", "resnet", "timm_convnext"])
    @pytest.mark.parametrize("mode", ["residual", "ladder"])
    def test_they_can_be_read_off_the_weights(self, family, mode):
        structures = ("side",) if mode == "ladder" else ("bias", "prompt", "side")
        model = get_peft_model(families.build(family), S2AConfig(structures=structures, side_mode=mode))
        expected = dict(model.peft_config["default"].structure_targets)
        expected.pop("statistics", None)
        found = recorded_in(sorted(get_peft_model_state_dict(model.base_model.model)))
        assert {structure: set(names) for structure, names in found.items()} == {
            structure: set(names) for structure, names in expected.items()
        }

    def test_a_ladder_follows_the_model_whatever_the_recorded_order(self):
        model = families.build("vit")
        config = S2ASideConfig(side_mode="ladder", structure_targets={"ladder": ["vit.layers.1", "vit.layers.0"]})
        assert targets(model, config)["ladder"] == ["vit.layers.0", "vit.layers.1"]

    @pytest.mark.parametrize(
        ("config", "structure_targets", "message"),
        [
            (S2ABiasConfig, {"bias": ["encoder.layer.0"]}, "modules that ViTForImageClassification does not have"),
            (S2ABiasConfig, {"side": ["vit.layers.0.mlp"]}, "names 'side', but this configuration trains only"),
            (S2ASideConfig, {"ladder": ["vit.layers.0"]}, "names 'ladder'"),
            (S2ABiasConfig, {"bias": ["vit.layers.0.mlp"]}, "on 'vit.layers.0.mlp', a ViTMLP, which cannot carry it"),
            (S2APromptConfig, {"prompt": ["vit.layers.0.mlp"]}, "which cannot carry it"),
            (S2ASideConfig, {"side": ["vit.layers.0.layernorm_before"]}, "which cannot carry it"),
            (S2ABiasConfig, {"bias": ["vit.layernorm"], "statistics": ["vit.layernorm"]}, "which cannot carry it"),
        ],
    )
    def test_targets_that_do_not_fit_are_refused(self, config, structure_targets, message):
        model = base_model()
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, config(structure_targets=structure_targets))
        assert_untouched(model, before)

    def test_backbones_of_another_prefix_are_refused(self):
        config = get_peft_model(base_model(), S2ABiasConfig()).peft_config["default"]
        for build in (ViTModel, SwinModel):
            model = build(families.build(build.__name__.removesuffix("Model").lower()).config)
            with pytest.raises(ValueError, match="Use the base model that the adapter was trained with"):
                get_peft_model(model, config)
