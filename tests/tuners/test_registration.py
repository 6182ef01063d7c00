"""Importing the package makes S2A known to PEFT and transformers, once and harmlessly."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
from forked import run_code
from peft import PeftConfig, PeftType, get_peft_config
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from peft_s2a import S2ABiasConfig, S2AConfig, S2AModel, S2APromptConfig, S2ASideConfig
from peft_s2a.registration import PEFT_TYPES, PREFIX, add_peft_types, register


CONFIGS = {"S2A": S2AConfig, "S2A_BIAS": S2ABiasConfig, "S2A_PROMPT": S2APromptConfig, "S2A_SIDE": S2ASideConfig}


@pytest.mark.parametrize(("name", "config_class"), CONFIGS.items())
def test_each_type_is_registered(name, config_class):
    peft_type = PeftType[name]
    assert peft_type == name and peft_type in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] is config_class
    assert PEFT_TYPE_TO_TUNER_MAPPING[peft_type] is S2AModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] == PREFIX
    assert peft_type not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    assert config_class().peft_type is peft_type
    assert isinstance(get_peft_config({"peft_type": name}), config_class)


def test_registering_again_changes_nothing():
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType)
    add_peft_types()
    register(CONFIGS, S2AModel)
    assert (dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType)) == before


def test_pefts_own_types_are_unharmed():
    assert PeftType("LORA") is PeftType.LORA
    assert len({member.value for member in PeftType}) == len(list(PeftType))
    assert set(PEFT_TYPES) <= {member.value for member in PeftType}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_config_names_its_type_in_plain_json(name, tmp_path):
    config = CONFIGS[name](target_modules=["b", "a"], exclude_modules=["c"])
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == name
    assert written["target_modules"] == ["a", "b"]
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is CONFIGS[name] and loaded == config


def test_reloading_is_harmless():
    # As notebooks do it: the old classes stay registered, and the new ones work with them.
    run_code(
        """
        import importlib, warnings
        import peft_s2a, peft_s2a.config, peft_s2a.registration
        from peft import get_peft_model
        from torch import nn
        warnings.simplefilter("error", UserWarning)
        for module in (peft_s2a.registration, peft_s2a.config, peft_s2a):
            importlib.reload(module)
        model = get_peft_model(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), peft_s2a.S2ABiasConfig())
        assert any("s2a_bias" in name for name, _ in model.named_parameters())
        """
    )


def test_imported_last_and_then_forked():
    script = """
        import multiprocessing
        import transformers, peft
        import peft_s2a
        from peft import PeftType

        def types(_):
            import importlib
            importlib.reload(peft_s2a)
            return [PeftType[name].value for name in peft_s2a.registration.PEFT_TYPES]

        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(types, range(2)) == [list(peft_s2a.registration.PEFT_TYPES)] * 2
    """
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(script)]
    subprocess.run(command, check=True)


class TestConfig:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"structures": "bias"}, "`structures` must be a tuple"),
            ({"structures": ()}, "one or more of"),
            ({"structures": ("bias", "lora")}, "'lora'"),
            ({"num_prompt_tokens": 0}, "`num_prompt_tokens` must be a positive integer, got 0"),
            ({"num_prompt_tokens": True}, "`num_prompt_tokens` must be a positive integer"),
            ({"side_rank": 4.0}, "`side_rank` must be a positive integer, got 4.0"),
            ({"side_rank": "32"}, "`side_rank` must be a positive integer, got '32'"),
            ({"side_alpha": -1}, "`side_alpha` must be a positive number up to 1e\\+06, got -1"),
            ({"side_mode": "stairs"}, "`side_mode` must be one of 'residual', 'ladder', got 'stairs'"),
            ({"side_activation": "relu"}, "`side_activation` must be one of 'gelu', 'linear'"),
            ({"side_init": "zeros"}, "`side_init` must be one of 'orthogonal', 'svd'"),
            ({"target_modules": [1]}, "`target_modules` must be None, a string or a list of strings"),
            ({"exclude_modules": 3}, "`exclude_modules` must be None, a string or a list of strings"),
            ({"modules_to_save": "head"}, "`modules_to_save` must be None or a list of names"),
            ({"target_modules": "fc1", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used when"),
            ({"target_modules": "fc1", "layers_pattern": "layers"}, "`layers_pattern` cannot be used when"),
            ({"layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
            ({"structure_targets": ["fc1"]}, "`structure_targets` must map"),
            ({"structure_targets": {"lora": ["fc1"]}}, "`structure_targets` must map"),
            ({"structure_targets": {"bias": "fc1"}}, "`structure_targets` must map"),
            ({"structure_targets": {"bias": [1]}}, "`structure_targets` must map"),
            ({"task_type": "IMAGES"}, "Invalid task type"),
        ],
    )
    def test_bad_arguments_are_named(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            S2AConfig(**kwargs)

    def test_a_ladder_stands_alone(self):
        assert S2AConfig(structures=["side"], side_mode="ladder").structures == ("side",)
        with pytest.raises(ValueError, match=r"cannot be combined .* pass `structures=\('side',\)`"):
            S2AConfig(side_mode="ladder")

    def test_structures_keep_one_order(self):
        assert S2AConfig(structures=["side", "bias", "side"]).structures == ("bias", "side")
