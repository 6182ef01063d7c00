"""What a PEFT user does with LoRA works with S2A: the same calls, run over LoRA as the reference and S2A's tuners."""

from __future__ import annotations

import copy
import pickle
import warnings

import families
import pytest
import torch
from methods import (
    LABELS,
    MERGEABLE,
    METHODS,
    S2A,
    assert_untouched,
    base_model,
    hooks,
    logits,
    make_config,
    snapshot,
    train_a_little,
    trainable,
)
from peft import (
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn

from peft_s2a import ActivationQuantizationConfig, S2ABiasConfig, S2AConfig, S2AModel, S2ASideConfig
from peft_s2a.tuners.layer import AttachedLayer


every_method = pytest.mark.parametrize("method", METHODS)
every_s2a = pytest.mark.parametrize("method", S2A)
mergeable = pytest.mark.parametrize("method", MERGEABLE)


def randomise_classifier(model: nn.Module) -> None:
    """Makes the trained copy of the classifier differ from the base model's."""
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)


class TestStart:
    @every_method
    def test_output_is_the_base_models_at_the_start(self, method):
        base = base_model()
        expected = logits(base)
        assert torch.equal(logits(get_peft_model(base, make_config(method))), expected)

    @every_method
    def test_init_weights_false_starts_elsewhere(self, method):
        base = base_model()
        expected = logits(base)
        assert not torch.allclose(logits(get_peft_model(base, make_config(method, random_start=True))), expected)

    @every_method
    def test_only_the_adapter_and_the_head_are_trained(self, method):
        model = get_peft_model(base_model(), make_config(method))
        own = "lora_" if method == "lora" else "s2a_"
        assert all(own in name or "modules_to_save.default" in name for name in trainable(model))
        assert any("classifier.modules_to_save.default" in name for name in trainable(model))

    @every_method
    def test_training_changes_nothing_of_the_base_model(self, method):
        base = base_model()
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        model = get_peft_model(base, make_config(method))
        losses = train_a_little(model)
        assert losses[-1] < losses[0]
        after = model.unload().state_dict()
        changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
        assert changed == {"classifier.weight", "classifier.bias"}  # PEFT's unload leaves the trained head

    @every_method
    def test_print_trainable_parameters_counts_what_requires_grad(self, method, capsys):
        model = get_peft_model(base_model(), make_config(method))
        model.print_trainable_parameters()
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert f"trainable params: {count:,d}" in capsys.readouterr().out

    @every_method
    def test_get_base_model_is_the_model_that_was_passed(self, method):
        base = base_model()
        assert get_peft_model(base, make_config(method)).get_base_model() is base

    @pytest.mark.parametrize("method", [method for method in S2A if method != "s2a_linear"])  # names a ViT's modules
    def test_one_configuration_serves_several_models(self, method):
        config = make_config(method)
        untouched = config.to_dict()
        get_peft_model(base_model(), config)
        model = get_peft_model(families.build("dinov2"), config)
        assert {key: value for key, value in config.to_dict().items() if key != "base_model_name_or_path"} == {
            key: value for key, value in untouched.items() if key != "base_model_name_or_path"
        }
        assert all(
            name.startswith("dinov2.") or name == "classifier"
            for names in model.peft_config["default"].structure_targets.values()
            for name in names
        )


