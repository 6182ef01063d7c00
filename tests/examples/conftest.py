"""A tiny checkpoint and tiny image folders for the examples to work on."""

import sys
from pathlib import Path

import numpy as np
import pytest
from example_scripts import CLASSES, EXAMPLES
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, set_seed
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil


sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A ViT with random weights for 10 labels, 16 x 16 pixels, with its image processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    set_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=10,
        initializer_range=0.1,  # wide enough for the class token to see the image
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}, do_convert_rgb=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory) -> Path:
    """`train` (48 images) and `validation` (12) with a folder of noisy PNG files for each of `CLASSES`."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 4)):
        for level, name in zip((30, 128, 220), CLASSES, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(generator.normal(level, 20, (20, 24)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root
