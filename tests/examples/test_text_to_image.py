"""Text-to-image on a tiny pipeline with random weights: the denoiser learns its pictures and the adapter is saved."""

import json

import numpy as np
import pytest
from example_scripts import EXAMPLES, run_script
from peft import PeftModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, set_seed


diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """Stable Diffusion with one stage of 16 channels, and a vocabulary of letters."""
    folder = tmp_path_factory.mktemp("pipeline")
    set_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=8)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(16,), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
            cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D",),
        ),
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=8, sample_size=8),
        text_encoder=CLIPTextModel(text), tokenizer=tokenizer, scheduler=diffusers.DDPMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_it_learns_and_saves(pipeline_folder, tmp_path):
    (tmp_path / "images").mkdir()
    for index, colour in enumerate(("red", "blue")):
        Image.new("RGB", (20, 16), colour).save(tmp_path / "images" / f"{index}.png")
    printed = run_script(
        *(EXAMPLES / "text_to_image.py", "--pipeline", pipeline_folder, "--images", tmp_path / "images"),
        *("--prompt", "a sks dog", "--resolution", "8", "--steps", "60", "--batch_size", "4"),
        *("--learning_rate", "1e-2", "--output_dir", tmp_path / "out"),
        quiet=False,
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert np.mean(results["losses"][-15:]) < 0.9 * np.mean(results["losses"][:3])
    assert results["memory"]["s2a"]["saved_bytes"] < results["memory"]["lora"]["saved_bytes"] / 2
    assert "kept for backward" in printed
    unet = diffusers.UNet2DConditionModel.from_pretrained(pipeline_folder, subfolder="unet")
    PeftModel.from_pretrained(unet, tmp_path / "out")
