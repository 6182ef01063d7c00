"""What PEFT's shared tests ask of every tuner, in our words, where `test_peft_api.py` does not have it."""

from __future__ import annotations

import families
import pytest
import torch
from methods import S2A, assert_untouched, base_model, logits, make_config, snapshot
from peft import PeftConfig, PeftModel, convert_to_lora, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from peft_s2a import S2ABiasConfig, S2AConfig, S2ASideConfig, restore_activations
from peft_s2a.tuners.bias import BiasLayer
from peft_s2a.tuners.side import SideLayer


every_s2a = pytest.mark.parametrize("method", S2A)


@every_s2a
def test_a_configuration_that_is_passed_to_from_pretrained_is_the_adapters(method, tmp_path):
    model = get_peft_model(base_model(), make_config(method, random_start=True))
    model.save_pretrained(tmp_path)
    for config in (make_config(method), PeftConfig.from_pretrained(tmp_path)):
        loaded = PeftModel.from_pretrained(base_model(), tmp_path, config=config)
        assert loaded.peft_config["default"] is config
        assert loaded.base_model.peft_config["default"] is config
        assert config.structure_targets == model.peft_config["default"].structure_targets
        assert torch.equal(logits(loaded), logits(model))
        named = PeftModel.from_pretrained(base_model(), tmp_path, "mine", config=config)
        assert named.peft_config["mine"] is config and torch.equal(logits(named), logits(model))


def test_widths_of_layers():
    model = get_peft_model(
        families.build("plain_cnn"), S2AConfig(target_modules=["stage1.0", "head"], modules_to_save=[])
    )
    layer = model.base_model.model.stage1[0]
    assert isinstance(layer, BiasLayer) and (layer.in_features, layer.out_features) == (8, 16)
    assert (layer.side_adapter.in_features, layer.side_adapter.out_features) == (8, 16)
    assert (model.base_model.model.head.in_features, model.base_model.model.head.out_features) == (32, 5)
    model = get_peft_model(base_model(), S2AConfig())
    sides = [module for module in model.modules() if isinstance(module, SideLayer)]
    assert sides and all((side.in_features, side.out_features) == (32, 32) for side in sides)
    norm = model.base_model.model.vit.layernorm
    assert isinstance(norm, BiasLayer) and not hasattr(norm, "in_features")


@every_s2a
def test_names_of_parameters_can_be_joined(method):
    model = get_peft_model(base_model(), make_config(method))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        assert isinstance(layer.adapter_layer_names + layer.other_param_names, tuple)
    model.add_adapter("second", make_config(method))
    model.delete_adapter("second")
    for layer in layers:
        for name in layer.adapter_layer_names + layer.other_param_names:
            assert "second" not in getattr(layer, name)


class TestStructuresNobodyAskedFor:
    """On a model without attention, with targets that were named."""

    def test_those_without_a_place_are_left_out(self):
        model = get_peft_model(families.build("plain_cnn"), S2AConfig(target_modules=["stage1.0"]))
        assert model.peft_config["default"].structure_targets.keys() == {"bias", "side", "statistics"}
        model = get_peft_model(base_model(), S2AConfig(target_modules=["fc1"]))
        assert model.peft_config["default"].structure_targets.keys() >= {"bias", "side"}
        assert not model.peft_config["default"].structure_targets.get("prompt")

    def test_those_asked_for_are_not(self):
        model = families.build("plain_cnn")
        before = snapshot(model)
        with pytest.raises(NoMatchingPeftModuleError, match="'prompt' has no place to go"):
            get_peft_model(model, S2AConfig(structures=("bias", "prompt"), target_modules=["stage1.0"]))
        assert_untouched(model, before)

    def test_targets_that_carry_nothing_are_refused(self):
        with pytest.raises(NoMatchingPeftModuleError, match="has no place to go"):
            get_peft_model(families.build("plain_cnn"), S2AConfig(target_modules=["stage1.2"]))


