"""Pretraining the backbone from idx files, and the checkpoint that ships with the examples."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from example_scripts import EXAMPLES, run_script
from PIL import Image
from pretrain_backbone import Arguments, accuracy, augment, pixel_values, read_idx, read_split
from transformers import AutoImageProcessor, AutoModelForImageClassification


def write_idx(path, values):
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def test_a_short_run_saves_a_checkpoint_with_processor_and_card(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 64), ("t10k", 16)):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", generator.integers(0, 256, (count, 28, 28)))
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", generator.integers(0, 10, (count,)))
    printed = run_script(
        *(EXAMPLES / "pretrain_backbone.py", "--data_dir", tmp_path, "--output_dir", tmp_path / "out"),
        *("--epochs", "1", "--batch_size", "16", "--hidden_size", "16", "--num_layers", "1", "--num_heads", "2"),
    )
    assert "test accuracy" in printed
    assert "on the 16 test images" in (tmp_path / "out" / "README.md").read_text()
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path / "out", num_labels=3, ignore_mismatched_sizes=True
    )
    image_processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    inputs = image_processor([Image.new("L", (8, 8))], return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 3)
    assert model.dtype == torch.float32


def test_the_processor_makes_what_the_model_was_trained_on():
    image = torch.arange(28 * 28, dtype=torch.int64).remainder(256).to(torch.uint8).view(1, 28, 28)
    image_processor = AutoImageProcessor.from_pretrained(EXAMPLES / "backbone")
    processed = image_processor([Image.fromarray(image[0].numpy())], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processed, pixel_values(image), rtol=0, atol=1e-6)


def test_augmentation_crops_and_mirrors_each_image_on_its_own():
    images = torch.randint(0, 256, (200, 28, 28), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    outputs = augment(images, 0, generator)
    same, mirrored = (outputs == images).all((1, 2)), (outputs == images.flip(-1)).all((1, 2))
    assert (same ^ mirrored).all() and 60 < mirrored.sum() < 140
    padded = torch.nn.functional.pad(images, [2] * 4)
    windows = padded.unfold(1, 28, 1).unfold(2, 28, 1).flatten(1, 2)
    for output, crops in zip(augment(images, 2, generator), windows, strict=True):
        assert (crops == output).all((1, 2)).any() or (crops.flip(-1) == output).all((1, 2)).any()


def test_missing_and_truncated_data_say_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match="dataset-fashion-mnist"):
        read_idx(tmp_path / "train-images-idx3-ubyte.gz")
    write_idx(tmp_path / "whole.gz", np.zeros((4, 28, 28)))
    raw = gzip.decompress((tmp_path / "whole.gz").read_bytes())
    (tmp_path / "part.gz").write_bytes(gzip.compress(raw[:-1]))
    with pytest.raises(SystemExit, match="truncated"):
        read_idx(tmp_path / "part.gz")


def test_the_shipped_backbone_is_small_and_loads_for_other_labels():
    assert sum(file.stat().st_size for file in (EXAMPLES / "backbone").iterdir()) < 5e6
    model = AutoModelForImageClassification.from_pretrained(
        EXAMPLES / "backbone", num_labels=10, ignore_mismatched_sizes=True
    )
    assert model(pixel_values=torch.zeros(1, 3, 28, 28)).logits.shape == (1, 10)


@pytest.mark.skipif(not Path(Arguments.data_dir).is_dir(), reason="needs the package dataset-fashion-mnist")
def test_the_shipped_backbone_knows_fashion_mnist():
    images, labels = read_split(Path(Arguments.data_dir), "t10k")
    model = AutoModelForImageClassification.from_pretrained(EXAMPLES / "backbone")
    assert accuracy(model, images[:2000], labels[:2000]) > 0.88
