"""Two processes hold what is estimated: within 5% of the highest live bytes, everything included; 7% under FSDP2."""

import importlib.util

import pytest
import ranks
from transformers import ViTConfig


# FSDP2 was seen to need one to three activations of a block's width more in a step than is estimated, in a small model 5.3%.
TOLERANCE = {"ddp": 0.05, "fsdp2": 0.07, "zero2": 0.05, "zero3": 0.05}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A ViT of which every part of the peak (weights, optimiser, activations, engine) is some of it."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
    ViTConfig(**sizes, image_size=64, patch_size=8, num_labels=10).save_pretrained(folder)
    return str(folder)


def check(rows):
    for row in rows:
        measured, estimated = row["measured"], row["estimated"]
        case = (row["engine"], row["method"], measured, estimated)
        assert estimated["peak_bytes"] == pytest.approx(measured["peak_bytes"], rel=TOLERANCE[row["engine"]]), case
        assert estimated["parameter_bytes"] == pytest.approx(measured["parameter_bytes"], rel=0.001), case
        assert estimated["parts"]["engine"] > 0


@pytest.mark.slow  # half a minute of one core, most of it spent on imports
def test_two_processes_hold_what_is_estimated(small):
    rows = ranks.compare(small, ["lora"], ["ddp", "fsdp2"], batch_size=4)
    assert len(rows) == 2
    check(rows)


@pytest.mark.slow
def test_the_same_of_other_methods(small):
    methods = ["full", "s2a", "s2a-bias", "s2a-ladder", "lora+checkpointing", "linear"]
    check(ranks.compare(small, methods, ["ddp", "fsdp2"], batch_size=4))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_the_same_under_deepspeed(small, engine):
    check(ranks.compare(small, ["full", "lora", "s2a"], [engine], batch_size=4))