class TestSeveralAdapters:
    @every_method
    def test_a_new_adapter_is_inactive_until_it_is_set(self, method):
        model = get_peft_model(base_model(), make_config(method, random_start=True), adapter_name="first")
        with_a = logits(model)
        model.add_adapter("second", make_config(method, random_start=True))
        assert torch.equal(logits(model), with_a)
        assert not any(".second" in name for name in trainable(model))
        model.set_adapter("second")
        assert not torch.allclose(logits(model), with_a)
        assert trainable(model) and all(".second" in name for name in trainable(model))
        model.set_adapter("first")
        assert torch.equal(logits(model), with_a)

    @every_method
    def test_two_active_adapters_add_up(self, method):
        # `modules_to_save` allows only one active adapter.
        model = get_peft_model(base_model(), make_config(method, random_start=True, modules_to_save=[]), "first")
        model.add_adapter("second", make_config(method, random_start=True, modules_to_save=[]))
        alone = {}
        for name in ("first", "second"):
            model.set_adapter(name)
            alone[name] = logits(model)
        model.base_model.set_adapter(["first", "second"])
        both = logits(model)
        assert not torch.allclose(both, alone["first"]) and not torch.allclose(both, alone["second"])
        assert {name.rsplit(".", 1)[-1] for name in trainable(model)} <= {"first", "second", "weight"}

    @every_s2a
    def test_mixed_batches_are_refused(self, method):
        model = get_peft_model(base_model(), make_config(method))
        with pytest.raises(ValueError, match="split the batch by adapter"):
            model(pixel_values=families.batch("vit")[0], adapter_names=["default"] * 4)

    @every_method
    def test_disable_adapter_gives_the_base_models_output(self, method):
        base = base_model()
        expected = logits(base)
        model = get_peft_model(base, make_config(method, random_start=True))
        randomise_classifier(model)
        adapted = logits(model)
        before = trainable(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), adapted)
        assert trainable(model) == before

    @every_method
    def test_adding_the_same_name_again_raises(self, method):
        model = get_peft_model(base_model(), make_config(method))
        with pytest.raises(ValueError, match="already exists"):
            model.add_adapter("default", make_config(method))

    @every_s2a
    def test_another_peft_type_raises_and_leaves_the_model_alone(self, method):
        model = get_peft_model(base_model(), make_config(method, random_start=True))
        expected = logits(model)
        with pytest.raises(ValueError, match="Cannot combine adapters"):
            model.add_adapter("other", make_config("lora"))
        assert torch.equal(logits(model), expected) and list(model.peft_config) == ["default"]

    @every_method
    def test_delete_an_inactive_adapter(self, method):
        model = get_peft_model(base_model(), make_config(method, random_start=True), "first")
        model.add_adapter("second", make_config(method))
        with_a = logits(model)
        model.delete_adapter("second")
        assert list(model.peft_config) == ["first"]
        assert not [name for name, _ in model.named_parameters() if ".second" in name]
        assert torch.equal(logits(model), with_a)

    @every_method
    def test_delete_the_active_adapter_activates_another(self, method):
        model = get_peft_model(base_model(), make_config(method, random_start=True), "first")
        model.add_adapter("second", make_config(method, random_start=True))
        with_a = logits(model)
        model.set_adapter("second")
        with pytest.warns(UserWarning, match="second was active which is now deleted"):
            model.delete_adapter("second")
        assert model.active_adapters == ["first"]
        assert torch.equal(logits(model), with_a)

    @every_method
    def test_delete_the_last_adapter_gives_the_base_models_output(self, method):
        base = base_model()
        expected = logits(base)
        model = get_peft_model(base, make_config(method, random_start=True, modules_to_save=[]))
        model.delete_adapter("default")
        assert not model.peft_config
        assert torch.equal(logits(base), expected)
        model.add_adapter("again", make_config(method, random_start=True, modules_to_save=[]))
        model.set_adapter("again")
        assert not torch.allclose(logits(model), expected)

    @every_method
    def test_delete_an_unknown_adapter_raises(self, method):
        model = get_peft_model(base_model(), make_config(method))
        with pytest.raises(ValueError, match="does not exist"):
            model.delete_adapter("unknown")

    def test_adapters_on_other_structures_of_the_same_modules(self):
        base = base_model()
        expected = logits(base)
        kwargs = {"target_modules": ["fc1", "fc2", "attention"], "init_weights": False, "modules_to_save": []}
        model = get_peft_model(base, S2AConfig(structures=("bias",), **kwargs), "bias")
        for structure in ("side", "prompt"):
            model.add_adapter(structure, S2AConfig(structures=(structure,), **kwargs))
        outputs = {}
        for name in ("bias", "side", "prompt"):
            model.set_adapter(name)
            outputs[name] = logits(model)
            assert all(name in parameter for parameter in trainable(model))
        for name in ("bias", "side", "prompt"):
            fresh = get_peft_model(base_model(), S2AConfig(structures=(name,), **kwargs))
            set_peft_model_state_dict(fresh, get_peft_model_state_dict(model, adapter_name=name))
            assert torch.equal(logits(fresh), outputs[name])
        model.delete_adapter("side")
        model.set_adapter("prompt")
        assert torch.equal(logits(model), outputs["prompt"])
        assert torch.equal(logits(model.unload()), expected)

    def test_a_residual_adapter_beside_a_ladder(self):
        model = get_peft_model(base_model(), make_config("s2a_ladder", random_start=True), "ladder")
        with_ladder = logits(model)
        model.add_adapter("residual", S2AConfig(init_weights=False))
        assert torch.equal(logits(model), with_ladder)
        model.set_adapter("residual")
        alone = get_peft_model(base_model(), S2AConfig())
        set_peft_model_state_dict(alone, get_peft_model_state_dict(model, adapter_name="residual"))
        assert torch.equal(logits(model), logits(alone))

    def test_two_ladders_of_different_heights(self):
        model = get_peft_model(base_model(), make_config("s2a_ladder", random_start=True), "whole")
        with_whole = logits(model)
        model.add_adapter("low", make_config("s2a_ladder", random_start=True, layers_to_transform=[0]))
        assert torch.equal(logits(model), with_whole)
        model.set_adapter("low")
        fresh = get_peft_model(base_model(), make_config("s2a_ladder", layers_to_transform=[0]))
        set_peft_model_state_dict(fresh, get_peft_model_state_dict(model, adapter_name="low"))
        assert torch.equal(logits(model), logits(fresh))


