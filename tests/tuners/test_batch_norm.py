"""Running statistics: the base model's by default, the adapter's own if they are to follow the training images."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from methods import assert_untouched, snapshot
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from peft_s2a import S2ABiasConfig, S2AConfig, S2ASideConfig
from peft_s2a.anatomy import BATCH_NORMS


CONFIGS = {
    "bias": S2ABiasConfig,
    "side": S2ASideConfig,
    "all": S2AConfig,
    "ladder": lambda **kwargs: S2ASideConfig(side_mode="ladder", **kwargs),
}
every_config = pytest.mark.parametrize("config", CONFIGS)
every_family = pytest.mark.parametrize(
    "family", ["resnet", pytest.param("timm_resnet", marks=pytest.mark.slow), "plain_cnn"]
)


@pytest.fixture(autouse=True)
def _plans_of_one_family(request):
    if "family" in request.fixturenames and request.getfixturevalue("family") != "resnet":
        request.getfixturevalue("function_mode")


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BATCH_NORMS)]


def statistics(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for norm in norms(model) for tensor in norm.buffers(recurse=False)]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def eval_logits(model: nn.Module, family: str) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return families.logits(model, families.batch(family)[0])


def train(model: nn.Module, family: str, steps: int = 3) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(steps):
        images, labels = families.batch(family, seed=step)
        loss = nn.functional.cross_entropy(families.logits(model, images + 1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def trained(family: str, config: str, **kwargs) -> PeftModel:
    model = get_peft_model(families.build(family).requires_grad_(False), CONFIGS[config](**kwargs))
    train(model, family)
    return model


class TestFrozen:
    @every_config
    @every_family
    def test_training_leaves_the_statistics_alone(self, family, config):
        base = families.build(family)
        before = statistics(base)
        model = get_peft_model(base, CONFIGS[config](modules_to_save=[]))
        train(model, family)
        assert equal(statistics(base), before)
        with torch.no_grad():
            images = families.batch(family)[0]
            assert torch.equal(families.logits(model.train(), images), families.logits(model.eval(), images))

    @every_config
    @every_family
    def test_a_trained_adapter_reloads_bit_exactly(self, family, config, tmp_path):
        model = trained(family, config)
        expected = eval_logits(model, family)
        model.save_pretrained(tmp_path)
        assert torch.equal(eval_logits(PeftModel.from_pretrained(families.build(family), tmp_path), family), expected)

    def test_the_mode_of_the_norms_follows_the_active_adapter(self):
        base = families.build("resnet").train()
        model = get_peft_model(base, S2ABiasConfig(), "frozen").train()
        assert not any(norm.training for norm in norms(model))
        model.add_adapter("live", S2ABiasConfig(freeze_batch_norm_stats=False))
        assert not any(norm.training for norm in norms(model))
        model.set_adapter("live")
        assert all(norm.training for norm in norms(model))
        model.set_adapter("frozen")
        assert not any(norm.training for norm in norms(model))
        model.eval().train()
        assert not any(norm.training for norm in norms(model))
        model.delete_adapter("frozen")
        assert all(norm.training for norm in norms(model))
        assert all(norm.training for norm in norms(model.unload()))

    @pytest.mark.parametrize("mode", [True, False])
    def test_unload_gives_the_norms_their_mode_back(self, mode):
        base = families.build("resnet").train(mode)
        before = snapshot(base)
        unloaded = get_peft_model(base, S2ABiasConfig(modules_to_save=[])).unload()
        assert_untouched(unloaded, before, trainable_too=False)

    def test_statistics_stay_while_the_adapter_is_disabled(self):
        base = families.build("resnet")
        before = statistics(base)
        model = get_peft_model(base, S2ABiasConfig()).train()
        with model.disable_adapter():
            families.logits(model, families.batch("resnet")[0])
        assert equal(statistics(base), before)

    def test_norms_in_a_head_that_is_trained_in_full_are_live(self):
        head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), "head": head})
        model.forward = lambda x: model["head"](model["body"](x))
        get_peft_model(model, S2ABiasConfig()).train()
        assert not model["body"][1].get_base_layer().training
        assert model["head"].modules_to_save["default"][1].training


class TestLive:
    @every_config
    @every_family
    def test_the_adapter_has_statistics_of_its_own(self, family, config):
        base = families.build(family).requires_grad_(False)
        before, expected = statistics(base), eval_logits(base, family)
        model = get_peft_model(base, CONFIGS[config](freeze_batch_norm_stats=False))
        assert torch.equal(eval_logits(model, family), expected)
        train(model, family)
        assert equal(statistics(base), before)
        own = {k: v for k, v in get_peft_model_state_dict(model).items() if "s2a_running_mean" in k}
        assert len(own) == len(norms(families.build(family)))
        assert not any(torch.equal(value, base_value) for value, base_value in zip(own.values(), before[::3]))
        assert not torch.allclose(eval_logits(model, family), expected)
        with model.disable_adapter():
            assert torch.equal(eval_logits(model, family), expected)

    def test_statistics_are_those_of_an_ordinary_training(self):
        model = get_peft_model(
            families.build("resnet"), S2ASideConfig(freeze_batch_norm_stats=False, modules_to_save=[])
        ).train()
        plain = families.build("resnet").train()
        for seed in range(3):
            images = families.batch("resnet", seed=seed)[0]
            assert torch.equal(families.logits(model, images), families.logits(plain, images))
        own = [v for k, v in get_peft_model_state_dict(model).items() if "_running_" in k or "_num_batches" in k]
        expected = [
            getattr(norm, name)
            for norm in norms(plain)
            for name in ("running_mean", "running_var", "num_batches_tracked")
        ]
        assert equal(own, expected)

    @every_config
    @every_family
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_they_are_saved_with_the_adapter(self, family, config, low_cpu_mem_usage, tmp_path):
        model = trained(family, config, freeze_batch_norm_stats=False)
        expected = eval_logits(model, family)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(families.build(family), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(eval_logits(loaded, family), expected)

    def test_transformers_loads_them(self, tmp_path):
        model = trained("resnet", "all", freeze_batch_norm_stats=False)
        expected = eval_logits(model, "resnet")
        model.save_pretrained(tmp_path)
        loaded = families.build("resnet")
        before = statistics(loaded)
        loaded.load_adapter(tmp_path, adapter_name="other")
        assert torch.equal(eval_logits(loaded, "resnet"), expected)
        assert equal(statistics(loaded), before)

    def test_adapters_do_not_disturb_each_other(self):
        config = S2ABiasConfig(freeze_batch_norm_stats=False, modules_to_save=[])
        model = get_peft_model(families.build("resnet").requires_grad_(False), config, "one")
        train(model, "resnet")
        one = eval_logits(model, "resnet")
        model.add_adapter("two", S2ABiasConfig(freeze_batch_norm_stats=False, modules_to_save=[]))
        model.set_adapter("two")
        train(model, "resnet", steps=1)
        two = eval_logits(model, "resnet")
        model.add_adapter("frozen", S2ABiasConfig(modules_to_save=[]))
        model.set_adapter("frozen")
        assert torch.equal(eval_logits(model, "resnet"), eval_logits(families.build("resnet"), "resnet"))
        for name, expected in (("one", one), ("two", two)):
            model.set_adapter(name)
            assert torch.equal(eval_logits(model, "resnet"), expected)

    def test_an_adapter_saved_beside_another_loads_without_it(self, tmp_path):
        # The other one wraps the norms too.
        model = get_peft_model(families.build("resnet"), S2AConfig(init_weights=False), "other")
        model.add_adapter("live", S2AConfig(structures=("side",), freeze_batch_norm_stats=False, init_weights=False))
        model.set_adapter("live")
        train(model, "resnet")
        expected = eval_logits(model, "resnet")
        model.save_pretrained(tmp_path, selected_adapters=["live"])
        loaded = PeftModel.from_pretrained(families.build("resnet"), tmp_path / "live")
        assert torch.equal(eval_logits(loaded, "resnet"), expected)

    def test_merge_and_unmerge_exchange_them(self):
        base = families.build("resnet").requires_grad_(False)
        before = statistics(base)
        model = get_peft_model(base, S2ABiasConfig(freeze_batch_norm_stats=False, modules_to_save=[]))
        train(model, "resnet")
        expected = eval_logits(model, "resnet")
        model.merge_adapter()
        assert not equal(statistics(base), before)
        torch.testing.assert_close(eval_logits(model, "resnet"), expected)
        model.unmerge_adapter()
        assert equal(statistics(base), before)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(eval_logits(merged, "resnet"), expected)
        assert equal(statistics(model.unload()), before)

    def test_cumulative_averages_and_norms_without_weights(self):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None, affine=False), nn.Linear(6, 2))
        plain = copy.deepcopy(base)
        config = S2ABiasConfig(freeze_batch_norm_stats=False, target_modules=["0"])
        model = get_peft_model(base, config).train()
        for _ in range(3):
            x = torch.randn(8, 4)
            assert torch.equal(model(x), plain(x))
        own = get_peft_model_state_dict(model)
        assert own["base_model.model.1.s2a_num_batches_tracked"] == 3
        assert torch.equal(own["base_model.model.1.s2a_running_mean"], plain[1].running_mean)

    def test_half_precision_and_autocast(self, tmp_path):
        images = families.batch("resnet")[0]
        base = families.build("resnet").bfloat16()
        model = get_peft_model(base, S2ABiasConfig(freeze_batch_norm_stats=False, init_weights=False)).train()
        model(images.bfloat16())
        model.eval().save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(families.build("resnet").bfloat16(), tmp_path)
        with torch.no_grad():
            assert torch.equal(loaded(images.bfloat16()).logits, model(images.bfloat16()).logits)
        model = get_peft_model(families.build("resnet"), S2ABiasConfig(freeze_batch_norm_stats=False)).train()
        with torch.autocast("cpu", torch.bfloat16):
            model(images).logits.float().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    def test_of_two_adapters_the_first_ones_count_merged_or_not(self):
        config = S2ABiasConfig(freeze_batch_norm_stats=False, modules_to_save=[])
        model = get_peft_model(families.build("resnet"), config, adapter_name="one")
        train(model, "resnet")
        model.add_adapter("two", config)
        model.set_adapter("two")
        train(model, "resnet", steps=6)
        model.base_model.set_adapter(["one", "two"])
        expected = eval_logits(model, "resnet")
        model.base_model.merge_adapter()
        torch.testing.assert_close(eval_logits(model, "resnet"), expected)
        model.base_model.unmerge_adapter()
        torch.testing.assert_close(eval_logits(model, "resnet"), expected)

    def test_they_survive_compilation(self):
        images = families.batch("resnet")[0]
        config = S2ABiasConfig(freeze_batch_norm_stats=False, activation_quantization=None)
        model = get_peft_model(families.build("resnet"), config).train()
        twin = copy.deepcopy(model)
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(images).logits, twin(images).logits)
        for name, value in get_peft_model_state_dict(twin).items():
            torch.testing.assert_close(get_peft_model_state_dict(model)[name], value)
        torch._dynamo.reset()


class WithNormInHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.stem(x)).mean((2, 3)))


class TestHeadsThatAnotherAdapterTrains:
    def steps(self, model: nn.Module) -> None:
        model.train()
        for _ in range(2):
            model(torch.randn(4, 3, 8, 8) + 3)

    @pytest.mark.parametrize("head_first", [True, False])
    def test_their_statistics_stay(self, head_first, tmp_path):
        base = WithNormInHead()
        before = copy.deepcopy(base.state_dict())
        options = {
            "headless": {"modules_to_save": [], "exclude_modules": ["head.0", "head.1", "head.2"]},
            "with head": {},
        }
        order = ["with head", "headless"] if head_first else ["headless", "with head"]
        model = get_peft_model(base, S2ABiasConfig(**options[order[0]]), adapter_name=order[0])
        model.add_adapter(order[1], S2ABiasConfig(**options[order[1]]))
        model.set_adapter("headless")
        self.steps(model)
        model.set_adapter("with head")
        copied = copy.deepcopy(base.head.modules_to_save["with head"].state_dict())
        self.steps(model)
        assert not torch.equal(base.head.modules_to_save["with head"][1].running_mean, copied["1.running_mean"])
        for adapter in order:
            model.set_adapter(adapter)
            model.eval()
            images = torch.randn(4, 3, 8, 8)
            expected = model(images)
            model.save_pretrained(tmp_path, selected_adapters=[adapter])
            fresh = WithNormInHead()
            fresh.load_state_dict(before)
            loaded = PeftModel.from_pretrained(fresh, tmp_path / adapter, adapter).eval()
            assert torch.equal(loaded(images), expected)
        assert torch.equal(base.norm.base_layer.running_mean, before["norm.running_mean"])
        assert torch.equal(base.head.original_module[1].running_mean, before["head.1.running_mean"])

    def test_statistics_of_its_own_are_refused(self):
        model = get_peft_model(WithNormInHead(), S2ABiasConfig())
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"'head.1', which another adapter trains in full"):
            model.add_adapter("second", S2ABiasConfig(modules_to_save=[], freeze_batch_norm_stats=False))
        assert_untouched(model, before, trainable_too=False)


def test_where_the_active_adapter_is_deleted_the_next_one_decides():
    model = get_peft_model(WithNormInHead(), S2ABiasConfig(modules_to_save=[]), adapter_name="a")
    model.add_adapter("b", S2ABiasConfig(modules_to_save=[], freeze_batch_norm_stats=False))
    model.add_adapter("c", S2ABiasConfig(modules_to_save=[]))
    model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    before = model.base_model.model.norm.s2a_running_mean["b"].clone()
    model.train()(torch.randn(4, 3, 8, 8) + 3)
    assert not torch.equal(model.base_model.model.norm.s2a_running_mean["b"], before)


class TestConversionToSyncBatchNorm:
    @pytest.mark.parametrize("config", ["bias", "side"])
    def test_frozen_statistics_stay_frozen(self, config):
        model = get_peft_model(families.build("resnet"), CONFIGS[config]())
        model.train()
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        converted = norms(model)
        assert converted and all(isinstance(norm, nn.SyncBatchNorm) and not norm.training for norm in converted)
        for mode in (False, True):
            model.train(mode)
            assert not any(norm.training for norm in converted)
        model.unload()
        assert all(norm.training for norm in converted)

    def test_live_statistics_stay_the_adapters(self):
        model = get_peft_model(families.build("resnet"), S2ABiasConfig(freeze_batch_norm_stats=False))
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        before = statistics(model)
        model.train()
        assert all(norm.training for norm in norms(model)) and equal(statistics(model), before)


class WithInstanceNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.conv = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(self.norm(self.stem(x)).relu()).mean((2, 3)))


@pytest.mark.parametrize("freeze", [True, False])
def test_instance_norms_with_running_statistics(freeze, tmp_path):
    base = WithInstanceNorm()
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, S2AConfig(freeze_batch_norm_stats=freeze))
    ordinary = WithInstanceNorm()
    ordinary.load_state_dict(before)
    for _ in range(3):
        images = torch.randn(4, 3, 8, 8) + 3
        model.train()(images).sum().backward()
        ordinary.train()(images)
    images = torch.randn(4, 3, 8, 8)
    expected = model.eval()(images)
    if not freeze:
        torch.testing.assert_close(base.norm.s2a_running_mean["default"], ordinary.norm.running_mean)
        torch.testing.assert_close(base.norm.s2a_running_var["default"], ordinary.norm.running_var)
    model.save_pretrained(tmp_path)
    fresh = WithInstanceNorm()
    fresh.load_state_dict(before)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path).eval()(images), expected)
    unloaded = model.unload().state_dict()
    assert all(torch.equal(unloaded[name], tensor) for name, tensor in before.items())
