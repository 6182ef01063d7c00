"""What one of several processes holds. That it is so is measured in `tests/benchmarks/test_ranks.py`."""

import json
import math

import pytest
import torch
from test_plan import SIZES, TINY
from transformers import ViTConfig

from peft_s2a.cli import Sharding
from peft_s2a.memory import blocks_to_shard, estimate_memory, extrapolate_memory
from peft_s2a.memory.methods import METHODS
from peft_s2a.memory.models import VisionModel
from peft_s2a.memory.plan import plan_memory
from peft_s2a.memory.sharding import ENGINES, REDUCE_BUCKET_SIZE


@pytest.fixture(scope="module")
def lora():
    deep = VisionModel("deep", ViTConfig(**SIZES | {"num_hidden_layers": 4}, image_size=32, patch_size=8))
    return METHODS["lora"].apply(deep.build()), 2


@pytest.fixture(scope="module")
def whole(lora):
    return estimate_memory(*lora)


def trained_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def test_ddp_adds_buckets_as_large_as_the_gradients(lora, whole):
    report = estimate_memory(*lora, processes=2)
    assert report.sharding == "ddp" and report.processes == 2
    assert report.peak.engine == whole.gradient_bytes == trained_bytes(lora[0])
    assert report.peak_bytes == whole.peak_bytes + report.peak.engine
    assert report.peak_bytes == estimate_memory(*lora, processes=1000, sharding="none").peak_bytes


def test_fsdp2_holds_rows_of_each_parameter_and_gathers_block_by_block(lora, whole):
    model, batch = lora
    report = estimate_memory(model, batch, processes=3, sharding="fsdp2")

    def shards(module):
        return sum(math.ceil(len(p) / 3) * (p.numel() // len(p)) * p.element_size() for p in module.parameters())

    blocks = [model.get_submodule(name) for name in blocks_to_shard(model)]
    root = shards(model) - sum(map(shards, blocks))
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert len(blocks) == 4
    assert report.parameter_bytes == shards(model) + buffers < whole.parameter_bytes / 2
    assert report.optimizer_bytes < whole.optimizer_bytes / 2 and report.gradient_bytes < whole.gradient_bytes
    # In the backward pass: what lies in no block, the block at work, and the next one on its way.
    assert report.peak.phase == "backward"
    assert report.peak.engine == pytest.approx(3 * (root + 2 * shards(blocks[0])), rel=0.01)
    assert report.kept == whole.kept


def test_blocks_are_those_of_the_backbone_and_none_under_a_ladder():
    assert blocks_to_shard(METHODS["s2a"].apply(TINY.build())) == [
        f"base_model.model.vit.layers.{i}" for i in range(2)
    ]
    ladder = METHODS["s2a-ladder"].apply(TINY.build())
    assert blocks_to_shard(ladder) == []
    report = estimate_memory(ladder, 2, processes=2, sharding="fsdp2")
    everything = sum(p.numel() * p.element_size() for p in ladder.parameters())
    assert report.parameter_bytes < everything <= max(row[4] for row in report.timeline)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_zero_shares_out_state_and_takes_its_bucket_whatever_is_trained(engine, lora, whole):
    small = estimate_memory(*lora, processes=4, sharding=engine, reduce_bucket_size=1000)
    default = estimate_memory(*lora, processes=4, sharding=engine)
    assert small.optimizer_bytes == pytest.approx(whole.optimizer_bytes / 4, rel=0.05)
    assert default.peak.engine >= 4 * REDUCE_BUCKET_SIZE > 100 * small.step_peak_bytes
    if engine == "zero3":  # none of this model's parameters is large enough not to stay gathered
        assert small.parameter_bytes == pytest.approx(1.25 * whole.parameter_bytes, rel=0.01)
    else:
        assert whole.parameter_bytes <= small.parameter_bytes < whole.parameter_bytes + 4 * 8 * 4


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"processes": 0}, "processes: must be a positive integer, got 0"),
        ({"processes": 2.5}, "processes: must be a positive integer, got 2.5"),
        ({"processes": 2, "sharding": "fsdp"}, "sharding: must be one of ddp, fsdp2, zero2, zero3"),
        ({"sharding": "fsdp2"}, "sharding: 'fsdp2' is for several processes"),
        ({"processes": 2, "reduce_bucket_size": 10}, "reduce_bucket_size: is a setting of zero2 and zero3"),
        ({"processes": 2, "sharding": "zero2", "reduce_bucket_size": 0}, "reduce_bucket_size: must be positive"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(lora, arguments, hint):
    with pytest.raises(ValueError, match=hint):
        estimate_memory(*lora, **arguments)
    with pytest.raises(ValueError, match=hint):
        plan_memory(TINY, {}, **arguments)


@pytest.mark.slow
def test_larger_batches_are_extrapolated_with_the_engine(lora):
    small, large = (estimate_memory(lora[0], size, processes=2, sharding="fsdp2") for size in (2, 4))
    report = extrapolate_memory(small, large, 6)
    assert report.peak.engine == large.peak.engine > 0 and report.processes == 2 and report.sharding == "fsdp2"
    assert report.peak_bytes > large.peak_bytes


def test_a_plan_speaks_of_one_process_everywhere():
    from peft_s2a.memory.html import plan_page

    plan = plan_memory(TINY, {"lora": METHODS["lora"]}, batch_size=2, processes=2, sharding="fsdp2", budget=2**20)
    report = plan.rows[0].report
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["processes"] == 2 and data["sharding"] == "fsdp2"
    assert data["methods"][0]["report"]["peak"]["engine"] == report.peak.engine
    page = plan_page(plan)
    for text in (str(report), page):
        assert "in each of 2 processes (FSDP2)" in " ".join(text.split())
    assert f"{report.peak.engine / 2**20:,.2f}" in page and "added by the engine" in page


@pytest.mark.slow
def test_pictures_show_what_the_engine_adds(tmp_path):
    plan = plan_memory(TINY, {"lora": METHODS["lora"]}, batch_size=2, processes=2, sharding="fsdp2")
    for draw, name in ((plan.plot, "plan.svg"), (plan.rows[0].report.plot, "report.svg")):
        draw(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 0


def test_the_command_line_knows_every_engine():
    assert [one.value for one in Sharding] == ["none", *ENGINES]


@pytest.mark.slow
def test_half_precision_has_float32_masters_under_deepspeed():
    for engine in ("zero2", "zero3"):
        half, full = (
            plan_memory(
                TINY, {"lora": METHODS["lora"]}, dtype=dtype, processes=2, sharding=engine, reduce_bucket_size=8
            )
            .rows[0]
            .report
            for dtype in (torch.bfloat16, torch.float32)
        )
        assert (
            half.optimizer_bytes == pytest.approx(full.optimizer_bytes, rel=0.05)
            and half.parameter_bytes < full.parameter_bytes
        )