class TestAdapterNames:
    @pytest.mark.parametrize("name", ["my-adapter", "déjà vu", "1", "q_proj"])
    @every_method
    def test_odd_names_save_and_load(self, method, name, tmp_path):
        model = get_peft_model(base_model(), make_config(method, random_start=True), adapter_name=name)
        expected = logits(model)
        model.save_pretrained(tmp_path)
        folder = tmp_path / name
        loaded = PeftModel.from_pretrained(base_model(), folder, adapter_name=name)
        assert torch.equal(logits(loaded), expected)
        assert torch.equal(logits(PeftModel.from_pretrained(base_model(), folder, adapter_name="other")), expected)

    @pytest.mark.parametrize("name", ["with.dot", "keys"])
    @every_s2a
    def test_names_that_torch_refuses_leave_the_model_as_it_was(self, method, name):
        base = base_model()
        before = snapshot(base)
        with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
            get_peft_model(base, make_config(method), adapter_name=name)
        assert_untouched(base, before)

    @pytest.mark.parametrize("name", ["with.dot", "keys"])
    @every_s2a
    def test_refused_names_leave_other_adapters_alone(self, method, name):
        model = get_peft_model(base_model(), make_config(method, random_start=True))
        before, expected = snapshot(model), logits(model)
        with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
            model.add_adapter(name, make_config(method))
        assert_untouched(model, before, trainable_too=False)
        assert trainable(model) == before["trainable"]
        assert list(model.peft_config) == ["default"]
        assert torch.equal(logits(model), expected)

    @pytest.mark.parametrize(("name", "other"), [("0", "1"), ("vit", "mlp"), ("classifier", "x"), ("weight", "bias")])
    def test_beside_others_names_of_modules_cannot_be_saved(self, name, other, tmp_path):
        model = get_peft_model(base_model(), make_config("s2a"), adapter_name=name)
        model.add_adapter(other, make_config("s2a"))
        with pytest.raises(ValueError, match="cannot be saved beside one called"):
            model.save_pretrained(tmp_path)
        if name in ("classifier", "weight"):  # PEFT cannot save these even alone
            return
        model.delete_adapter(other)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path / name, name)), logits(model))


class TestQuantisation:
    """Activations are quantised as the active adapter wants, whichever was added last."""

    @staticmethod
    def bits(model):
        settings = [m._activation_settings for m in model.modules() if hasattr(m, "_activation_settings")]
        return {s.config.bits for s in settings}

    def test_follows_the_active_adapter(self):
        model = get_peft_model(base_model(), S2AConfig(activation_quantization={"bits": 8}), adapter_name="one")
        model.add_adapter("two", S2AConfig(activation_quantization={"bits": 2}))
        assert self.bits(model) == {8}
        model.set_adapter("two")
        assert self.bits(model) == {2}
        model.set_adapter("one")
        model.delete_adapter("two")
        assert self.bits(model) == {8}

    def test_is_not_left_by_an_injection_that_fails(self, monkeypatch):
        def fail(*_):
            raise ValueError("no ladder here")

        monkeypatch.setattr(S2AModel, "_freeze_statistics", fail)
        base = base_model()
        with pytest.raises(ValueError, match="no ladder here"):
            get_peft_model(base, S2AConfig())
        assert self.bits(base) == set()

    def test_is_none_where_the_active_adapter_wants_none(self, tmp_path):
        get_peft_model(base_model(), S2AConfig()).save_pretrained(tmp_path)
        model = get_peft_model(base_model(), S2AConfig(activation_quantization=None), adapter_name="one")
        model.load_adapter(tmp_path, "two")
        assert self.bits(model) == set()
        model.set_adapter("two")
        assert self.bits(model) == {4}
        model.set_adapter("one")
        assert self.bits(model) == set()


