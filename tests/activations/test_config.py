"""ActivationQuantizationConfig as plain data."""

import json

import pytest

from peft_s2a import ActivationQuantizationConfig


class TestSettings:
    def test_a_name_goes_before_a_kind_and_a_longer_name_before_a_shorter(self):
        config = ActivationQuantizationConfig(bits={"norm": 8, "default": 3, "mlp.act": 2, "0.mlp.act": 1})
        found = [
            config.quantizer(kind, name).bits
            for kind, name in (
                ("norm", "layers.0.norm"), ("attention", "layers.0.attn"), ("activation", "layers.1.mlp.act"),
                ("activation", "layers.0.mlp.act"), ("activation", "layers.1.xmlp.act"),
            )
        ]  # fmt: skip
        assert found == [8, 3, 2, 1, 3]

    def test_a_name_is_for_everything_inside_unless_more_is_said(self):
        config = ActivationQuantizationConfig(bits={"layer.0": 8, "layer.1:attention": 2, "0.attention": 3, "norm": 1})
        found = [
            config.quantizer(kind, name).bits
            for kind, name in (
                ("norm", "vit.layer.0"), ("norm", "vit.layer.0.norm"), ("attention", "vit.layer.1.attention.inner"),
                ("softmax", "vit.layer.1.attention.inner"), ("attention", "vit.layer.0.attention.inner"),
                ("norm", "vit.layer.10.norm"),
            )
        ]  # fmt: skip
        assert found == [8, 8, 2, 4, 3, 1]

    def test_levels_go_to_the_activation_function_they_name(self):
        config = ActivationQuantizationConfig(bits=1, levels={"1.act": [0.1, 0.9]})
        assert config.quantizer("activation", "layers.1.act").levels == (0.1, 0.9)
        assert config.quantizer("activation", "layers.11.act").levels is None
        assert config.quantizer("norm", "layers.1.act").levels is None

    def test_groups_are_finer_for_attention_unless_heads_are_narrow(self):
        config = ActivationQuantizationConfig()
        sizes = [config.quantizer("attention", channels=channels).group_size for channels in (None, 64, 32, 24)]
        assert sizes == [16, 16, 32, 32]
        assert config.quantizer("norm").group_size == 32
        assert ActivationQuantizationConfig(group_size=8).quantizer("attention", channels=32).group_size == 8

    def test_skipped_modules_take_what_is_in_them_along(self):
        config = ActivationQuantizationConfig(skip_modules=["layers.1", "head"])
        names = ("layers.1", "layers.1.mlp.act", "model.layers.1.mlp", "layers.11", "head", "ahead")
        assert [config.skips(name) for name in names] == [True, True, True, False, True, False]


class TestPlainData:
    def test_survives_json(self):
        config = ActivationQuantizationConfig(
            bits={"norm": 8, "a.act": 2}, levels={"a.act": (0, 0.3, 0.6, 1)}, skip_modules=("head",), group_size=16
        )
        assert ActivationQuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"bits": 5}, "bits"), ({"bits": True}, "bits"), ({"bits": {"norm": 7}}, r"bits\['norm'\]"),
            ({"group_size": 0}, "group_size"), ({"group_size": 2**63 - 1}, "group_size"), ({"rounding": "up"}, "rounding"), ({"backend": "cuda"}, "backend"),
            ({"mlp_tiles": "many"}, "mlp_tiles"), ({"mlp_tiles": 0}, "mlp_tiles"), ({"skip_modules": "head"}, "skip_modules"),
            ({"levels": [1, 2]}, "levels"), ({"levels": {"a": [1, 2]}}, "levels"),
            ({"compress_linear_inputs": "no"}, "compress_linear_inputs"), ({"bit": 4}, "bit"),
        ],
    )  # fmt: skip
    def test_wrong_values_are_named(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            ActivationQuantizationConfig.from_dict(wrong)
