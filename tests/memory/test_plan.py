import json

import pytest
import torch
from transformers import ViTConfig

from peft_s2a.memory import estimate_memory
from peft_s2a.memory.methods import METHODS, Method, lora_targets
from peft_s2a.memory.models import KNOWN_MODELS, VisionModel, find_model
from peft_s2a.memory.plan import plan_memory


SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
TINY = VisionModel("tiny", ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=5))


def test_every_method_is_planned_and_the_order_is_kept():
    plan = plan_memory(TINY, METHODS, batch_size=2)
    assert [row.method.name for row in plan.rows] == list(METHODS)
    reports = {row.method.name: row.report for row in plan.rows}
    assert all(reports.values()), {row.method.name: row.problem for row in plan.rows}
    assert reports["full"].trainable_parameters == reports["full"].total_parameters
    assert reports["linear"].saved_bytes < reports["bias"].saved_bytes < reports["full"].saved_bytes
    assert reports["lora+checkpointing"].saved_bytes < reports["lora"].saved_bytes
    assert json.loads(json.dumps(plan.to_dict()))["methods"][0]["report"]["source"] == "estimate"


def test_budget_adds_the_largest_batch():
    methods = {"lora": METHODS["lora"]}
    peak = plan_memory(TINY, methods, batch_size=6).rows[0].report.peak_bytes
    assert plan_memory(TINY, methods, batch_size=2, budget=peak).rows[0].largest_batch_size == 6
    assert plan_memory(TINY, methods, batch_size=2, budget=1000).rows[0].largest_batch_size == 0


def test_unsupported_method_is_a_row_with_its_problem():
    def refuse(model):
        raise ValueError("not on this model")

    row = plan_memory(TINY, {"none": Method("none", "nothing", refuse)}).rows[0]
    assert row.report is None and row.problem == "not on this model"


def test_checkpointing_is_refused_where_the_model_has_none():
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        METHODS["lora+checkpointing"].apply(find_model("resnet18").build())


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("vit-s", {"q_proj", "v_proj"}),
        ("swin-t", {"q_proj", "v_proj"}),
        ("convnext-t", {"pwconv1", "pwconv2"}),
        ("resnet18", {"convolution"}),
    ],
)
def test_lora_is_put_on_projections_or_linears_or_convolutions_but_no_head(name, targets):
    assert {target.rpartition(".")[2] for target in lora_targets(find_model(name).build())} == targets


def test_lora_is_refused_where_there_is_only_a_head():
    head = torch.nn.Sequential()
    head.add_module("classifier", torch.nn.Linear(4, 2))
    with pytest.raises(ValueError, match="beside its head"):
        lora_targets(head)


def test_known_models_have_their_sizes():
    def millions(name):
        return sum(parameter.numel() for parameter in find_model(name, num_labels=1000).build().parameters()) / 1e6

    published = {"vit-b": 86.6, "swin-t": 28.3, "resnet50": 25.6, "convnext-t": 28.6, "deit-s": 22.1}
    for name, size in published.items():
        assert millions(name) == pytest.approx(size, rel=0.01), name
    assert {"vit-b", "swin-b", "resnet50", "dinov2-g"} <= set(KNOWN_MODELS)


def test_model_from_a_folder(tmp_path):
    TINY.config.save_pretrained(tmp_path)
    model = find_model(str(tmp_path), num_labels=3).build()
    assert model.config.hidden_size == 48 and model.classifier.out_features == 3
    assert next(model.parameters()).device.type == "meta"


def test_image_size_changes_the_model():
    assert find_model("vit-s", image_size=64).config.image_size == 64


def test_backbone_without_classifier_is_trained_on_its_features():
    model = find_model("dinov3_vit", image_size=32)
    assert model.loss_fn is not None
    model.config.num_hidden_layers = 1
    assert estimate_memory(model.build(), 2, loss_fn=model.loss_fn).saved_bytes > 0


def test_unknown_model_names_close_ones():
    with pytest.raises(ValueError, match=r"vit-q: no such model; did you mean .*vit-"):
        find_model("vit-q")


def test_folder_without_config_raises(tmp_path):
    with pytest.raises(ValueError, match="cannot read its configuration"):
        find_model(str(tmp_path))


def test_half_precision_halves_the_parameters():
    methods = {"full": METHODS["full"]}
    whole, half = (plan_memory(TINY, methods, dtype=d).rows[0].report for d in (torch.float32, torch.bfloat16))
    assert 2 * half.parameter_bytes == whole.parameter_bytes