def assert_equal_but_for_rounding(found, expected):
    """Merged weights add up in another order, by how much other depends on the processor."""
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class TestMerging:
    @mergeable
    def test_merge_and_unload_keeps_the_output(self, method):
        base = base_model()
        classes = [type(module) for module in base.modules()]
        model = get_peft_model(base, make_config(method, random_start=True))
        randomise_classifier(model)
        expected = logits(model)
        merged = model.merge_and_unload()
        assert_equal_but_for_rounding(logits(merged), expected)
        assert [type(module) for module in merged.modules()] == classes
        assert hooks(merged) == 0 and not hasattr(merged, "peft_config")

    @mergeable
    def test_merge_and_unmerge_are_inverse(self, method):
        model = get_peft_model(base_model(), make_config(method, random_start=True, modules_to_save=[]))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = logits(model)
        model.merge_adapter()
        assert_equal_but_for_rounding(logits(model), expected)
        assert get_model_status(model).merged_adapters == ["default"]
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert changed and all("base_layer" in name for name in changed)
        model.unmerge_adapter()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name])
        assert_equal_but_for_rounding(logits(model), expected)

    @mergeable
    def test_disabling_a_merged_adapter_unmerges_it(self, method):
        base = base_model()
        expected = logits(base)
        model = get_peft_model(base, make_config(method, random_start=True))
        model.merge_adapter()
        with model.disable_adapter():
            assert_equal_but_for_rounding(logits(model), expected)

    @mergeable
    def test_setting_another_adapter_unmerges(self, method):
        model = get_peft_model(base_model(), make_config(method, random_start=True), "first")
        model.add_adapter("second", make_config(method, random_start=True))
        model.set_adapter("second")
        with_b = logits(model)
        model.set_adapter("first")
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging"):
            model.set_adapter("second")
        assert_equal_but_for_rounding(logits(model), with_b)

    @mergeable
    def test_merging_twice_warns_and_changes_nothing(self, method):
        model = get_peft_model(base_model(), make_config(method, random_start=True))
        model.merge_adapter()
        expected = logits(model)
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        assert torch.equal(logits(model), expected)

    @mergeable
    def test_merge_named_adapters_only(self, method):
        model = get_peft_model(base_model(), make_config(method, random_start=True), "first")
        model.add_adapter("second", make_config(method, random_start=True))
        model.set_adapter("second")
        expected = logits(model)
        merged = model.merge_and_unload(adapter_names=["second"])
        assert_equal_but_for_rounding(logits(merged), expected)

    @mergeable
    def test_safe_merge_refuses_nan(self, method):
        model = get_peft_model(base_model(), make_config(method, random_start=True))
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "lora_B" in n or "s2a_bias" in n).fill_(torch.nan)
        with pytest.raises(ValueError, match="NaN"):
            model.merge_and_unload(safe_merge=True)

    @mergeable
    def test_a_merged_adapter_cannot_be_deleted(self, method):
        model = get_peft_model(base_model(), make_config(method))
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged"):
            model.delete_adapter("default")

    @pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
    @pytest.mark.parametrize("method", [method for method in S2A if method not in MERGEABLE])
    def test_what_cannot_be_merged_says_why_and_changes_nothing(self, method, call):
        model = get_peft_model(base_model(), make_config(method, random_start=True))
        before, expected = snapshot(model), logits(model)
        with pytest.raises(ValueError, match=r"cannot be merged. Keep the adapter separate, or"):
            getattr(model, call)()
        assert_untouched(model, before, trainable_too=False)
        assert torch.equal(logits(model), expected)

    @every_method
    def test_unload_takes_everything_off(self, method):
        base = base_model()
        before = snapshot(base)
        unloaded = get_peft_model(base, make_config(method, random_start=True)).unload()
        assert unloaded is base
        assert_untouched(base, before, trainable_too=False)
        assert not hasattr(base, "peft_config")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            get_peft_model(base, make_config(method))


