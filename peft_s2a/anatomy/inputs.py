"""Small inputs that a model takes, made from its configuration and the arguments of its forward pass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from .layers import CONVOLUTIONS, visible_modules


SAMPLES = 2
TOKENS = 8
USUAL_SIZES = (64, 32, 96, 112, 128, 160, 192, 224, 240, 256, 288, 320, 336, 384, 448, 512, 518)
IMAGE_NAMES = ("pixel_values", "pixel_values_videos", "inputs", "input_values", "input_features")
# Arguments that carry what a model reads; if one is left out, what reads it stays unseen.
MODALITIES = (*IMAGE_NAMES, "input_ids", "decoder_input_ids", "x", "sample", "hidden_states", "encoder_hidden_states")


def example_inputs(model: nn.Module) -> Iterator[tuple[dict[str, Any], bool]]:
    """Inputs to be tried in turn: (arguments by name, those under "*" by position; whether they are all that the model
    reads). What cannot be known (image or video, which size) gives several."""
    timm_model = getattr(model, "timm_model", model)
    if hasattr(timm_model, "get_classifier") or hasattr(timm_model, "pretrained_cfg"):
        yield from _timm_inputs(model, timm_model)
        return
    config = getattr(model, "config", None)
    names = _arguments(model)
    if config is None:
        yield from _plain_inputs(model)
    elif isinstance(config, Mapping) or not hasattr(config, "model_type"):
        made = _diffusers_inputs(config, names)
        yield made, True
    else:
        yield from _transformers_inputs(model, config, names)


def _arguments(model: nn.Module) -> list[str]:
    return list(inspect.signature(type(model).forward).parameters)[1:]


def _get(config: Any, *names: str) -> Any:
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if value is not None:
            return value
    return None


def _image_sizes(config: Any) -> list[tuple[int, int]]:
    size = _get(config, "image_size", "crop_size", "pretrain_image_size")
    sizes = [size] if size is not None else [224, 64, 512]
    return [tuple(size) if isinstance(size, (tuple, list)) else (size, size) for size in sizes]


def _timm_inputs(model: nn.Module, timm_model: nn.Module) -> Iterator[tuple[dict[str, Any], bool]]:
    declared_by = (getattr(module, "img_size", None) for module in timm_model.modules())
    sizes = [tuple(size) if isinstance(size, (tuple, list)) else (size, size) for size in declared_by if size]
    settings = getattr(timm_model, "pretrained_cfg", None) or getattr(timm_model, "default_cfg", None) or {}
    channels, *declared = settings.get("input_size") or (3, 224, 224)
    channels = getattr(timm_model, "in_chans", None) or channels
    # A model that was made for other images than its checkpoint does not always say for which.
    for size in dict.fromkeys([*sizes, tuple(declared), *((size, size) for size in USUAL_SIZES)]):
        name = "pixel_values" if timm_model is not model else "*"
        images = torch.empty(SAMPLES, channels, *size)
        yield {name: images if name != "*" else (images,)}, True


def _plain_inputs(model: nn.Module) -> Iterator[tuple[dict[str, Any], bool]]:
    """What the first layer reads, for a model that takes one tensor."""
    required = [
        p
        for p in list(inspect.signature(type(model).forward).parameters.values())[1:]
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    layers = (layer for _, layer in visible_modules(model) if isinstance(layer, (nn.Linear, *CONVOLUTIONS)))
    first = next(layers, None)
    if len(required) > 1 or first is None:
        return
    if isinstance(first, nn.Linear):
        shapes = [(TOKENS, first.in_features), (first.in_features,)]
    else:
        axes = len(first.kernel_size)
        shapes = [(first.in_channels, *[size] * axes) for size in dict.fromkeys((64, 224, *USUAL_SIZES))]
    for shape in shapes:
        yield {"*": (torch.empty(SAMPLES, *shape),)}, True


def _transformers_inputs(model: nn.Module, config: Any, names: list[str]) -> Iterator[tuple[dict[str, Any], bool]]:
    vision = _get(config, "vision_config") or config
    vision = _get(vision, "backbone_config") or vision if _get(vision, "image_size") is None else vision
    channels = _get(vision, "num_channels", "in_channels", "in_chans") or 3
    channels = channels if isinstance(channels, int) else 3
    frames = _get(vision, "num_frames", "frames_per_clip")
    given: dict[str, Any] = {}
    if "input_values" in names:
        given["input_values"] = torch.empty(
            SAMPLES, _get(config, "max_length") or 64, _get(config, "num_mel_bins") or 128
        )
    if "input_ids" in names and "inputs_embeds" not in names[:1]:
        given["input_ids"] = _ids(config)
    if "decoder_input_ids" in names:
        given["decoder_input_ids"] = _ids(config)
    if "input_points" in names:
        given["input_points"] = torch.empty(SAMPLES, 1, 2, 2)
    is_complete = all(
        name in given or name in ("pixel_values", "inputs", "pixel_values_videos")
        for name in names
        if name in MODALITIES
    )
    main = next((name for name in ("pixel_values", "pixel_values_videos", "inputs") if name in names), None)
    if "pixel_values" in names and "pixel_values_videos" in names:
        is_complete = False
    if "spatial_shapes" in names:
        yield {**given, **_flat_patches(vision, channels)}, is_complete
    sizes = _image_sizes(vision)
    for size in sizes:
        shapes = [(SAMPLES, channels, *size)]
        if frames:
            shapes.insert(0, (SAMPLES, frames, channels, *size))
        for shape in shapes if main else [None]:
            images = {main: torch.empty(shape)} if main else {}
            yield {**given, **images}, is_complete
            if "bool_masked_pos" in names and (count := _patches(vision, size, frames)):
                half = torch.arange(count).expand(SAMPLES, -1) % 2 == 0
                yield {**given, **images, "bool_masked_pos": half}, is_complete
            if "input_ids" in given:  # as many texts as images, or several texts for each
                yield {**given, **images, "input_ids": _ids(config).repeat(2, 1)}, is_complete


def _ids(config: Any) -> torch.Tensor:
    text = _get(config, "text_config", "text_encoder", "decoder") or config
    ids = torch.full((SAMPLES, TOKENS), 3)
    end = _get(text, "eos_token_id")
    if isinstance(end, int) and end < (_get(text, "vocab_size") or 0):
        ids[:, -1] = end
    return ids


def _flat_patches(config: Any, channels: int) -> dict[str, Any]:
    """Images as NaFlex models take them (SigLIP 2): as many patches as fit into a square, flat, their grid and a mask."""
    patch, side = _get(config, "patch_size") or 16, math.isqrt(_get(config, "num_patches") or 16)
    height, width = patch if isinstance(patch, (tuple, list)) else (patch, patch)
    return {
        "pixel_values": torch.empty(SAMPLES, side * side, channels * height * width),
        "pixel_attention_mask": torch.ones(SAMPLES, side * side, dtype=torch.long),
        "spatial_shapes": np.full((SAMPLES, 2), side),  # no tensor: a pass without values could not read it
    }


def _patches(config: Any, size: tuple[int, int], frames: int | None) -> int | None:
    patch = _get(config, "patch_size")
    if patch is None:
        return None
    height, width = patch[-2:] if isinstance(patch, (tuple, list)) else (patch, patch)
    tubelet = _get(config, "tubelet_size") or 1
    tubelet = tubelet[0] if isinstance(tubelet, (tuple, list)) else tubelet
    return size[0] // height * (size[1] // width) * ((frames or tubelet) // tubelet)


def _diffusers_inputs(config: Any, names: list[str]) -> dict[str, Any]:
    channels = _get(config, "in_channels") or 4
    size = _get(config, "sample_size")
    size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    width = _get(config, "cross_attention_dim", "joint_attention_dim", "caption_channels") or 32
    width = _get(config, "caption_channels") or width
    width = width[0] if isinstance(width, (tuple, list)) else width
    axes = len(_get(config, "axes_dims_rope") or (0, 0, 0))
    is_image = size[0] is not None
    features = torch.empty(SAMPLES, channels, *size) if is_image else torch.empty(SAMPLES, TOKENS**2, channels)
    made: dict[str, Any] = {
        "sample": features,
        "hidden_states": features,
        "timestep": torch.ones(SAMPLES),
        "encoder_hidden_states": torch.empty(SAMPLES, TOKENS, width),
        "pooled_projections": torch.empty(SAMPLES, _get(config, "pooled_projection_dim") or 1),
        "class_labels": torch.ones(SAMPLES, dtype=torch.long),
        "img_ids": torch.zeros(TOKENS**2, axes),
        "txt_ids": torch.zeros(TOKENS, axes),
    }
    if _get(config, "guidance_embeds"):
        made["guidance"] = torch.ones(SAMPLES)
    if "added_cond_kwargs" in names:
        made["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        if _get(config, "addition_embed_type") == "text_time":
            times = 6 * _get(config, "addition_time_embed_dim")
            text = _get(config, "projection_class_embeddings_input_dim") - times
            made["added_cond_kwargs"] = {
                "text_embeds": torch.empty(SAMPLES, text), "time_ids": torch.ones(SAMPLES, 6)
            }  # fmt: skip
    if "class_labels" in names and _get(config, "num_embeds_ada_norm") is None:
        del made["class_labels"]
    return {name: value for name, value in made.items() if name in names}
