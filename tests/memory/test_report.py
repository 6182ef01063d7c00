import json

import pytest
from small_models import tuned

from peft_s2a.memory import KeptBytes, MemoryReport, PeakBytes, estimate_memory


MiB = 2**20


@pytest.fixture
def report():
    return MemoryReport(
        source="estimate",
        device="cpu",
        batch_size=4,
        trainable_parameters=1000,
        total_parameters=100_000,
        parameter_bytes=30 * MiB,
        gradient_bytes=MiB,
        optimizer_bytes=2 * MiB,
        batch_bytes=MiB,
        saved_bytes=12 * MiB,
        by_operator={"gelu": KeptBytes(full_precision=8 * MiB), "s2a::activation": KeptBytes(quantized=4 * MiB)},
        by_module={
            "layers.0.act": KeptBytes(full_precision=5 * MiB),
            "layers.1.act": KeptBytes(full_precision=3 * MiB, quantized=4 * MiB),
        },
        peak=PeakBytes(
            30 * MiB, MiB, 2 * MiB, MiB, 12 * MiB, 5 * MiB, "backward", "layers.1.act", "aten::gelu_backward"
        ),
        unplanned={"layers.0": "a hook looks into its Linear", "layers.1": "a hook looks into its Linear"},
        timeline=(("forward", 0, 12 * MiB, 4 * MiB), ("backward", MiB, 12 * MiB, 5 * MiB)),
    )


def test_sums(report):
    assert report.peak_bytes == 51 * MiB
    assert report.step_peak_bytes == 18 * MiB
    assert report.kept == KeptBytes(full_precision=8 * MiB, quantized=4 * MiB)


def test_text_shows_peak_place_and_operators(report):
    text = str(report)
    assert "51.00" in text and "18.00" in text and "1.00%" in text
    assert "backward pass, at aten::gelu_backward of layers.1.act" in text
    assert "s2a::activation" in text and "layers.*.act" in text
    assert "Without a plan: layers.* (2), because a hook looks into its Linear." in text
    assert "\x1b" not in text


def test_dict_is_json_and_holds_the_sums(report):
    data = json.loads(json.dumps(report.to_dict()))
    assert data["peak_bytes"] == report.peak_bytes and data["step_peak_bytes"] == report.step_peak_bytes
    assert data["by_operator"]["gelu"] == {"full_precision": 8 * MiB, "quantized": 0, "masks": 0}
    assert data["peak"]["module"] == "layers.1.act"
    assert "timeline" not in data


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_writes_a_picture(report, tmp_path, suffix):
    path = tmp_path / f"report.{suffix}"
    report.plot(path)
    start = path.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == "png" else b"<?xml" in start


def test_timeline_reaches_the_peak():
    report = estimate_memory(tuned("vit", "lora"), 2)
    assert max(sum(row[1:]) for row in report.timeline) == report.step_peak_bytes
    phases = [row[0] for row in report.timeline]
    assert phases == sorted(phases, key=["forward", "backward", "optimizer"].index)
    assert set(phases) == {"forward", "backward", "optimizer"}