class TestTargets:
    @pytest.mark.parametrize("method", ["lora", "s2a_bias", "s2a_linear"])
    @pytest.mark.parametrize(
        ("kwargs", "expected"),
        [
            ({"target_modules": ["fc1"]}, {"layers.0.mlp.fc1", "layers.1.mlp.fc1"}),
            ({"target_modules": "fc1"}, {"layers.0.mlp.fc1", "layers.1.mlp.fc1"}),
            ({"target_modules": r".*\.0\..*\.(fc1|q_proj)"}, {"layers.0.mlp.fc1", "layers.0.attention.q_proj"}),
            ({"target_modules": ["fc1"], "layers_to_transform": 1}, {"layers.1.mlp.fc1"}),
            ({"target_modules": ["fc1"], "layers_to_transform": [0]}, {"layers.0.mlp.fc1"}),
            (
                {"target_modules": ["fc1"], "layers_to_transform": [0], "layers_pattern": "layers"},
                {"layers.0.mlp.fc1"},
            ),
            ({"target_modules": ["fc1", "fc2"], "exclude_modules": ["fc2"]}, {"layers.0.mlp.fc1", "layers.1.mlp.fc1"}),
            ({"target_modules": ["fc1"], "exclude_modules": r".*\.0\..*"}, {"layers.1.mlp.fc1"}),
            (
                {"target_modules": "all-linear"},
                {
                    f"layers.{i}.{name}"
                    for i in (0, 1)
                    for name in (
                        "mlp.fc1",
                        "mlp.fc2",
                        *(f"attention.{projection}_proj" for projection in "qkvo"),
                    )
                },
            ),
        ],
    )
    def test_names_select_the_same_modules_as_for_lora(self, method, kwargs, expected):
        config = make_config(method, **kwargs)
        if isinstance(config.target_modules, str) and config.target_modules == "fc1":
            config.target_modules = r".*fc1"
        model = get_peft_model(base_model(), config)
        assert {name.removeprefix("vit.") for name in model.base_model.targeted_module_names} == expected

    @pytest.mark.parametrize("method", ["lora", "s2a_bias", "s2a_side"])
    @pytest.mark.parametrize(
        "kwargs",
        [
            {"target_modules": ["no_such_module"]},
            {"target_modules": r".*no_such_module"},
            {"target_modules": ["fc1"], "layers_to_transform": [7]},
            {"target_modules": ["fc1"], "exclude_modules": ["fc1"]},
        ],
    )
    def test_no_match_raises_and_leaves_the_model_as_it_was(self, method, kwargs):
        base = base_model()
        before = snapshot(base)
        with pytest.raises(ValueError, match=r"(?i)not found|no modules|all modules|excluded"):
            get_peft_model(base, make_config(method, **kwargs))
        assert_untouched(base, before)

    @pytest.mark.parametrize("method", ["lora", "s2a_bias", "s2a_side"])
    def test_all_linear_is_the_same_for_a_second_adapter(self, method):
        model = get_peft_model(base_model(), make_config(method, target_modules="all-linear"), "first")
        model.add_adapter("second", make_config(method, target_modules="all-linear"))
        shapes = [
            {k: v.shape for k, v in get_peft_model_state_dict(model, adapter_name=name).items()}
            for name in ("first", "second")
        ]
        assert shapes[0] == shapes[1]

    @every_s2a
    def test_default_targets_are_the_same_for_a_second_adapter(self, method):
        model = get_peft_model(base_model(), make_config(method), "first")
        model.add_adapter("second", make_config(method))
        assert model.peft_config["first"].structure_targets == model.peft_config["second"].structure_targets
        shapes = [
            {k: v.shape for k, v in get_peft_model_state_dict(model, adapter_name=name).items()}
            for name in ("first", "second")
        ]
        assert shapes[0] == shapes[1]

    @every_s2a
    def test_default_targets_heed_layers_and_exclusions(self, method):
        config = make_config(method, layers_to_transform=[1], exclude_modules=["fc2"])
        model = get_peft_model(base_model(), config)
        names = {name for names in model.peft_config["default"].structure_targets.values() for name in names}
        assert names and all(name.startswith("vit.layers.1") and not name.endswith("fc2") for name in names)

    @every_method
    def test_modules_to_save_can_be_none_or_others(self, method):
        model = get_peft_model(base_model(), make_config(method, modules_to_save=[]))
        assert not any("modules_to_save" in name for name in trainable(model))
        model = get_peft_model(base_model(), make_config(method, modules_to_save=["layernorm"]))
        saved = {name.split(".modules_to_save")[0] for name in trainable(model) if "modules_to_save" in name}
        assert saved == {"base_model.model.vit.layernorm"}


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @every_method
    def test_half_precision_bases(self, method, dtype):
        base = base_model().to(dtype)
        images = families.batch("vit")[0].to(dtype)
        with torch.no_grad():
            expected = base(images).logits
            model = get_peft_model(base, make_config(method))
            adapter = [p for n, p in model.named_parameters() if "lora_" in n or "s2a_" in n]
            assert {parameter.dtype for parameter in adapter} == {torch.float32}
            assert torch.equal(model(images).logits, expected)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loss = nn.functional.cross_entropy(model(images).logits, LABELS)
        loss.backward()
        optimizer.step()
        assert nn.functional.cross_entropy(model(images).logits, LABELS) < loss

    @every_method
    def test_autocast_adapter_dtype_false_keeps_the_bases_dtype(self, method):
        model = get_peft_model(base_model().bfloat16(), make_config(method), autocast_adapter_dtype=False)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        model(families.batch("vit")[0].bfloat16()).logits.sum().backward()

    @every_method
    def test_half_precision_saves_and_loads(self, method, tmp_path):
        images = families.batch("vit")[0].bfloat16()
        model = get_peft_model(base_model().bfloat16(), make_config(method, random_start=True)).eval()
        model.save_pretrained(tmp_path)
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(base_model().bfloat16(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            with torch.no_grad():
                assert torch.equal(loaded(images).logits, model(images).logits)

    @every_method
    def test_autocast_keeps_the_base_models_output_at_the_start(self, method):
        base = base_model()
        with torch.autocast("cpu", torch.bfloat16):
            expected = logits(base)
            model = get_peft_model(base, make_config(method))
            assert torch.equal(logits(model), expected)
            model.train()
            nn.functional.cross_entropy(families.logits(model, families.batch("vit")[0]), LABELS).backward()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}

    @every_method
    def test_dtype_moves(self, method):
        model = get_peft_model(base_model(), make_config(method, random_start=True))
        expected = logits(model)
        with torch.no_grad():
            actual = model.double()(families.batch("vit")[0].double()).logits
        torch.testing.assert_close(actual.float(), expected, rtol=1e-4, atol=1e-5)


class TestCopiesAndCompilation:
    @every_method
    def test_deepcopy_is_independent(self, method):
        model = get_peft_model(base_model(), make_config(method, random_start=True))
        expected = logits(model)
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), expected)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if "lora_" in name or "s2a_" in name:
                    parameter.mul_(2)
        assert torch.equal(logits(model), expected)
        assert not torch.allclose(logits(twin), expected)
        assert hooks(twin.unload()) == 0
        assert torch.equal(logits(model), expected)

    @every_s2a
    def test_deepcopy_and_pickle_after_an_interrupted_pass(self, method):
        model = get_peft_model(base_model(), make_config(method, random_start=True)).train()
        expected = logits(model)

        def interrupt(*_):
            raise KeyboardInterrupt

        hook = model.get_submodule("base_model.model.vit.layers.1.attention.v_proj").register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            families.logits(model, families.batch("vit")[0])
        hook.remove()
        families.logits(model, families.batch("vit")[0])
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(twin), expected)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @every_method
    def test_gradient_checkpointing_gives_the_same_gradients(self, method, use_reentrant):
        images, labels = families.batch("vit")
        gradients = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            base = base_model()
            if checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model = get_peft_model(base, make_config(method, random_start=True)).train()
            assert base.is_gradient_checkpointing == checkpointing
            for _ in range(2):  # the second pass must not see anything of the first
                model.zero_grad()
                nn.functional.cross_entropy(model(pixel_values=images).logits, labels).backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert gradients[0].keys() == gradients[1].keys()
        for name, expected in gradients[0].items():
            assert expected is not None and gradients[1][name] is not None, name
            torch.testing.assert_close(gradients[1][name], expected)

    @pytest.mark.parametrize("method", ["s2a_prompt", "s2a_side", "s2a_ladder", "s2a_linear"])
    def test_replicas_of_data_parallel_are_refused(self, method):
        # Replicas are made on devices; this is how torch makes one of a module, without its children.
        model = get_peft_model(base_model(), make_config(method))
        hosts = {m.get_base_layer() for m in model.modules() if isinstance(m, AttachedLayer) and m.adapter_layer_names}
        assert hosts
        for host in hosts:
            with pytest.raises(RuntimeError, match="accelerate launch"):
                host._replicate_for_data_parallel()(torch.randn(1, 5, 32))

    def test_a_ladder_without_a_head_refuses_gradient_checkpointing(self):
        base = base_model().vit
        base.gradient_checkpointing_enable({"use_reentrant": False})
        model = get_peft_model(base, make_config("s2a_ladder")).train()
        with pytest.raises(RuntimeError, match="gradient_checkpointing_disable"):
            model(pixel_values=families.batch("vit")[0])


