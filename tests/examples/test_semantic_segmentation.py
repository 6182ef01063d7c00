"""Semantic segmentation on generated scenes: it learns, its metric counts, and memory stands side by side."""

import json

import evaluate
import numpy as np
import pytest
import torch
from example_scripts import EXAMPLES, run_script
from peft import PeftModel
from semantic_segmentation import CLASSES, Arguments, load_model, scenes
from transformers import SegformerConfig, SegformerForSemanticSegmentation


def test_it_learns_and_saves(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 1], hidden_sizes=[32, 64], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=32, initializer_range=0.1,
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(checkpoint)
    printed = run_script(
        *(EXAMPLES / "semantic_segmentation.py", "--output_dir", tmp_path, "--steps", "25", "--batch_size", "4"),
        *("--image_size", "64", "--eval_images", "8", "--learning_rate", "5e-3"),
        *("--model_name_or_path", checkpoint),
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert np.mean(results["losses"][-5:]) < 0.8 * results["losses"][0]
    assert results["mean_iou"]["after"] > results["mean_iou"]["before"]
    assert results["memory"]["s2a"] < results["memory"]["lora"] / 2
    assert "mean IoU" in printed and "kept for backward" in printed
    PeftModel.from_pretrained(load_model(Arguments(model_name_or_path=str(checkpoint))), tmp_path)


def test_every_class_is_drawn():
    batch = scenes(4, 64, torch.Generator().manual_seed(0))
    assert batch["pixel_values"].shape == (4, 3, 64, 64)
    assert batch["labels"].unique().tolist() == list(range(len(CLASSES)))


def test_mean_iou_counts_classes_that_occur():
    metric = evaluate.load(str(EXAMPLES / "metrics" / "mean_iou"), keep_in_memory=True)
    result = metric.compute(predictions=[0, 0, 1, 1, 0], references=[0, 1, 1, 1, 255], num_labels=3)
    assert result["per_class_iou"][:2] == pytest.approx([1 / 2, 2 / 3]) and np.isnan(result["per_class_iou"][2])
    assert result["mean_iou"] == pytest.approx(7 / 12)
