"""The memory and speed benchmark's logic, on models of a few thousand parameters."""

import memory_and_speed
import pytest
from memory_and_speed import METHODS, PRESETS, Case, measure
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification


def small_model(case, device):
    if case.backbone == "resnet50":
        config = ResNetConfig(num_labels=100, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1])
        return ResNetForImageClassification(config)
    size = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    return ViTForImageClassification(
        ViTConfig(num_labels=100, image_size=case.image_size, num_hidden_layers=case.layers or 1, **size)
    )


@pytest.fixture(autouse=True)
def _small_models(monkeypatch):
    monkeypatch.setattr(memory_and_speed, "build", small_model)


@pytest.fixture(scope="module")
def vit_rows():
    patch = pytest.MonkeyPatch()
    patch.setattr(memory_and_speed, "build", small_model)
    rows = measure(Case("vit-b", tuple(METHODS), batch_size=2, image_size=32), rounds=1, seed=0, device="cpu")
    patch.undo()
    return {row["method"]: row for row in rows}


def test_every_method_is_measured_or_skipped_with_a_reason(vit_rows):
    assert set(vit_rows) == set(METHODS)
    skipped = {name for name, row in vit_rows.items() if "skipped" in row}
    assert skipped == {"prompt tuning", "prefix tuning"}  # PEFT puts their tokens before text
    for name in set(METHODS) - skipped:
        row = vit_rows[name]
        assert row["peak_bytes"] > 0 and row["step_seconds"] > 0 and row["trainable"] > 0, name


def test_the_methods_are_what_they_are_called(vit_rows):
    trainable = {name: row.get("trainable") for name, row in vit_rows.items()}
    kept = {name: row.get("saved_bytes_per_image") for name, row in vit_rows.items()}
    assert trainable["LoRA-FA"] < trainable["LoRA"] < trainable["DoRA"] < trainable["full fine-tuning"]
    assert kept["LoRA-FA"] < kept["LoRA"] < kept["full fine-tuning"]
    assert kept["LoRA + checkpointing"] < kept["LoRA"]
    assert kept["S2A"] < kept["S2A, activations in full precision"]
    assert trainable["S2A"] == trainable["S2A, no tiles"] == trainable["S2A, not in place"]


def test_what_a_backbone_does_not_support_is_skipped():
    methods = ("LoRA + checkpointing", "VeLoRA", "LN tuning", "S2A")
    rows = measure(Case("resnet50", methods, batch_size=2, image_size=32), rounds=1, seed=0, device="cpu")
    assert ["skipped" in row for row in rows] == [True, True, True, False]
    assert "does not support gradient checkpointing" in rows[0]["skipped"]


def test_depth_can_be_changed():
    shallow, deep = (
        measure(Case("vit-b", ("LoRA",), 2, 32, layers=layers, axis="blocks"), 1, 0, "cpu")[0] for layers in (1, 3)
    )
    assert deep["saved_bytes_per_image"] > 2 * shallow["saved_bytes_per_image"]


def test_growth_is_the_slope_of_a_line():
    rows = [
        {"axis": "images", "backbone": "b", "method": "m", "batch_size": size, "image_size": 224, "layers": None,
         "peak_bytes": 100 + 7 * size, "step_seconds": 1 + 0.5 * size}
        for size in (2, 4, 8)
    ]  # fmt: skip
    rows.append({**rows[0], "axis": None, "peak_bytes": 10**9})
    (line,) = memory_and_speed.slopes(rows)
    assert line["peak_bytes_slope"] == pytest.approx(7) and line["peak_bytes_intercept"] == pytest.approx(100)
    assert line["step_seconds_slope"] == pytest.approx(0.5)
    assert line["at"] == [2, 4, 8]


def test_ratios_are_to_lora_under_the_same_circumstances():
    rows = [
        {"backbone": "b", "method": method, "batch_size": size, "image_size": 224, "layers": None, "autocast": False,
         "axis": None}
        for size in (2, 4)
        for method in ("LoRA", "S2A")
    ]  # fmt: skip
    assert memory_and_speed.lora_of(rows[3], rows) is rows[2]
    assert memory_and_speed.lora_of(rows[1], rows) is rows[0]
    assert memory_and_speed.lora_of(rows[1], rows[1:]) is None


def test_presets_name_known_methods():
    for preset in PRESETS.values():
        assert all(set(case.methods) <= set(METHODS) for case in preset.cases)


def test_tables_and_plots_can_be_drawn(vit_rows, tmp_path):
    rows = list(vit_rows.values())
    assert memory_and_speed.table_of(rows).row_count == len(rows)
    memory_and_speed.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