class TestStatus:
    @every_method
    def test_model_status(self, method):
        model = get_peft_model(base_model(), make_config(method), "first")
        model.add_adapter("second", make_config(method))
        status = get_model_status(model)
        assert status.peft_types == {
            "first": model.peft_config["first"].peft_type,
            "second": model.peft_config["second"].peft_type,
        }
        assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["first"], [])
        assert status.requires_grad == {"first": True, "second": False}
        assert status.available_adapters == ["first", "second"]
        with model.disable_adapter():
            assert get_model_status(model).enabled is False

    @every_method
    def test_layer_status(self, method):
        model = get_peft_model(base_model(), make_config(method))
        layers = get_layer_status(model)
        assert layers
        for layer in layers:
            assert (layer.enabled, layer.active_adapters, layer.merged_adapters) == (True, ["default"], [])
            assert layer.available_adapters == ["default"]
            assert layer.devices == {"default": ["cpu"]} or not layer.devices

    def test_model_status_of_a_network_with_batch_normalisation(self):
        model = get_peft_model(families.build("resnet"), S2ABiasConfig(modules_to_save=[]), "first")
        model.add_adapter("second", S2ABiasConfig(modules_to_save=[]))
        status = get_model_status(model)
        assert (status.active_adapters, status.requires_grad) == (["first"], {"first": True, "second": False})
        model.merge_adapter()
        assert get_model_status(model).merged_adapters == ["first"]

    @every_s2a
    def test_mixed_models_are_refused(self, method):
        base = base_model()
        before = snapshot(base)
        with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
            get_peft_model(base, make_config(method), mixed=True)
        with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
            PeftMixedModel(base, make_config(method))
        assert_untouched(base, before)


