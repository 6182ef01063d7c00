"""What PEFT's shared tests ask of every tuner, in our words, where `test_peft_api.py` does not have it."""

from __future__ import annotations

import copy

import families
import pytest
import torch
import zoo
from methods import S2A, assert_untouched, base_model, logits, make_config, snapshot, trainable
from peft import LoraConfig, PeftConfig, PeftModel, convert_to_lora, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import LwDetrForObjectDetection

from peft_s2a import S2ABiasConfig, S2AConfig, S2ASideConfig, quantize_activations
from peft_s2a.loading import check_tensors
from peft_s2a.tuners.bias import BiasLayer
from peft_s2a.tuners.model import S2AModel
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


class TestTransformersAdapters:
    def test_activations_are_quantised_as_the_active_one_wants(self):
        model = base_model()
        types, expected = {name: type(module) for name, module in model.named_modules()}, logits(model)

        def is_quantized() -> bool:
            return type(model.vit.layers[0]) is not types["vit.layers.0"]

        model.add_adapter(S2AConfig(), "first")
        model.add_adapter(S2ASideConfig(), "second")
        assert is_quantized()
        model.add_adapter(S2ASideConfig(activation_quantization=None), "third")
        assert not is_quantized()
        model.set_adapter("second")
        assert is_quantized()
        model.set_adapter("third")
        assert not is_quantized()
        model.set_adapter("first")
        model.delete_adapter("first")
        assert is_quantized() == (model.active_adapters() == ["second"])
        model.delete_adapter("second")
        assert not is_quantized()
        model.delete_adapter("third")
        assert torch.equal(logits(model), expected)
        for name in ("vit", "vit.layers.0", "vit.layers.0.mlp", "vit.layers.0.attention"):
            assert type(model.get_submodule(name)) is types[name]

    def test_activations_are_quantised_as_the_one_wants_that_was_loaded(self, tmp_path):
        options = {"modules_to_save": [], "target_modules": ["fc1"]}
        get_peft_model(base_model(), S2ABiasConfig(**options)).save_pretrained(tmp_path / "codes")
        plain = get_peft_model(base_model(), S2ABiasConfig(**options, activation_quantization=None))
        plain.save_pretrained(tmp_path / "plain")
        model = base_model()
        stock = type(model.vit.layers[0])
        for folder, is_stock in (("codes", False), ("plain", True)):
            model.load_adapter(tmp_path / folder, folder)
            assert model.active_adapters() == [folder] and (type(model.vit.layers[0]) is stock) == is_stock

    def test_what_a_user_has_set_stays_while_the_adapters_want_the_same(self):
        model = base_model()
        model.add_adapter(S2ABiasConfig(), "first")
        quantize_activations(model, {"bits": 8})
        model.set_adapter("first")
        assert model.vit.layers[0]._activation_settings.config.bits == 8

    @pytest.mark.parametrize("first", ["lora", "s2a"])
    def test_beside_lora(self, first):
        configs = {
            "lora": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[], init_lora_weights=False),
            "s2a": S2ABiasConfig(modules_to_save=[], init_weights=False, activation_quantization=None),
        }
        model = base_model()
        stock, found = logits(model), []
        for name in (first, "s2a" if first == "lora" else "lora"):
            model.add_adapter(configs[name], name)
            found.append(logits(model))
        assert not torch.equal(found[0], stock) and not torch.equal(found[1], found[0])

    def test_a_user_s_own_quantisation_stays(self):
        model = quantize_activations(base_model())
        quantized = type(model.vit.layers[0])
        model.add_adapter(S2ASideConfig(activation_quantization=None), "first")
        model.add_adapter(S2ASideConfig(activation_quantization=None), "second")
        model.set_adapter("first")
        assert type(model.vit.layers[0]) is quantized

    @every_s2a
    def test_heads_are_enabled_again(self, method):
        model = base_model()
        expected = logits(model)
        model.add_adapter(make_config(method))
        head = model.classifier.modules_to_save["default"]
        with torch.no_grad():
            head.weight.add_(1)
        trained = logits(model)
        assert not torch.allclose(trained, expected)
        model.disable_adapters()
        assert torch.equal(logits(model), expected)
        model.enable_adapters()
        assert torch.equal(logits(model), trained) and head.weight.requires_grad


