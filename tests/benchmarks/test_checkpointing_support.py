"""The walk over transformers' registry says of which models checkpointing is not to be had."""

import json

import checkpointing
import pytest
import torch
from environment import RESULTS
from transformers import AutoConfig, AutoModelForImageClassification


@pytest.fixture(scope="module")
def recorded():
    rows = json.loads((RESULTS / "checkpointing.json").read_text())["rows"]
    return {row["model_type"]: row["supported"] for row in rows}


@pytest.mark.parametrize(
    "model_type", ["resnet", "convnext", "pvt", "regnet", "efficientnet", "vit", "swin", "dinov2"]
)
def test_models_raise_where_the_record_says_so(recorded, model_type):
    sizes = {"pvt": {"depths": [1, 1, 1, 1]}}.get(model_type, {})
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(AutoConfig.for_model(model_type, **sizes))
    assert model.supports_gradient_checkpointing is recorded[model_type]["classification"]
    if recorded[model_type]["classification"]:
        model.activation_checkpointing_enable()
    else:
        with pytest.raises(ValueError, match="checkpointing"):
            model.activation_checkpointing_enable()


def test_others_that_the_documentation_names(recorded):
    assert recorded["rt_detr"] == {"object detection": False}
    assert recorded["upernet"] == {"semantic segmentation": False}


def test_the_walk_reads_classes():
    rows = {
        row["model_type"]: row["supported"]
        for row in checkpointing.walk({"c": checkpointing.TASKS["depth estimation"]})
    }
    assert rows["dpt"] == {"c": True} and rows["glpn"] == {"c": False}