class TestQuantisedActivations:
    """How the tuner applies its configuration; what quantisation does is tested with `peft_s2a.activations`."""

    @every_s2a
    def test_output_and_evaluation_are_exact(self, method, tmp_path):
        base = base_model()
        expected = logits(base)
        model = get_peft_model(base, make_config(method, activation_quantization={"bits": 4}))
        assert torch.equal(logits(model), expected)
        losses = train_a_little(model)
        assert losses[-1] < losses[0]
        model.save_pretrained(tmp_path)
        for quantization in ({"bits": 4}, None):
            config = PeftConfig.from_pretrained(tmp_path)
            config.activation_quantization = quantization and ActivationQuantizationConfig(**quantization)
            loaded = PeftModel.from_pretrained(base_model(), tmp_path, config=config)
            assert torch.equal(logits(loaded), logits(model))

    @every_s2a
    def test_unloading_undoes_it(self, method):
        base = base_model()
        before = snapshot(base)
        model = get_peft_model(base, make_config(method, activation_quantization={}, modules_to_save=[]))
        assert_untouched(model.unload(), before, trainable_too=False)

    def test_it_lasts_as_long_as_an_adapter_wants_it(self):
        base = base_model()
        stock = [type(module) for module in base.modules()]
        model = get_peft_model(base, make_config("s2a_bias", activation_quantization={}, modules_to_save=[]), "first")
        model.add_adapter("second", make_config("s2a_bias", modules_to_save=[]))
        model.set_adapter("second")
        assert any(type(module) not in stock for module in base.vit.modules())
        model.delete_adapter("first")
        unloaded = model.unload()
        assert [type(module) for module in unloaded.modules()] == stock

    def test_a_second_adapter_finds_the_same_places(self):
        model = get_peft_model(base_model(), S2AConfig(), "first")
        model.add_adapter("second", S2AConfig())
        assert model.peft_config["first"].structure_targets == model.peft_config["second"].structure_targets


class TestInjection:
    @every_method
    def test_inject_adapter_in_model(self, method):
        base = base_model()
        expected = logits(base)
        model = inject_adapter_in_model(make_config(method), base)
        assert model is base and torch.equal(logits(model), expected)
        losses = train_a_little(model)
        assert losses[-1] < losses[0]
        fresh = inject_adapter_in_model(make_config(method), base_model(), adapter_name="other")
        set_peft_model_state_dict(fresh, get_peft_model_state_dict(model), adapter_name="other")
        assert torch.equal(logits(fresh), logits(model))

    @every_method
    def test_inject_where_a_state_dict_says(self, method):
        source = inject_adapter_in_model(
            make_config(method, random_start=True, layers_to_transform=[1], modules_to_save=[]), base_model()
        )
        weights = get_peft_model_state_dict(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # LoRA's config and state dict disagree here, which PEFT mentions
            model = inject_adapter_in_model(
                make_config(method, modules_to_save=[]), base_model(), state_dict=weights, low_cpu_mem_usage=True
            )
        result = set_peft_model_state_dict(model, weights, low_cpu_mem_usage=True)
        assert not result.unexpected_keys
        assert torch.equal(logits(model), logits(source))
        assert get_peft_model_state_dict(model).keys() == weights.keys()

    @every_s2a
    def test_a_second_injection_that_fails_keeps_the_first(self, method):
        model = inject_adapter_in_model(make_config(method, random_start=True), base_model(), adapter_name="first")
        before, expected = snapshot(model), logits(model)
        with pytest.warns(UserWarning, match="Already found a `peft_config`"), pytest.raises(ValueError):
            inject_adapter_in_model(make_config(method, target_modules=["nothing"]), model, adapter_name="second")
        assert_untouched(model, before, trainable_too=False)
        assert list(model.peft_config) == ["first"] and torch.equal(logits(model), expected)

    @pytest.mark.parametrize("structures", [("prompt", "bias"), ("side", "prompt")])
    def test_a_structure_without_a_place_leaves_the_model_as_it_was(self, structures):
        base = base_model()
        before = snapshot(base)
        with pytest.raises(ValueError, match="'prompt' has no place to go in ViTForImageClassification"):
            get_peft_model(base, S2AConfig(structures=structures, target_modules=["fc1"]))
        assert_untouched(base, before)

    def test_a_failure_in_the_middle_leaves_the_model_as_it_was(self, monkeypatch):
        base = base_model()
        before = snapshot(base)
        from peft_s2a.tuners.side import SideLayer

        calls = []

        def fail_at_the_third(layer, *args, **kwargs):
            calls.append(layer)
            if len(calls) == 3:
                raise MemoryError("out of memory")
            return original(layer, *args, **kwargs)

        original = SideLayer.update_layer
        monkeypatch.setattr(SideLayer, "update_layer", fail_at_the_third)
        with pytest.raises(MemoryError):
            get_peft_model(base, S2AConfig())
        assert_untouched(base, before)
        assert torch.equal(logits(get_peft_model(base, S2ABiasConfig())), logits(base_model()))


class TestTransformersIntegration:
    @every_method
    def test_add_set_disable_enable_delete(self, method):
        model = base_model()
        expected = logits(model)
        model.add_adapter(make_config(method, random_start=True), adapter_name="first")
        with_a = logits(model)
        assert not torch.allclose(with_a, expected)
        model.add_adapter(make_config(method, random_start=True), adapter_name="second")
        assert model.active_adapters() == ["second"]
        model.set_adapter("first")
        assert torch.equal(logits(model), with_a)
        model.disable_adapters()
        assert torch.equal(logits(model), expected)
        model.enable_adapters()
        assert torch.equal(logits(model), with_a)
        model.delete_adapter("second")
        assert torch.equal(logits(model), with_a)
        model.delete_adapter("first")
        assert torch.equal(logits(model), expected)

    @every_method
    def test_save_and_load_adapter(self, method, tmp_path):
        model = base_model()
        model.add_adapter(make_config(method, random_start=True))
        randomise_classifier(model)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "adapter_model.safetensors").is_file()
        for name in ("default", "my-adapter"):
            loaded = base_model()
            loaded.load_adapter(tmp_path, adapter_name=name)
            assert torch.equal(logits(loaded), logits(model))
            assert not any("s2a_" in parameter for parameter in trainable(loaded))
        loaded = PeftModel.from_pretrained(base_model(), tmp_path)
        assert torch.equal(logits(loaded), logits(model))

    @every_method
    def test_load_what_peft_saved(self, method, tmp_path):
        saved = get_peft_model(base_model(), make_config(method, random_start=True))
        randomise_classifier(saved)
        saved.save_pretrained(tmp_path)
        model = base_model()
        expected = logits(model)
        info = model.load_adapter(tmp_path, adapter_name="first", is_trainable=True)
        assert not info.missing_keys and not info.unexpected_keys
        assert torch.equal(logits(model), logits(saved))
        assert all(".first" in name for name in trainable(model))
        model.load_adapter(tmp_path, adapter_name="second")
        model.set_adapter("second")
        assert torch.equal(logits(model), logits(saved))
        model.disable_adapters()
        assert torch.equal(logits(model), expected)

    @every_method
    def test_load_into_half_precision(self, method, tmp_path):
        saved = get_peft_model(base_model(), make_config(method, random_start=True))
        saved.save_pretrained(tmp_path)
        model = base_model().bfloat16()
        model.load_adapter(tmp_path)
        with torch.no_grad():
            actual = model(families.batch("vit")[0].bfloat16()).logits
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.float(), logits(saved), rtol=0.1, atol=0.1)

    @every_method
    def test_from_pretrained_loads_an_adapter_folder(self, method, tmp_path):
        base_model().save_pretrained(tmp_path / "base")
        model = type(base_model()).from_pretrained(tmp_path / "base")
        model = get_peft_model(model, make_config(method, random_start=True)).eval()
        model.save_pretrained(tmp_path / "adapter")
        loaded = type(base_model()).from_pretrained(tmp_path / "adapter")
        assert torch.equal(logits(loaded), logits(model))

    @every_s2a
    def test_a_failed_add_adapter_leaves_the_model_usable(self, method):
        model = base_model()
        before = snapshot(model)
        with pytest.raises(ValueError):
            model.add_adapter(make_config(method, target_modules=["nothing"]))
        assert_untouched(model, before)
        model.add_adapter(make_config(method))
        assert torch.equal(logits(model), logits(base_model()))


