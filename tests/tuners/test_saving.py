"""Adapters on disk: plain files, loaded in a new process, and broken ones refused with the model left usable."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from methods import METHODS, S2A, assert_untouched, base_model, logits, make_config, snapshot, train_a_little
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers.models.vit.modeling_vit import ViTLayer

from peft_s2a import S2ABiasConfig, S2AConfig, S2ASideConfig


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
every_method = pytest.mark.parametrize("method", METHODS)
every_s2a = pytest.mark.parametrize("method", S2A)


def trained(method: str, **kwargs) -> PeftModel:
    model = get_peft_model(base_model(), make_config(method, **kwargs))
    train_a_little(model)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], tuple[Path, torch.Tensor]]:
    """method -> (folder of a trained adapter, the logits it gives), made once."""
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def get(method: str) -> tuple[Path, torch.Tensor]:
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            model = trained(method)
            model.save_pretrained(folder)
            made[method] = folder, logits(model)
        return made[method]

    return get


def changed_copy(
    folder: Path, target: Path, weights: Callable[[dict], dict] | None = None, config: dict | None = None
) -> Path:
    """A copy of an adapter with other tensors, or with other entries in its configuration."""
    target.mkdir(exist_ok=True)
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors if weights is None else weights(tensors), target / WEIGHTS)
    written = json.loads((folder / CONFIG).read_text())
    written.update(config or {})
    (target / CONFIG).write_text(json.dumps(written))
    return target


class TestFiles:
    @every_s2a
    def test_an_adapter_is_safetensors_and_plain_json(self, method, saved):
        folder, _ = saved(method)
        assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG, "README.md"}
        tensors = load_file(folder / WEIGHTS)
        prefix = "base_model.model."
        assert all(key.startswith(prefix) and "default" not in key for key in tensors)
        assert {f"{prefix}classifier.weight", f"{prefix}classifier.bias"} < set(tensors)
        assert all("s2a_" in key for key in tensors if "classifier" not in key)
        config = json.loads((folder / CONFIG).read_text())
        assert config["peft_type"].startswith("S2A") and config["modules_to_save"] == ["classifier"]
        assert config["structure_targets"]

    @every_s2a
    def test_what_is_saved_is_the_adapter_and_nothing_of_the_base(self, method, saved):
        folder, _ = saved(method)
        model = trained(method)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = sum(tensor.numel() for name, tensor in model.named_buffers() if "s2a_down" in name)
        assert sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values()) == count + frozen

    @every_s2a
    def test_saving_twice_writes_the_same_bytes(self, method, tmp_path):
        model = trained(method)
        for name in ("first", "second"):
            model.save_pretrained(tmp_path / name)
        for name in (WEIGHTS, CONFIG):
            assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()

    def test_a_new_process_gives_equal_logits(self, saved, tmp_path):
        expected = {}
        for method in METHODS:
            folder, expected[f"vit {method}"] = saved(method)
            (tmp_path / f"vit {method}").symlink_to(folder)
        for family in ("resnet", "swin", "timm_convnext"):
            config = S2AConfig(init_weights=False, freeze_batch_norm_stats=False)
            model = get_peft_model(families.build(family).requires_grad_(False), config)
            images, _ = families.batch(family)
            families.logits(model.train(), images)
            name = f"{family} all"
            model.eval().save_pretrained(tmp_path / name)
            with torch.no_grad():
                expected[name] = families.logits(model, images)
        script = (
            "import sys; sys.path[:0] = sys.argv[1:3]\n"
            "import conftest, pathlib, families, torch, peft_s2a\n"
            "from peft import PeftModel\n"
            "from safetensors.torch import save_file\n"
            "found = {}\n"
            "for folder in pathlib.Path(sys.argv[3]).iterdir():\n"
            "    family = folder.name.split()[0]\n"
            "    model = PeftModel.from_pretrained(families.build(family).requires_grad_(False), folder)\n"
            "    with torch.no_grad():\n"
            "        found[folder.name] = families.logits(model, families.batch(family)[0])\n"
            "save_file(found, pathlib.Path(sys.argv[3]) / 'logits')\n"
        )
        tests = Path(__file__).parents[1]
        process = subprocess.run(
            [sys.executable, "-c", script, str(tests), str(tests.parent), str(tmp_path)],
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        found = load_file(tmp_path / "logits")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def nan_in(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = next(key for key in tensors if "s2a_" in key)
    return {**tensors, key: torch.full_like(tensors[key], torch.nan)}


def infinity_in_the_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = "base_model.model.classifier.bias"
    return {**tensors, key: torch.full_like(tensors[key], torch.inf)}


def mis_shaped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = [key for key in tensors if "s2a_" in key][-1]
    return {**tensors, key: torch.zeros(*tensors[key].shape[:-1], tensors[key].shape[-1] + 1)}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path: Path) -> None:
    path.write_bytes(b"no safetensors" * 100)


BROKEN_TENSORS = {
    "nan": (nan_in, ValueError, r"hold NaN or infinity in 1 of \d+ tensors .*s2a_"),
    "infinity": (infinity_in_the_head, ValueError, "hold NaN or infinity in 1 of .*classifier"),
    "mis-shaped": (mis_shaped, RuntimeError, r"size mismatch .*s2a_\w+.* is \(.*instead of \("),
    "foreign": (
        lambda tensors: {"base_model.model.decoder.lora_A.weight": torch.zeros(2, 2)},
        KeyError,
        r"base_model\.model\.classifier\.",
    ),
}
BROKEN_FILES = {"truncated": truncate, "garbage": garbage}


class TestBrokenWeights:
    @pytest.mark.parametrize("broken", [*BROKEN_TENSORS, *BROKEN_FILES])
    @every_s2a
    def test_a_second_adapter_is_refused_and_the_model_stays_usable(self, method, broken, saved, tmp_path):
        folder, good = saved(method)
        if broken in BROKEN_TENSORS:
            change, error, message = BROKEN_TENSORS[broken]
            bad = changed_copy(folder, tmp_path, change)
        else:
            error, message = SafetensorError, "."
            bad = changed_copy(folder, tmp_path)
            BROKEN_FILES[broken](bad / WEIGHTS)
        base = base_model()
        plain = logits(base)
        model = get_peft_model(base, make_config(method, random_start=True), "first")
        with_first = logits(model)
        with pytest.raises(error, match=message):
            model.load_adapter(bad, "second")
        assert model.active_adapters == ["first"]
        assert torch.equal(logits(model), with_first)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        model.load_adapter(folder, "second")
        model.set_adapter("second")
        assert torch.equal(logits(model), good)

    @pytest.mark.parametrize("broken", [*BROKEN_TENSORS, *BROKEN_FILES])
    @every_s2a
    def test_the_first_adapter_is_refused_and_the_model_stays_usable(self, method, broken, saved, tmp_path):
        folder, good = saved(method)
        error, message = SafetensorError, "."
        if broken in BROKEN_TENSORS:
            change, error, message = BROKEN_TENSORS[broken]
            bad = changed_copy(folder, tmp_path, change)
        else:
            bad = changed_copy(folder, tmp_path)
            BROKEN_FILES[broken](bad / WEIGHTS)
        base = base_model()
        plain, before = logits(base), snapshot(base)
        with pytest.raises(error, match=message):
            PeftModel.from_pretrained(base, bad)
        assert_untouched(base, before)
        model = PeftModel.from_pretrained(base, folder)
        assert torch.equal(logits(model), good)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)

    @every_s2a
    def test_nothing_is_copied_from_a_mis_shaped_file(self, method, saved, tmp_path):
        folder, _ = saved(method)
        bad = changed_copy(folder, tmp_path, mis_shaped)
        model = get_peft_model(base_model(), make_config(method))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"None of them was loaded"):
            model.load_adapter(bad, "default")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    @every_s2a
    def test_mismatched_sizes_can_be_ignored_as_in_peft(self, method, saved, tmp_path):
        folder, _ = saved(method)
        bad = changed_copy(folder, tmp_path, mis_shaped)
        with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
            model = PeftModel.from_pretrained(base_model(), bad, ignore_mismatched_sizes=True)
        assert logits(model).isfinite().all()

    @every_method
    def test_missing_tensors_are_named(self, method, saved, tmp_path):
        folder, _ = saved(method)
        own = "lora_" if method == "lora" else "s2a_"
        removed = next(key for key in load_file(folder / WEIGHTS) if own in key)
        bad = changed_copy(folder, tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != removed})
        with pytest.warns(UserWarning, match=f"missing adapter keys.*{removed.split('.')[-1]}"):
            PeftModel.from_pretrained(base_model(), bad)

    @every_method
    def test_transformers_refuses_what_it_cannot_read(self, method, saved, tmp_path):
        folder, good = saved(method)
        for broken in BROKEN_FILES.values():
            bad = changed_copy(folder, tmp_path)
            broken(bad / WEIGHTS)
            model = base_model()
            with pytest.raises((SafetensorError, OSError)):
                model.load_adapter(bad)
            assert torch.equal(logits(model), logits(base_model()))
            model.load_adapter(folder, adapter_name="good")
            model.set_adapter("good")
            assert torch.equal(logits(model), good)

    def test_an_adapter_of_another_base_model_is_refused(self, saved):
        folder, _ = saved("s2a")
        for family in ("resnet", "dinov2"):
            model = families.build(family)
            before = snapshot(model)
            with pytest.raises(ValueError, match="Use the base model that the adapter was trained with"):
                PeftModel.from_pretrained(model, folder)
            assert_untouched(model, before)


class TestBrokenConfigs:
    @every_method
    def test_an_unknown_key_warns_and_is_ignored(self, method, saved, tmp_path):
        folder, good = saved(method)
        newer = changed_copy(folder, tmp_path, config={"quantum_rank": 3, "peft_version": "99.0.0"})
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['quantum_rank'\]"):
            config = PeftConfig.from_pretrained(newer)
        assert not hasattr(config, "quantum_rank")
        with pytest.warns(UserWarning, match="quantum_rank"):
            model = PeftModel.from_pretrained(base_model(), newer)
        assert torch.equal(logits(model), good)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"peft_type": "S3A"}, KeyError, "S3A"),
            ({"peft_type": "LORA"}, ValueError, "(?i)target"),
            ({"peft_type": "S2A_PROMPT"}, ValueError, "trains only"),
            ({"structures": ["bias", "spoiler"]}, ValueError, "'spoiler'"),
            ({"side_rank": "32"}, ValueError, "`side_rank` must be a positive integer, got '32'"),
            ({"side_mode": 3}, ValueError, "`side_mode` must be one of"),
            ({"target_modules": {"a": 1}}, ValueError, "`target_modules` must be"),
            ({"structure_targets": "all"}, ValueError, "`structure_targets` must map"),
            ({"structure_targets": {"bias": [3]}}, ValueError, "`structure_targets` must map"),
            ({"structure_targets": {"bias": ["vit.layers.9.mlp"]}}, ValueError, "does not have"),
            ({"structure_targets": {"prompt": ["vit.layernorm"]}}, ValueError, "cannot carry it"),
        ],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_bad_entries_are_named_and_the_model_is_left_alone(self, change, error, message, saved, tmp_path):
        folder, good = saved("s2a")
        bad = changed_copy(folder, tmp_path, config=change)
        model = base_model()
        before = snapshot(model)
        with pytest.raises(error, match=message):
            PeftModel.from_pretrained(model, bad)
        assert_untouched(model, before)
        assert torch.equal(logits(PeftModel.from_pretrained(model, folder)), good)

    def test_another_rank_is_a_mismatch(self, saved, tmp_path):
        folder, _ = saved("s2a_side")
        bad = changed_copy(folder, tmp_path, config={"side_rank": 5})
        with pytest.raises(RuntimeError, match=r"size mismatch for \d+ tensors .* its configuration is not the one"):
            PeftModel.from_pretrained(base_model(), bad)

    def test_an_adapter_without_recorded_targets_finds_them_again(self, saved, tmp_path):
        folder, good = saved("s2a")
        plain = changed_copy(folder, tmp_path, config={"structure_targets": None})
        assert torch.equal(logits(PeftModel.from_pretrained(base_model(), plain)), good)

    @pytest.mark.parametrize("text", ["", "{", "[]"])
    def test_no_json(self, text, saved, tmp_path):
        bad = changed_copy(saved("s2a")[0], tmp_path)
        (bad / CONFIG).write_text(text)
        model = base_model()
        before = snapshot(model)
        with pytest.raises((ValueError, TypeError)):
            PeftModel.from_pretrained(model, bad)
        assert_untouched(model, before)


class TestRoundTrips:
    @pytest.mark.parametrize(
        "config",
        [
            S2ABiasConfig(train_norm_scale=False),
            S2AConfig(structures=("side", "prompt"), num_prompt_tokens=3, side_rank=5, side_alpha=2.5),
            S2ASideConfig(target_modules=r".*\.(fc1|attention)", side_activation="linear", side_init="svd"),
            S2AConfig(target_modules=["mlp", "attention", "fc1"], exclude_modules=["layers.0.mlp"]),
            S2ABiasConfig(layers_to_transform=[1], layers_pattern="layers", modules_to_save=["layernorm"]),
        ],
    )
    def test_options_survive(self, config, tmp_path):
        model = get_peft_model(base_model(), config)
        train_a_little(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
        was, now = model.peft_config["default"].to_dict(), loaded.peft_config["default"].to_dict()
        # PEFT fills in what it knows of the base model when it saves, and the mode when it loads.
        for key in ("auto_mapping", "inference_mode"):
            was.pop(key), now.pop(key)
        assert now == was
        assert torch.equal(logits(loaded), logits(model))

    @every_s2a
    def test_modules_wrapped_in_checkpoints_are_saved_and_loaded(self, method, tmp_path):
        """By torch's `checkpoint_wrapper`, as Accelerate's FSDP plugin does: PEFT looks for them by other names."""
        plain, wrapped = trained(method), trained(method)
        apply_activation_checkpointing(wrapped, check_fn=lambda module: isinstance(module, ViTLayer))
        assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_modules())
        plain.save_pretrained(tmp_path / "plain"), wrapped.save_pretrained(tmp_path / "wrapped")
        expected, actual = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "wrapped"))
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        again = get_peft_model(base_model(), make_config(method))
        apply_activation_checkpointing(again, check_fn=lambda module: isinstance(module, ViTLayer))
        set_peft_model_state_dict(again, expected)
        assert torch.equal(logits(again), logits(plain))

    @every_s2a
    def test_a_state_that_lacks_tensors_is_not_saved(self, method, tmp_path):
        model = trained(method)
        state = model.state_dict()
        key = next(key for key in state if "s2a_" in key)
        lacks_one = {name: tensor for name, tensor in state.items() if name != key}
        with pytest.raises(ValueError, match=r"`state_dict` lacks 1 of the \d+ tensors"):
            model.save_pretrained(tmp_path, state_dict=lacks_one)
        of_a_wrapper = {f"module.{name}": tensor for name, tensor in state.items()}
        with pytest.raises(ValueError, match=r"`state_dict` lacks (\d+) of the \1 tensors"):
            model.save_pretrained(tmp_path, state_dict=of_a_wrapper)
        assert not list(tmp_path.glob("*.safetensors"))

    @every_method
    def test_training_goes_on_where_it_stopped(self, method, saved):
        folder, _ = saved(method)
        losses = []
        for _ in range(2):
            model = PeftModel.from_pretrained(base_model(), folder, is_trainable=True)
            losses.append(train_a_little(model))
        assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
