"""Adapters of strangers: whatever is no adapter's is refused, and a refusal leaves the model as it was."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from methods import assert_untouched, base_model, logits, make_config, snapshot
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from test_saving import CONFIG, WEIGHTS, changed_copy, trained

from peft_s2a import ActivationQuantizationConfig, S2ABiasConfig, S2AConfig, S2APromptConfig, S2ASideConfig


PREFIX = "base_model.model."
FOREIGN = {
    "a base weight": f"{PREFIX}vit.layernorm.weight",
    "a wrapped base weight": f"{PREFIX}vit.layernorm.base_layer.weight",
    "a base weight without prefix": "vit.layernorm.base_layer.weight",
    "the base model's head": f"{PREFIX}classifier.original_module.weight",
    "another adapter's head": f"{PREFIX}classifier.modules_to_save.other.weight",
    "another adapter's bias": f"{PREFIX}vit.layernorm.s2a_bias.other",
    "an embedding": f"{PREFIX}vit.embeddings.cls_token",
    "an unknown module": f"{PREFIX}decoder.lora_A.weight",
    "a long name": PREFIX + "x" * 10**7,
}
LOADERS = {
    "PeftModel.from_pretrained": lambda model, folder: PeftModel.from_pretrained(model, folder),
    "transformers": lambda model, folder: (model.load_adapter(folder), model)[1],
    "transformers, from a state dict": lambda model, folder: (
        model.load_adapter(
            peft_config=PeftConfig.from_pretrained(folder), adapter_state_dict=load_file(folder / WEIGHTS)
        ),
        model,
    )[1],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """(a trained adapter of default structures and quantisation, its logits)."""
    folder = tmp_path_factory.mktemp("adapter")
    model = trained("s2a", activation_quantization=ActivationQuantizationConfig(backend="reference"))
    model.save_pretrained(folder)
    return folder, logits(model)


def with_key(key: str) -> Callable[[dict], dict]:
    model = base_model()
    like = dict(model.named_parameters()).get(key.removeprefix(PREFIX).replace("base_layer.", ""))
    return lambda tensors: {**tensors, key: torch.ones(32) if like is None else torch.ones_like(like)}


CHANGES: dict[str, Callable[[dict], dict]] = {
    **{f"holds {what}": with_key(key) for what, key in FOREIGN.items()},
    "bias of integers": lambda tensors: {
        key: tensor.long() if "s2a_bias" in key else tensor for key, tensor in tensors.items()
    },
    "complex gates": lambda tensors: {
        key: tensor.to(torch.complex64) if "s2a_gate" in key else tensor for key, tensor in tensors.items()
    },
    "bias in 8 bits": lambda tensors: {
        key: tensor.to(torch.float8_e4m3fn) if "s2a_bias" in key else tensor for key, tensor in tensors.items()
    },
    "NaN": lambda tensors: {key: tensor * torch.nan for key, tensor in tensors.items()},
    "a head of another shape": lambda tensors: {**tensors, f"{PREFIX}classifier.weight": torch.zeros(7, 32)},
    "biases of another shape": lambda tensors: {
        key: tensor[1:].clone() if key.endswith("s2a_bias") else tensor for key, tensor in tensors.items()
    },
}


class TestForeignTensors:
    @pytest.mark.parametrize(
        ("loader", "change"),
        [(loader, change) for loader in LOADERS for change in (CHANGES if "dict" not in loader else [*CHANGES][:3])],
    )
    def test_the_first_adapter_is_refused_without_a_trace(self, loader, change, saved, tmp_path):
        folder, good = saved
        bad = changed_copy(folder, tmp_path, CHANGES[change])
        model = base_model()
        before, plain = snapshot(model), logits(model)
        with pytest.raises((ValueError, RuntimeError)) as error:
            LOADERS[loader](model, bad)
        assert len(str(error.value)) < 10_000
        assert_untouched(model, before)
        assert torch.equal(logits(model), plain)
        assert torch.equal(logits(LOADERS[loader](model, folder)), good)

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_second_adapter_is_refused_without_a_trace(self, change, saved, tmp_path):
        folder, good = saved
        bad = changed_copy(folder, tmp_path, CHANGES[change])
        model = get_peft_model(base_model(), make_config("s2a", random_start=True), "other")
        before, expected = snapshot(model), logits(model)
        with pytest.raises((ValueError, RuntimeError)):
            model.load_adapter(bad, "second")
        assert_untouched(model, before, trainable_too=False)
        assert list(model.peft_config) == ["other"] and torch.equal(logits(model), expected)
        model.load_adapter(folder, "second")
        model.set_adapter("second")
        assert torch.equal(logits(model), good)

    @pytest.mark.parametrize("change", CHANGES)
    def test_setting_a_state_dict_copies_nothing(self, change, saved):
        folder, _ = saved
        model = get_peft_model(base_model(), make_config("s2a", random_start=True))
        before = snapshot(model)
        with pytest.raises((ValueError, RuntimeError)):
            set_peft_model_state_dict(model, CHANGES[change](load_file(folder / WEIGHTS)))
        assert_untouched(model, before, trainable_too=False)

    @pytest.mark.parametrize("damage", ["empty", "truncated", "overlapping", "header too long"])
    @pytest.mark.parametrize("loader", ["PeftModel.from_pretrained", "transformers"])
    def test_damaged_files(self, damage, loader, saved, tmp_path):
        folder, good = saved
        bad = changed_copy(folder, tmp_path)
        content = (bad / WEIGHTS).read_bytes()
        first, second = b'"data_offsets":[0,', b'"data_offsets":[4,'
        broken = {
            "empty": b"",
            "truncated": content[: len(content) - 5],
            "overlapping": content.replace(first, second),
            "header too long": (2**40).to_bytes(8, "little") + content[8:],
        }[damage]
        assert broken != content
        (bad / WEIGHTS).write_bytes(broken)
        model = base_model()
        before = snapshot(model)
        with pytest.raises(Exception, match=r"(?i)header|offset|buffer|incomplete|metadata|large|invalid"):
            LOADERS[loader](model, bad)
        assert_untouched(model, before)
        assert torch.equal(logits(LOADERS[loader](model, folder)), good)

    def test_ten_thousand_foreign_tensors_are_refused_at_once(self, saved, tmp_path):
        many = {f"{PREFIX}m{index}.weight": torch.zeros(1) for index in range(10_000)}
        bad = changed_copy(saved[0], tmp_path, lambda tensors: {**tensors, **many})
        model = base_model()
        before, start = snapshot(model), time.process_time()
        with pytest.raises(ValueError, match="10000 tensors"):
            PeftModel.from_pretrained(model, bad)
        assert time.process_time() - start < 10
        assert_untouched(model, before)

    def test_statistics_of_batch_normalisation_are_an_adapters(self, tmp_path):
        config = S2AConfig(init_weights=False, freeze_batch_norm_stats=False)
        model = get_peft_model(families.build("resnet"), config)
        images, _ = families.batch("resnet")
        families.logits(model.train(), images)
        model.eval().save_pretrained(tmp_path)
        with torch.no_grad():
            expected = families.logits(model, images)
            for loader in LOADERS.values():
                assert torch.equal(
                    families.logits(loader(families.build("resnet"), tmp_path).eval(), images), expected
                )

    def test_an_interrupt_while_loading_leaves_no_trace(self, saved, monkeypatch):
        model = base_model()
        before = snapshot(model)

        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr("peft.peft_model.set_peft_model_state_dict", interrupt)
        with pytest.raises(KeyboardInterrupt):
            PeftModel.from_pretrained(model, saved[0])
        assert_untouched(model, before)

    def test_other_tuners_load_as_before(self, tmp_path):
        model = get_peft_model(base_model(), make_config("lora", random_start=True))
        model.save_pretrained(tmp_path)
        for loader in LOADERS.values():
            assert torch.equal(logits(loader(base_model(), tmp_path)), logits(model))


HOSTILE_CONFIGS = [
    {"side_rank": 10**9},
    {"side_rank": 32.0},
    {"side_rank": 10**4000},
    {"side_alpha": float("nan")},
    {"side_alpha": float("inf")},
    {"side_alpha": 1e308},
    {"side_alpha": -1.0},
    {"side_alpha": True},
    {"num_prompt_tokens": 10**9},
    {"num_prompt_tokens": "8"},
    {"train_norm_scale": "yes"},
    {"freeze_batch_norm_stats": 1},
    {"init_weights": None},
    {"layers_to_transform": "all"},
    {"layers_to_transform": [1.5]},
    {"structures": [["bias"]]},
    {"structures": "bias"},
    {"side_mode": ["ladder"]},
    {"target_modules": ["x" * 10**7]},
    {"target_modules": [f"m{index}" for index in range(10**6)]},
    {"target_modules": "(a+)+$"},
    {"target_modules": "(a|a)*$"},
    {"target_modules": "a?" * 40 + "a" * 40},
    {"exclude_modules": "(.*)*x"},
    {"exclude_modules": ".*" * 8 + "x"},
    {"modules_to_save": [r"(\w+\.?)*x"]},
    {"modules_to_save": "classifier"},
    {"modules_to_save": ["("]},
    {"layers_to_transform": [0], "layers_pattern": ["(a*)*"]},
    {"structure_targets": {"bias": ["x" * 10**7]}},
    {"structure_targets": {"bias": [f"m{index}" for index in range(10**6)]}},
    {"activation_quantization": {"bits": 4.0}},
    {"activation_quantization": {"bits": 5}},
    {"activation_quantization": {"bits": {"norm": "4"}}},
    {"activation_quantization": {"bits": 1, "levels": {"act": [0.0, 1e308]}}},
    {"activation_quantization": {"bits": 1, "levels": {"act": [float("nan"), 1.0]}}},
    {"activation_quantization": {"backend": "__import__('os')"}},
    {"activation_quantization": {"unknown": 1}},
    {"activation_quantization": [4]},
]


class TestHostileConfigs:
    @pytest.mark.parametrize("entries", HOSTILE_CONFIGS, ids=lambda entries: repr(entries)[:60])
    def test_they_are_refused_before_the_model_is_touched(self, entries, saved, tmp_path):
        bad = changed_copy(saved[0], tmp_path, config=entries)
        model = base_model()
        before, start = snapshot(model), time.process_time()
        for loader in ("PeftModel.from_pretrained", "transformers"):
            with pytest.raises(ValueError) as error:
                LOADERS[loader](model, bad)
            assert len(str(error.value)) < 10_000
            assert_untouched(model, before)
        assert time.process_time() - start < 20

    def test_a_refused_config_says_which_entry(self):
        with pytest.raises(ValueError, match="`side_rank` must be at most 8192, got 1000000000"):
            S2ASideConfig(side_rank=10**9)
        with pytest.raises(ValueError, match="`num_prompt_tokens` must be at most 8192"):
            S2APromptConfig(num_prompt_tokens=10**9)
        with pytest.raises(ValueError, match="`target_modules` could take for ever to match"):
            S2ABiasConfig(target_modules="(a+)+$")

    @pytest.mark.parametrize(
        "pattern",
        [
            r".*\.(fc1|attention)",
            r"(.*\.)?layers\.\d+\.(q_proj|v_proj)",
            r".*layers\.(0|1|2|10)\..*(attention|mlp).*",
            "all-linear",
            r"(encoder\.)?layer\.[0-9]{1,2}\.mlp\.fc[12]",
            r"^(?!.*head).*fc\d$",
        ],
    )
    def test_usual_expressions_pass(self, pattern):
        assert S2AConfig(target_modules=pattern).target_modules == pattern

    @pytest.mark.parametrize("loader", ["PeftModel.from_pretrained", "transformers"])
    def test_a_harmless_pickle_file_is_refused_too(self, loader, saved, tmp_path):
        bad = changed_copy(saved[0], tmp_path / "bad")
        torch.save(load_file(bad / WEIGHTS), bad / "adapter_model.bin")
        (bad / WEIGHTS).unlink()
        model = base_model()
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"pickle file.*convert it"):
            LOADERS[loader](model, bad)
        assert_untouched(model, before)

    def test_no_code_and_no_pickle(self, saved, tmp_path):
        class Evil:
            def __reduce__(self):
                return (tmp_path.joinpath("ran").mkdir, ())

        bad = changed_copy(saved[0], tmp_path / "bad")
        (bad / WEIGHTS).unlink()
        (bad / "adapter_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
        for loader in ("PeftModel.from_pretrained", "transformers"):
            model = base_model()
            before = snapshot(model)
            with pytest.raises(Exception, match=r"(?i)weights.only|unsupported|pickle"):
                LOADERS[loader](model, bad)
            assert_untouched(model, before)
        assert not (tmp_path / "ran").exists()
        assert (bad / CONFIG).exists()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("loader", ["peft", "transformers"])
def test_tensors_lie_where_torch_would_have_put_them(loader, low_cpu_mem_usage, tmp_path):
    """In a file they are 8 bytes apart, and matrix products of weights that lie anywhere round otherwise."""
    get_peft_model(base_model(), make_config("s2a", random_start=True)).save_pretrained(tmp_path)
    model = base_model()
    if loader == "peft":
        model = PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    else:
        model.load_adapter(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    own = [
        tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if "s2a_" in name or "modules_to_save" in name
    ]  # fmt: skip
    assert own and all(tensor.data_ptr() % 64 == 0 for tensor in own)