class TestOneTrainsWholeWhatTheOtherAdapts:
    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (S2ABiasConfig(modules_to_save=[], target_modules=["classifier", "fc1"]), S2ABiasConfig()),
            (S2ABiasConfig(), S2ABiasConfig(modules_to_save=["layernorm"], target_modules=["fc1"])),
        ],
    )
    def test_the_second_is_refused(self, first, second):
        model = get_peft_model(base_model(), first)
        expected, before = logits(model), snapshot(model)
        with pytest.raises(
            ValueError, match=r"cannot be added: it trains '.*' in full, which the adapter 'default' adapts"
        ):
            model.add_adapter("second", second)
        assert_untouched(model, before, trainable_too=False)
        assert list(model.peft_config) == ["default"] and torch.equal(logits(model), expected)

    def test_in_the_other_order(self, tmp_path):
        get_peft_model(base_model(), S2ABiasConfig(modules_to_save=[])).save_pretrained(tmp_path)
        model = get_peft_model(base_model(), S2ABiasConfig(modules_to_save=["layernorm"], target_modules=["fc1"]))
        before = snapshot(model)
        with pytest.raises(ValueError, match="does not have"):  # a norm that can be seen no more
            model.load_adapter(tmp_path, "second")
        assert_untouched(model, before, trainable_too=False)


class SqueezeExcitation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.fc(x.mean((2, 3))).sigmoid()[..., None, None]