class TestTransformersDeleteAdapter:
    def test_activations_are_restored_with_the_last_adapter_that_wants_them_quantised(self, monkeypatch):
        restored = []

        def restore(model: nn.Module) -> nn.Module:
            restored.append(model)
            return restore_activations(model)

        monkeypatch.setattr("peft_s2a.loading.restore_activations", restore)
        model = base_model()
        types, expected = {name: type(module) for name, module in model.named_modules()}, logits(model)
        model.add_adapter(S2AConfig(), "first")
        model.add_adapter(S2ASideConfig(), "second")
        model.add_adapter(S2ASideConfig(activation_quantization=None), "third")
        model.delete_adapter("first")
        assert restored == []
        model.delete_adapter("second")
        assert len(restored) == 1 and restored[0] is model
        model.delete_adapter("third")
        assert torch.equal(logits(model), expected)
        for name in ("vit", "vit.layers.0", "vit.layers.0.mlp", "vit.layers.0.attention"):
            assert type(model.get_submodule(name)) is types[name]


class TestWeightedSums:
    def bias_adapters(self, **kwargs) -> PeftModel:
        options = {"modules_to_save": [], "activation_quantization": None, "init_weights": False}
        model = get_peft_model(base_model(), S2ABiasConfig(**{**options, **kwargs}))
        model.add_adapter(
            "fewer", S2ABiasConfig(**options, target_modules=["fc1", "layernorm"], train_norm_scale=False)
        )
        return model

    def test_of_biases(self, tmp_path):
        model = self.bias_adapters()
        model.add_weighted_adapter(["default", "fewer"], [0.5, -2.0], "sum")
        for layer in (module for module in model.modules() if isinstance(module, BiasLayer)):
            for parameters in (layer.s2a_bias, layer.s2a_scale):
                if "sum" in parameters:
                    terms = [
                        w * parameters[name] for name, w in (("default", 0.5), ("fewer", -2.0)) if name in parameters
                    ]
                    torch.testing.assert_close(parameters["sum"], sum(terms))
                assert ("sum" in parameters) == ("default" in parameters or "fewer" in parameters)
        model.set_adapter("sum")
        expected = logits(model)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path / "sum")), expected)

    def test_of_one_adapter_is_that_adapter(self):
        model = self.bias_adapters()
        expected = logits(model)
        model.add_weighted_adapter(["default"], [1.0], "same")
        assert torch.equal(logits(model), expected)
        model.set_adapter("same")
        assert torch.equal(logits(model), expected)

    @pytest.mark.parametrize("method", ["s2a", "s2a_side", "s2a_bias"])
    def test_of_others_are_refused(self, method):
        model = get_peft_model(base_model(), make_config(method))  # biases too: the head is trained whole
        before = snapshot(model)
        with pytest.raises(ValueError, match="holds more than biases"):
            model.add_weighted_adapter(["default"], [1.0], "sum")
        assert_untouched(model, before, trainable_too=False)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["default"], [1.0], "fewer"), "which the model has already"),
            ((["default"], [1.0, 2.0], "sum"), "one number for each"),
            ((["another"], [1.0], "sum"), "names 'another', but the model has default, fewer"),
        ],
    )
    def test_wrong_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            self.bias_adapters().add_weighted_adapter(*arguments)


class TestWhatPeftOffersLoraAlone:
    """PEFT itself says so, and nothing is changed."""

    @every_s2a
    def test_it_is_refused(self, method, tmp_path):
        model = get_peft_model(base_model(), make_config(method, random_start=True))
        model.save_pretrained(tmp_path)
        expected = logits(model)
        assert not model.supports_lora_conversion()
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            convert_to_lora(model, rank=4)
        with (
            pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
            rescale_adapter_scale(model, 0.5),
        ):
            pass
        with pytest.raises(ValueError, match="only supports LORA"):
            hotswap_adapter(model, str(tmp_path), "default")
        assert torch.equal(logits(model), expected)