class TestLoading:
    @every_method
    def test_low_cpu_mem_usage(self, method, tmp_path):
        model = get_peft_model(base_model(), make_config(method, random_start=True))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base_model(), tmp_path, low_cpu_mem_usage=True)
        assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
        assert torch.equal(logits(loaded), logits(model))
        loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
        loaded.set_adapter("other")
        assert torch.equal(logits(loaded), logits(model))

    @every_method
    def test_loaded_for_inference_or_training(self, method, tmp_path):
        get_peft_model(base_model(), make_config(method)).save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base_model(), tmp_path)
        assert not trainable(loaded) and not loaded.training
        loaded = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
        assert trainable(loaded) == trainable(get_peft_model(base_model(), make_config(method)))
        losses = train_a_little(loaded)
        assert losses[-1] < losses[0]

    @every_method
    def test_auto_classes_load_from_a_local_base(self, method, tmp_path):
        from peft import AutoPeftModel

        base_model().save_pretrained(tmp_path / "base")
        base = type(base_model()).from_pretrained(tmp_path / "base")
        model = get_peft_model(base, make_config(method, random_start=True)).eval()
        model.save_pretrained(tmp_path / "adapter")
        loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
        assert torch.equal(logits(loaded), logits(model))

    @every_method
    def test_config_from_pretrained(self, method, tmp_path):
        config = make_config(method)
        config.save_pretrained(tmp_path)
        loaded = PeftConfig.from_pretrained(tmp_path)
        assert type(loaded) is type(config)
        assert loaded.to_dict() == config.to_dict()

    @every_method
    def test_subfolder(self, method, tmp_path):
        model = get_peft_model(base_model(), make_config(method, random_start=True))
        model.save_pretrained(tmp_path / "sub")
        assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path, subfolder="sub")), logits(model))

    def test_save_selected_adapters(self, tmp_path):
        model = get_peft_model(base_model(), S2ASideConfig(init_weights=False), "first")
        model.add_adapter("second", S2ASideConfig(init_weights=False))
        model.save_pretrained(tmp_path, selected_adapters=["second"])
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["second"]
        model.set_adapter("second")
        assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path / "second")), logits(model))