class WithSqueezeExcitation(nn.Module):
    """Its head's name is the ending of other layers' names, which PEFT would train whole too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.excitation = SqueezeExcitation()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.excitation(self.stem(x).relu()).mean((2, 3)))


class TestHeadsWithAmbiguousNames:
    def trained_whole(self, model: nn.Module) -> list[str]:
        return [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]

    def test_the_head_alone_is_trained_whole(self, tmp_path):
        base = WithSqueezeExcitation().eval()
        weights, images = copy.deepcopy(base.state_dict()), torch.randn(2, 3, 16, 16)
        model = get_peft_model(base, S2AConfig())
        assert self.trained_whole(model.base_model.model) == ["fc"]
        assert model.peft_config["default"].modules_to_save == ["^fc"]
        assert isinstance(base.excitation.fc, BiasLayer)
        assert {n for n, p in base.named_parameters() if p.requires_grad and n.startswith("fc.")} == {
            "fc.modules_to_save.default.weight",
            "fc.modules_to_save.default.bias",
        }
        torch.nn.init.normal_(base.fc.modules_to_save["default"].weight)
        model.add_adapter("second", S2AConfig())
        assert list(base.fc.modules_to_save) == ["default", "second"]
        assert not any(p.requires_grad for p in base.fc.modules_to_save["second"].parameters())
        expected = model(images)
        model.save_pretrained(tmp_path, selected_adapters=["default"])
        fresh = WithSqueezeExcitation().eval()
        fresh.load_state_dict(weights)
        loaded = PeftModel.from_pretrained(fresh, tmp_path)
        assert self.trained_whole(fresh) == ["fc"] and torch.equal(loaded(images), expected)
        merged = loaded.unload()
        assert merged.fc.__class__ is nn.Linear and merged.excitation.fc.__class__ is nn.Linear

    def test_lists_of_heads(self, tmp_path):
        """LW-DETR's `class_embed` is the ending of `enc_out_class_embed`, a list, which PEFT cannot train whole."""
        config = zoo.lw_detr()
        torch.manual_seed(0)
        base, images = LwDetrForObjectDetection(config).eval(), torch.randn(2, 3, 64, 64)
        weights, expected = copy.deepcopy(base.state_dict()), base(images).logits
        model = get_peft_model(base, S2AConfig()).eval()
        torch.testing.assert_close(model(images).logits, expected)
        assert "class_embed" in self.trained_whole(base)
        with torch.no_grad():
            base.class_embed.modules_to_save["default"].weight.add_(0.1)
        expected = model(images).logits
        model.save_pretrained(tmp_path)
        fresh = LwDetrForObjectDetection(config).eval()
        fresh.load_state_dict(weights)
        assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path)(images).logits, expected)
        fresh = LwDetrForObjectDetection(config).eval()
        fresh.load_state_dict(weights)
        fresh.load_adapter(tmp_path)
        assert torch.equal(fresh(images).logits, expected)

    @pytest.mark.parametrize(("name", "message"), [("^fcc", "has not"), ("^", "has not"), ("^list", "nobody calls")])
    def test_names_that_cannot_be_trained_leave_the_model_as_it_was(self, name, message):
        model = WithSqueezeExcitation()
        model.list = nn.ModuleList([nn.Linear(2, 2)])
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, S2AConfig(modules_to_save=["^fc", name]))
        assert_untouched(model, before)

    def test_an_injection_that_fails_takes_its_copies_of_heads_along(self, monkeypatch):
        base = WithSqueezeExcitation()
        model = get_peft_model(base, S2AConfig())

        def fail(*_) -> None:
            raise ValueError("not today")

        with monkeypatch.context() as patch:
            patch.setattr(S2AModel, "_freeze_statistics", fail)
            with pytest.raises(ValueError, match="not today"):
                model.add_adapter("second", S2AConfig())
        assert list(base.fc.modules_to_save) == ["default"] and base.fc.active_adapters == ["default"]
        assert all(p.requires_grad for p in base.fc.modules_to_save["default"].parameters())

    def test_an_adapter_that_is_loaded_for_inference_freezes_no_other(self, tmp_path):
        base = WithSqueezeExcitation()
        model = get_peft_model(base, S2AConfig())
        model.save_pretrained(tmp_path)
        before = trainable(model)
        model.load_adapter(tmp_path, "second")
        assert trainable(model) == before

    @pytest.mark.parametrize("name", ["dpt segmentation", "owlvit detection"])
    def test_a_second_adapter_trains_the_same_heads(self, name):
        model = get_peft_model(zoo.ZOO[name][0](), S2ABiasConfig(activation_quantization=None))
        model.add_adapter("second", S2ABiasConfig(activation_quantization=None))
        assert model.peft_config["second"].modules_to_save == model.peft_config["default"].modules_to_save
        model(**zoo.ZOO[name][1]())

    def test_files_change_no_other_module_of_such_a_name(self):
        with pytest.raises(ValueError, match="would change the base model"):
            check_tensors({"excitation.fc.weight": torch.zeros(8, 8)}, ["^fc"])
        check_tensors({"fc.weight": torch.zeros(5, 8)}, ["^fc"])


class TestMergingTiedParameters:
    @pytest.mark.parametrize("tied", ["bias", "module", "of the root"])
    def test_is_refused(self, tied):
        base = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        if tied == "bias":
            base[2].bias = base[0].bias
        elif tied == "of the root":
            base.shift = base[0].bias
        else:
            base.append(base[0])
        model = get_peft_model(base, S2ABiasConfig(target_modules=["0"], modules_to_save=[], init_weights=False))
        x = torch.randn(3, 4)
        expected = model(x)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=r"share a parameter"):
                merge()
        torch.testing.assert_close(model(x), expected)

    def test_of_others_does_not_matter(self):
        base = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        base[2].weight = base[0].weight
        model = get_peft_model(base, S2ABiasConfig(target_modules=["0"], modules_to_save=[], init_weights=False))
        x = torch.randn(3, 4)
        expected = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), expected)


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
