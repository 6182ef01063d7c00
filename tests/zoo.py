"""Tiny models of many architectures and tasks, built from configurations, each with a batch that it takes.

`families` holds the architectures on which everything is tested; these are there to show that placement is right on any
vision model. Entries are (build, batch): functions without arguments that give the module and its keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
import transformers as t
from families import SWIN
from torch import nn


NUM_LABELS = 5
SIZE = 64
TRUNK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {**TRUNK, "image_size": SIZE, "patch_size": 16}
TEXT = {
    **TRUNK,
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
SWIN_64 = {**SWIN, "image_size": SIZE, "patch_size": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 6,
}  # fmt: skip


def lw_detr() -> t.LwDetrConfig:
    return t.LwDetrConfig(
        d_model=32, num_queries=10, group_detr=2, decoder_layers=2, decoder_ffn_dim=32, num_labels=NUM_LABELS,
        c2f_num_blocks=1, decoder_self_attention_heads=2, decoder_cross_attention_heads=4, projector_scale_factors=[1.0],
        backbone_config={
            "model_type": "lw_detr_vit", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
            "image_size": SIZE, "patch_size": 8, "out_indices": [1, 3], "window_block_indices": [0, 2], "num_windows": 4,
        },
    )  # fmt: skip


def images(
    size: int | tuple[int, int] = SIZE, channels: int = 3, samples: int = 2, **others: Any
) -> Callable[[], dict]:
    def batch() -> dict[str, Any]:
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(samples, channels, height, width), **{k: v() for k, v in others.items()}}

    return batch


def video(frames: int, size: int = 32, **others: Any) -> Callable[[], dict]:
    return lambda: {
        "pixel_values": torch.randn(2, frames, 3, size, size),
        **{key: value() for key, value in others.items()},
    }


def tokens(samples: int = 2, length: int = 8, vocabulary: int = 60) -> Callable[[], torch.Tensor]:
    def ids() -> torch.Tensor:
        found = torch.randint(4, vocabulary, (samples, length))
        found[:, -1] = 2  # end of text: towers take their features there
        return found

    return ids


def with_image_tokens(ids: Callable[[], torch.Tensor], image_token: int, count: int) -> Callable[[], torch.Tensor]:
    def mixed() -> torch.Tensor:
        found = ids()
        return torch.cat([torch.full((len(found), count), image_token), found], dim=1)

    return mixed


def _backbone(name: str) -> Any:
    return {
        "resnet": lambda: t.ResNetConfig(**RESNET, out_features=["stage4"]),
        "resnet4": lambda: t.ResNetConfig(**RESNET, out_features=["stage1", "stage2", "stage3", "stage4"]),
        "swin": lambda: t.SwinConfig(
            **{**SWIN_64, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "embed_dim": 8, "window_size": 2},
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        "convnext": lambda: t.ConvNextConfig(
            hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
        ),
        "dinov2": lambda: t.Dinov2Config(
            **{**VISION, "num_hidden_layers": 4},
            out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
        ),
        "beit": lambda: t.BeitConfig(
            **{**VISION, "num_hidden_layers": 4},
            out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
        ),
        "rt_resnet": lambda: t.RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"]),
        "hgnet": lambda: t.HGNetV2Config(
            **HGNET, out_features=["stage2", "stage3", "stage4"], use_learnable_affine_block=True
        ),
        "vitdet": lambda: t.VitDetConfig(
            **{k: v for k, v in VISION.items() if k != "intermediate_size"}, num_channels=4, pretrain_image_size=SIZE,
            out_features=["stage2"], window_block_indices=[], residual_block_indices=[], mlp_ratio=2,
        ),
        "vitpose": lambda: t.VitPoseBackboneConfig(**TRUNK, image_size=[64, 48], patch_size=[16, 16], out_indices=[2]),
    }[name]()  # fmt: skip


HGNET = {
    "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "embedding_size": 8, "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16, 16, 32], "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [16, 16, 32, 32],
    "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2],
}  # fmt: skip


def _detection_labels() -> list[dict[str, torch.Tensor]]:
    return [
        {"class_labels": torch.tensor([1, 3]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.4, 0.6, 0.5, 0.2]])}
        for _ in range(2)
    ]


def _rt_detr(config_class: type, backbone: str, **kwargs: Any) -> Any:
    return config_class(
        backbone_config=_backbone(backbone), encoder_hidden_dim=32, encoder_ffn_dim=32, encoder_attention_heads=2,
        encoder_in_channels=[16, 16, 32] if backbone == "rt_resnet" else [16, 32, 32], d_model=32, num_queries=8,
        decoder_in_channels=[32, 32, 32], decoder_ffn_dim=32, decoder_layers=2, decoder_attention_heads=2,
        num_denoising=4, decoder_n_points=2, num_labels=NUM_LABELS, freeze_backbone_batch_norms=True,
        anchor_image_size=None, backbone=None, **kwargs,
    )  # fmt: skip


def _sam() -> nn.Module:
    vision = {
        "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE,
        "patch_size": 16, "mlp_ratio": 2.0, "num_pos_feats": 8, "window_size": 2, "global_attn_indexes": [1],
    }  # fmt: skip
    prompt = {"hidden_size": 16, "image_size": SIZE, "patch_size": 16, "mask_input_channels": 8}
    mask = {
        "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    }  # fmt: skip
    return t.SamModel(t.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask))


def _sam2() -> nn.Module:
    hiera = t.Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=[SIZE, SIZE], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[8, 4, 4, 4], global_attention_blocks=[3], window_positional_embedding_background_size=[2, 2],
    )  # fmt: skip
    vision = t.Sam2VisionConfig(
        backbone_config=hiera, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=16,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )  # fmt: skip
    prompt = {"hidden_size": 16, "image_size": SIZE, "patch_size": 16, "mask_input_channels": 8}
    mask = {
        "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
    }  # fmt: skip
    return t.Sam2Model(t.Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask))


def _points() -> torch.Tensor:
    return torch.rand(2, 1, 2, 2) * SIZE


def _masked(patches: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.arange(patches).expand(2, -1) % 2 == 0


def _llava() -> nn.Module:
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**TEXT, num_key_value_heads=2),
            image_token_index=3, image_seq_length=16,
        )
    )  # fmt: skip


def _paligemma() -> nn.Module:
    text = t.GemmaConfig(**TEXT, num_key_value_heads=1, head_dim=8)
    vision = t.SiglipVisionConfig(**VISION, projection_dim=32)
    return t.PaliGemmaForConditionalGeneration(
        t.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=3, projection_dim=32)
    )


def _smolvlm() -> nn.Module:
    vision = {**VISION, "max_num_images": 1}
    text = t.LlamaConfig(**TEXT, num_key_value_heads=2)
    return t.SmolVLMForConditionalGeneration(
        t.SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=3, scale_factor=2)
    )


def _qwen2_5_vl() -> nn.Module:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 14, "window_size": 28,
        "out_hidden_size": 32, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {
        **TEXT, "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    config = t.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=3, video_token_id=4, vision_start_token_id=5,
        vision_end_token_id=6,
    )  # fmt: skip
    return t.Qwen2_5_VLForConditionalGeneration(config)


def _qwen_batch() -> dict[str, torch.Tensor]:
    ids = torch.cat([torch.full((2, 1), 5), torch.full((2, 4), 3), torch.randint(7, 60, (2, 5))], 1)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 3).int(),
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "labels": ids,
    }


def _pretrained_text(cls: type, **kwargs: Any) -> Any:
    return cls(**{**TEXT, **kwargs})


CLIP = {"vision_config": VISION, "text_config": TEXT, "projection_dim": 16}

# Every task of transformers for which there are vision models.
TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    # Classification.
    **{
        f"{name} classification": (
            lambda name=name, kwargs=kwargs: t.AutoModelForImageClassification.from_config(
                t.CONFIG_MAPPING[name](**kwargs, num_labels=NUM_LABELS)
            ),
            images(kwargs.get("image_size", SIZE)),
        )
        for name, kwargs in {
            "vit": VISION,
            "deit": {**VISION, "architectures": ["DeiTForImageClassification"]},
            "beit": VISION,
            "data2vec-vision": VISION,
            "dinov2": VISION,
            "dinov2_with_registers": VISION,
            "ijepa": VISION,
            "vit_msn": VISION,
            "swin": SWIN_64,
            "swinv2": {**SWIN_64, "window_size": 4},
            "donut-swin": SWIN_64,
            "bit": {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_groups": 2},
            "convnext": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
            "convnextv2": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
            "cvt": {"embed_dim": [16, 16, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3], "cls_token": [False, False, True]},
            "efficientnet": {
                "width_coefficient": 0.5, "depth_coefficient": 0.25, "image_size": SIZE, "hidden_dim": 640,
            },
            "focalnet": {
                "image_size": SIZE, "embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3],
                "hidden_sizes": [16, 32],
            },
            "hgnet_v2": HGNET,
            "hiera": {
                "image_size": [64, 64], "embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2],
                "mask_unit_size": [8, 8], "query_stride": [2, 2], "num_query_pool": 1,
                "masked_unit_attention": [True, False],
            },
            "levit": {
                "image_size": SIZE, "hidden_sizes": [16, 32, 48], "num_attention_heads": [1, 2, 3], "depths": [1, 1, 1],
                "key_dim": [8, 8, 8], "architectures": ["LevitForImageClassification"],
            },
            "mobilenet_v1": {"depth_multiplier": 0.25, "image_size": SIZE, "min_depth": 4},
            "mobilenet_v2": {"depth_multiplier": 0.25, "image_size": SIZE},
            "mobilevit": {
                "image_size": SIZE, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
                "num_attention_heads": 2,
            },
            "mobilevitv2": {"image_size": SIZE, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1]},
            "poolformer": {
                "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_encoder_blocks": 4,
            },
            "pvt": {
                "image_size": SIZE, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32],
                "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2],
            },
            "pvt_v2": {
                "image_size": SIZE, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32],
                "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2],
            },
            "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
            "resnet": RESNET,
            "segformer": {
                "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4],
                "mlp_ratios": [2, 2, 2, 2],
            },
            "swiftformer": {
                "depths": [1, 1, 2, 1], "embed_dims": [8, 16, 16, 32], "mlp_ratio": 2, "image_size": SIZE,
            },
            "pp_lcnet": {"scale": 0.25},
            "textnet": {"hidden_sizes": [64, 64, 64, 64, 64]},
        }.items()
    },
    "clip classification": (
        lambda: t.CLIPForImageClassification(t.CLIPConfig(**CLIP, num_labels=NUM_LABELS)), images(),
    ),
    "metaclip-2 classification": (
        lambda: t.MetaClip2ForImageClassification(t.MetaClip2Config(**CLIP, num_labels=NUM_LABELS)), images(),
    ),
    "siglip classification": (
        lambda: t.SiglipForImageClassification(
            t.SiglipConfig(vision_config=VISION, text_config=TEXT, num_labels=NUM_LABELS)
        ),
        images(),
    ),
    "siglip2 classification": (
        lambda: t.Siglip2ForImageClassification(
            t.Siglip2Config(
                vision_config={**TRUNK, "patch_size": 8, "num_patches": 16}, text_config=TEXT, num_labels=NUM_LABELS
            )
        ),
        lambda: {
            "pixel_values": torch.randn(2, 16, 3 * 8 * 8),
            "pixel_attention_mask": torch.tensor([[1] * 12 + [0] * 4, [1] * 16]),
            "spatial_shapes": torch.tensor([[3, 4], [2, 8]]),
        },
    ),
    "perceiver classification": (
        lambda: t.PerceiverForImageClassificationLearned(
            t.PerceiverConfig(
                num_latents=8, d_latents=32, d_model=64, num_blocks=1, num_self_attends_per_block=2,
                num_self_attention_heads=2, num_cross_attention_heads=2, image_size=16, num_labels=NUM_LABELS,
            )
        ),
        lambda: {"inputs": torch.randn(2, 3, 16, 16)},
    ),
    # Video and spectrograms.
    "videomae classification": (
        lambda: t.VideoMAEForVideoClassification(
            t.VideoMAEConfig(**{**VISION, "image_size": 32}, num_frames=4, tubelet_size=2, num_labels=NUM_LABELS)
        ),
        video(4),
    ),
    "timesformer classification": (
        lambda: t.TimesformerForVideoClassification(
            t.TimesformerConfig(**{**VISION, "image_size": 32}, num_frames=2, num_labels=NUM_LABELS)
        ),
        video(2),
    ),
    "vivit classification": (
        lambda: t.VivitForVideoClassification(
            t.VivitConfig(**TRUNK, image_size=32, num_frames=4, tubelet_size=[2, 16, 16], num_labels=NUM_LABELS)
        ),
        video(4),
    ),
    "vjepa2 classification": (
        lambda: t.VJEPA2ForVideoClassification(
            t.VJEPA2Config(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, crop_size=32, patch_size=16,
                frames_per_clip=4, num_pooler_layers=1, pred_hidden_size=32, pred_num_attention_heads=4,
                pred_num_hidden_layers=1, pred_num_mask_tokens=2, num_labels=NUM_LABELS,
            )
        ),
        lambda: {"pixel_values_videos": torch.randn(2, 4, 3, 32, 32)},
    ),
    "ast classification": (
        lambda: t.ASTForAudioClassification(
            t.ASTConfig(**TRUNK, patch_size=8, max_length=32, num_mel_bins=16, num_labels=NUM_LABELS,
                        frequency_stride=8, time_stride=8)
        ),
        lambda: {"input_values": torch.randn(2, 32, 16)},
    ),
    # Semantic and panoptic segmentation.
    "segformer segmentation": (
        lambda: t.SegformerForSemanticSegmentation(
            t.SegformerConfig(
                depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 4],
                mlp_ratios=[2, 2, 2, 2], decoder_hidden_size=16, num_labels=NUM_LABELS,
            )
        ),
        images(),
    ),
    "upernet-swin segmentation": (
        lambda: t.UperNetForSemanticSegmentation(
            t.UperNetConfig(backbone_config=_backbone("swin"), hidden_size=16, auxiliary_channels=8,
                            auxiliary_in_channels=32, num_labels=NUM_LABELS)
        ),
        images(labels=lambda: torch.zeros(2, SIZE, SIZE, dtype=torch.long)),
    ),
    "upernet-convnext segmentation": (
        lambda: t.UperNetForSemanticSegmentation(
            t.UperNetConfig(backbone_config=_backbone("convnext"), hidden_size=16, auxiliary_channels=8,
                            auxiliary_in_channels=16, num_labels=NUM_LABELS)
        ),
        images(128, labels=lambda: torch.zeros(2, 128, 128, dtype=torch.long)),
    ),
    "beit segmentation": (
        lambda: t.BeitForSemanticSegmentation(
            t.BeitConfig(**{**VISION, "num_hidden_layers": 4}, out_indices=[1, 2, 3, 4], pool_scales=[1, 2],
                         num_labels=NUM_LABELS, auxiliary_channels=8)
        ),
        images(labels=lambda: torch.zeros(2, SIZE, SIZE, dtype=torch.long)),
    ),
    "mobilenet_v2 segmentation": (
        lambda: t.MobileNetV2ForSemanticSegmentation(
            t.MobileNetV2Config(depth_multiplier=0.25, image_size=SIZE, num_labels=NUM_LABELS)
        ),
        images(),
    ),
    "mobilevit segmentation": (
        lambda: t.MobileViTForSemanticSegmentation(
            t.MobileViTConfig(
                image_size=SIZE, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
                num_attention_heads=2, aspp_out_channels=16, num_labels=NUM_LABELS,
            )
        ),
        images(),
    ),
    "dpt segmentation": (
        lambda: t.DPTForSemanticSegmentation(
            t.DPTConfig(
                **{**VISION, "num_hidden_layers": 4}, is_hybrid=False, backbone_out_indices=[0, 1, 2, 3],
                neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, num_labels=NUM_LABELS,
            )
        ),
        images(labels=lambda: torch.zeros(2, SIZE, SIZE, dtype=torch.long)),
    ),
    "mask2former segmentation": (
        lambda: t.Mask2FormerForUniversalSegmentation(
            t.Mask2FormerConfig(
                backbone_config=_backbone("swin"), feature_size=32, mask_feature_size=32, hidden_dim=32,
                encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
                dim_feedforward=32, num_queries=6, num_labels=NUM_LABELS, train_num_points=16,
            )
        ),
        lambda: {
            **images()(),
            "mask_labels": [torch.zeros(2, SIZE, SIZE) for _ in range(2)],
            "class_labels": [torch.tensor([0, 2]) for _ in range(2)],
        },
    ),
    "maskformer segmentation": (
        lambda: t.MaskFormerForInstanceSegmentation(
            t.MaskFormerConfig(
                fpn_feature_size=32, mask_feature_size=32, backbone_config=_backbone("swin"),
                decoder_config=t.DetrConfig(**DETR), num_labels=NUM_LABELS,
            )
        ),
        images(),
    ),
    "eomt segmentation": (
        lambda: t.EomtForUniversalSegmentation(
            t.EomtConfig(
                **{k: v for k, v in VISION.items() if k != "intermediate_size"}, mlp_ratio=2, num_blocks=1,
                num_queries=4, num_upscale_blocks=1, num_labels=NUM_LABELS, train_num_points=16,
            )
        ),
        images(),
    ),
    "clipseg segmentation": (
        lambda: t.CLIPSegForImageSegmentation(
            t.CLIPSegConfig(
                vision_config=VISION, text_config=TEXT, projection_dim=16, extract_layers=[0, 1],
                reduce_dim=16, decoder_num_attention_heads=2, decoder_intermediate_size=32,
            )
        ),
        images(input_ids=tokens(), labels=lambda: torch.zeros(2, SIZE, SIZE)),
    ),
    # Detection.
    "detr detection": (
        lambda: t.DetrForObjectDetection(
            t.DetrConfig(**DETR, backbone_config=_backbone("resnet"), use_timm_backbone=False, num_labels=NUM_LABELS)
        ),
        images(labels=_detection_labels),
    ),
    "detr segmentation": (
        lambda: t.DetrForSegmentation(
            t.DetrConfig(
                **{**DETR, "d_model": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8}, backbone_config=_backbone("resnet4"), use_timm_backbone=False,
                num_labels=NUM_LABELS,
            )
        ),
        images(),
    ),
    "lw-detr detection": (lambda: t.LwDetrForObjectDetection(lw_detr()), images(labels=_detection_labels)),
    "conditional-detr detection": (
        lambda: t.ConditionalDetrForObjectDetection(
            t.ConditionalDetrConfig(
                **DETR, backbone_config=_backbone("resnet"), use_timm_backbone=False, num_labels=NUM_LABELS
            )
        ),
        images(labels=_detection_labels),
    ),
    "dab-detr detection": (
        lambda: t.DabDetrForObjectDetection(
            t.DabDetrConfig(
                **{k.replace("d_model", "hidden_size"): v for k, v in DETR.items()},
                backbone_config=_backbone("resnet"), use_timm_backbone=False, num_labels=NUM_LABELS,
            )
        ),
        images(),
    ),
    "deformable-detr detection": (
        lambda: t.DeformableDetrForObjectDetection(
            t.DeformableDetrConfig(
                **DETR, backbone_config=_backbone("resnet4"), use_timm_backbone=False, num_labels=NUM_LABELS,
                num_feature_levels=4,
            )
        ),
        images(128),
    ),
    "rt-detr detection": (
        lambda: t.RTDetrForObjectDetection(_rt_detr(t.RTDetrConfig, "rt_resnet")), images(labels=_detection_labels),
    ),
    "rt-detr-v2 detection": (
        lambda: t.RTDetrV2ForObjectDetection(_rt_detr(t.RTDetrV2Config, "rt_resnet")),
        images(labels=_detection_labels),
    ),
    "d-fine detection": (
        lambda: t.DFineForObjectDetection(_rt_detr(t.DFineConfig, "hgnet")), images(labels=_detection_labels),
    ),
    "yolos detection": (
        lambda: t.YolosForObjectDetection(
            t.YolosConfig(**{**VISION, "image_size": [SIZE, SIZE]}, num_detection_tokens=4, num_labels=NUM_LABELS)
        ),
        images(labels=_detection_labels),
    ),
    "owlvit detection": (
        lambda: t.OwlViTForObjectDetection(
            t.OwlViTConfig(vision_config=VISION, text_config={**TEXT, "max_position_embeddings": 16}, projection_dim=32)
        ),
        lambda: {**images()(), "input_ids": tokens(4)()},
    ),
    # Depth and pose.
    "dpt depth": (
        lambda: t.DPTForDepthEstimation(
            t.DPTConfig(
                **{**VISION, "num_hidden_layers": 4}, is_hybrid=False, backbone_out_indices=[0, 1, 2, 3],
                neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
            )
        ),
        images(),
    ),
    "depth-anything depth": (
        lambda: t.DepthAnythingForDepthEstimation(
            t.DepthAnythingConfig(
                backbone_config=_backbone("dinov2"), reassemble_hidden_size=32, patch_size=16,
                neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8, head_hidden_size=8,
            )
        ),
        images(),
    ),
    "zoedepth depth": (
        lambda: t.ZoeDepthForDepthEstimation(
            t.ZoeDepthConfig(
                backbone_config=_backbone("beit"), backbone_hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16],
                fusion_hidden_size=8, bottleneck_features=8, num_relative_features=8, num_attractors=[4, 2, 2, 1],
                bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}],
                bin_embedding_dim=16, num_patch_transformer_layers=1, patch_transformer_hidden_size=16,
                patch_transformer_intermediate_size=16, patch_transformer_num_attention_heads=2,
            )
        ),
        images(),
    ),
    "glpn depth": (
        lambda: t.GLPNForDepthEstimation(
            t.GLPNConfig(
                depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 4],
                mlp_ratios=[2, 2, 2, 2], decoder_hidden_size=16,
            )
        ),
        images(),
    ),
    "vitpose pose": (
        lambda: t.VitPoseForPoseEstimation(
            t.VitPoseConfig(backbone_config=_backbone("vitpose"), num_labels=2, use_simple_decoder=True)
        ),
        images((64, 48)),
    ),
    # Restoration and matting.
    "swin2sr super-resolution": (
        lambda: t.Swin2SRForImageSuperResolution(
            t.Swin2SRConfig(image_size=32, embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=4)
        ),
        images(32),
    ),
    "vitmatte matting": (
        lambda: t.VitMatteForImageMatting(
            t.VitMatteConfig(
                backbone_config=_backbone("vitdet"), hidden_size=32, convstream_hidden_sizes=[8, 8, 16],
                fusion_hidden_sizes=[16, 8, 8, 4],
            )
        ),
        images(channels=4),
    ),
    # Prompts and masks.
    "sam masks": (_sam, images(input_points=_points)),
    "sam2 masks": (_sam2, images(input_points=_points)),
    # Masked images.
    "vit_mae pretraining": (
        lambda: t.ViTMAEForPreTraining(
            t.ViTMAEConfig(
                **VISION, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                decoder_intermediate_size=32,
            )
        ),
        images(noise=lambda: torch.rand(2, 16)),
    ),
    "videomae pretraining": (
        lambda: t.VideoMAEForPreTraining(
            t.VideoMAEConfig(
                **{**VISION, "image_size": 32}, num_frames=4, tubelet_size=2, decoder_hidden_size=16,
                decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32,
            )
        ),
        video(4, bool_masked_pos=_masked(8)),
    ),
    "vit masked images": (
        lambda: t.ViTForMaskedImageModeling(t.ViTConfig(**VISION, encoder_stride=16)),
        images(bool_masked_pos=_masked(16)),
    ),
    "swin masked images": (
        lambda: t.SwinForMaskedImageModeling(t.SwinConfig(**SWIN_64, encoder_stride=8)),
        images(bool_masked_pos=_masked(256)),
    ),
    "beit masked images": (
        lambda: t.BeitForMaskedImageModeling(t.BeitConfig(**VISION, vocab_size=20, use_mask_token=True)),
        images(bool_masked_pos=_masked(16)),
    ),
    # Two towers.
    "clip towers": (lambda: t.CLIPModel(t.CLIPConfig(**CLIP)), images(input_ids=tokens(), return_loss=lambda: True)),
    "siglip towers": (
        lambda: t.SiglipModel(t.SiglipConfig(vision_config=VISION, text_config={**TEXT, "projection_size": 32})),
        images(input_ids=tokens(), return_loss=lambda: True),
    ),
    "groupvit towers": (
        lambda: t.GroupViTModel(
            t.GroupViTConfig(
                vision_config={
                    "hidden_size": 32, "depths": [2, 2, 2], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0],
                    "num_attention_heads": 4, "intermediate_size": 64, "image_size": SIZE, "patch_size": 16,
                },
                text_config=TEXT, projection_dim=16, projection_intermediate_dim=32,
            )
        ),
        images(input_ids=tokens(), return_loss=lambda: True),
    ),
    # Language models that see.
    "llava": (_llava, lambda: {**images()(), "input_ids": (ids := with_image_tokens(tokens(), 3, 16)()), "labels": ids}),
    "paligemma": (
        _paligemma,
        lambda: {
            **images()(), "input_ids": (ids := with_image_tokens(tokens(), 3, 16)()),
            "token_type_ids": torch.zeros_like(ids), "labels": ids,
        },
    ),
    "smolvlm": (
        _smolvlm,
        lambda: {
            "pixel_values": torch.randn(2, 1, 3, SIZE, SIZE), "input_ids": (ids := with_image_tokens(tokens(), 3, 4)()),
            "labels": ids,
        },
    ),
    "qwen2.5-vl": (_qwen2_5_vl, _qwen_batch),
    "vision encoder-decoder": (
        lambda: t.VisionEncoderDecoderModel(
            t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
                t.ViTConfig(**VISION), t.TrOCRConfig(
                    vocab_size=60, d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32,
                    cross_attention_hidden_size=32, max_position_embeddings=40,
                )
            )
        ),
        images(decoder_input_ids=tokens()),
    ),
    # Bare backbones.
    "dinov3 backbone": (lambda: t.DINOv3ViTBackbone(t.DINOv3ViTConfig(**VISION)), images()),
    "swin backbone": (lambda: t.AutoBackbone.from_config(_backbone("swin")), images()),
    "resnet backbone": (lambda: t.AutoBackbone.from_config(_backbone("resnet4")), images()),
    "aimv2 features": (
        lambda: t.Aimv2VisionModel(t.Aimv2VisionConfig(**VISION)), images(),
    ),
    "vitdet features": (lambda: t.VitDetModel(_backbone("vitdet")), images(channels=4)),
}  # fmt: skip


def _timm(name: str, size: int = SIZE, **kwargs: Any) -> tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]:
    def build() -> nn.Module:
        return pytest.importorskip("timm").create_model(name, num_classes=NUM_LABELS, **kwargs)

    return build, lambda: {"x": torch.randn(2, 3, size, size)}


TIMM = {
    "timm vit": _timm("vit_tiny_patch16_224", img_size=SIZE, embed_dim=32, depth=2, num_heads=4),
    "timm deit3": _timm("deit3_small_patch16_224", img_size=SIZE, embed_dim=32, depth=2, num_heads=4),
    "timm eva02": _timm("eva02_tiny_patch14_224", size=56, img_size=56, embed_dim=32, depth=2, num_heads=4),
    "timm beit": _timm("beit_base_patch16_224", img_size=SIZE, embed_dim=32, depth=2, num_heads=4),
    "timm swin": _timm(
        "swin_tiny_patch4_window7_224", img_size=SIZE, embed_dim=16, depths=(1, 2), num_heads=(2, 4), window_size=4
    ),
    "timm swinv2": _timm(
        "swinv2_tiny_window8_256", img_size=SIZE, embed_dim=16, depths=(1, 2), num_heads=(2, 4), window_size=4
    ),
    "timm convnext": _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "timm convnextv2": _timm("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "timm resnet18": _timm("resnet18", channels=(8, 16, 16, 32)),
    "timm resnetv2": _timm("resnetv2_50", layers=(1, 1, 1, 1), channels=(16, 16, 32, 32), stem_chs=8),
    "timm efficientnet_b0": _timm("efficientnet_b0"),
    "timm mobilenetv3": _timm("mobilenetv3_small_050"),
    "timm mobilenetv4": _timm("mobilenetv4_conv_small_050"),
    "timm regnety": _timm("regnety_002"),
    "timm densenet": _timm("densenet121", growth_rate=8, block_config=(2, 2)),
    "timm mixer": _timm("mixer_s32_224", size=224),
    "timm crossvit": _timm("crossvit_tiny_240", size=240),
    "timm cait": _timm("cait_xxs24_224", img_size=SIZE, embed_dim=32, depth=2, num_heads=4),
    "timm mvitv2": _timm("mvitv2_tiny", size=64, img_size=64),
    "timm xcit": _timm("xcit_nano_12_p16_224", img_size=SIZE, embed_dim=32, depth=2, num_heads=4),
    "timm volo": _timm("volo_d1_224", img_size=SIZE),
    "timm hiera": _timm("hiera_tiny_224", size=64, img_size=64, embed_dim=16, stages=(1, 1, 1, 1)),
    "timm fastvit": _timm("fastvit_t8", layers=(1, 1, 1, 1), embed_dims=(8, 16, 32, 64)),
    # of smaller images the last stages would keep single pixels, of which no statistics can be fitted
    "timm ghostnetv3": _timm("ghostnetv3_050", size=128),
    "timm caformer": _timm("caformer_s18"),
    "timm poolformerv2": _timm("poolformerv2_s12"),
    "timm repvit": _timm("repvit_m0_9", embed_dim=(8, 16, 16, 32), depth=(1, 1, 2, 1)),
    "timm maxvit": _timm("maxvit_rmlp_pico_rw_256", img_size=64, embed_dim=(32, 32, 32, 64), depths=(1, 1, 1, 1)),
    "timm coatnet": _timm("coatnet_nano_rw_224", img_size=64, embed_dim=(32, 32, 32, 64), depths=(1, 1, 1, 1)),
    "timm pit": _timm("pit_ti_224", size=224),
    "timm levit": _timm("levit_128s", size=224),
    "timm twins": _timm("twins_pcpvt_small", img_size=SIZE),
    "timm pvt_v2": _timm("pvt_v2_b0"),
    "timm edgenext": _timm("edgenext_xx_small"),
    "timm efficientvit_b0": _timm("efficientvit_b0"),
    "timm inception_next": _timm("inception_next_atto"),
    "timm nest": _timm("nest_tiny_jx", size=224),
    "timm focalnet": _timm("focalnet_tiny_srf"),
    "timm davit": _timm("davit_tiny", depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(2, 2, 4, 4)),
    "timm gcvit": _timm("gcvit_xxtiny", size=224),
    "timm siglip": _timm("vit_base_patch16_siglip_224", img_size=SIZE, embed_dim=32, depth=2, num_heads=4),
}  # fmt: skip


def _diffusers(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip("diffusers"), name)(**kwargs)


def _noise(*shape: int, **others: Callable[[], Any]) -> dict[str, Any]:
    return {"timestep": torch.tensor([3, 5]), **{k: v() for k, v in others.items()}}


UNET = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
    "norm_num_groups": 8, "attention_head_dim": 8, "cross_attention_dim": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
DIFFUSERS = {
    "sd unet": (
        _diffusers("UNet2DConditionModel", **UNET),
        lambda: {
            "sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([3, 5]),
            "encoder_hidden_states": torch.randn(2, 7, 32),
        },
    ),
    "sdxl unet": (
        _diffusers(
            "UNet2DConditionModel", **{
                **UNET, "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 64, "transformer_layers_per_block": (1, 2),
            },
        ),
        lambda: {
            "sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([3, 5]),
            "encoder_hidden_states": torch.randn(2, 7, 32),
            "added_cond_kwargs": {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)},
        },
    ),
    "sd3 transformer": (
        _diffusers(
            "SD3Transformer2DModel", sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16,
            out_channels=4, pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        lambda: {
            "hidden_states": torch.randn(2, 4, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 32),
            "pooled_projections": torch.randn(2, 16), "timestep": torch.tensor([3, 5]),
        },
    ),
    "flux transformer": (
        _diffusers(
            "FluxTransformer2DModel", patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        lambda: {
            "hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 7, 32),
            "pooled_projections": torch.randn(2, 16), "timestep": torch.tensor([0.3, 0.5]),
            "img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(7, 3),
        },
    ),
    "flux2 transformer": (
        _diffusers(
            "Flux2Transformer2DModel", patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        lambda: {
            "hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 7, 32),
            "timestep": torch.tensor([0.3, 0.5]), "img_ids": torch.randn(16, 4), "txt_ids": torch.zeros(7, 4),
            "guidance": torch.ones(2),
        },
    ),
    "dit": (
        _diffusers(
            "DiTTransformer2DModel", num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8,
            num_layers=2, sample_size=16, patch_size=2, num_embeds_ada_norm=20,
        ),
        lambda: {
            "hidden_states": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([3, 5]),
            "class_labels": torch.tensor([1, 2]),
        },
    ),
    "pixart": (
        _diffusers(
            "PixArtTransformer2DModel", num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8,
            num_layers=2, sample_size=16, patch_size=2, cross_attention_dim=32, caption_channels=16,
            num_embeds_ada_norm=20,
        ),
        lambda: {
            "hidden_states": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([3, 5]),
            "encoder_hidden_states": torch.randn(2, 7, 16), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "autoencoder": (
        _diffusers(
            "AutoencoderKL", block_out_channels=(16, 32), latent_channels=4, norm_num_groups=8, sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
        ),
        lambda: {"sample": torch.randn(2, 3, 32, 32)},
    ),
}  # fmt: skip

ZOO = {**TRANSFORMERS, **TIMM, **DIFFUSERS}

# What models put out beside the task's result.
_FEATURES = (
    "hidden_state",
    "attentions",
    "pooler_output",
    "model_output",
    "past_key_values",
    "init_reference",
    "intermediate",
)


def build(name: str, seed: int = 0) -> nn.Module:
    """The model with the same random weights for the same seed, none of them zero."""
    torch.manual_seed(seed)
    model = ZOO[name][0]()
    for parameter in model.parameters():
        if not parameter.any() or (parameter == parameter.flatten()[0]).all():
            nn.init.normal_(parameter, std=0.02, mean=float(parameter.flatten()[0]) if parameter.numel() else 0.0)
    families.fit_running_statistics(model, lambda: run(model, ZOO[name][1]()))
    return model.eval()


def batch(name: str, seed: int = 1) -> dict[str, Any]:
    torch.manual_seed(seed)
    return ZOO[name][1]()


def results(output: Any) -> list[torch.Tensor]:
    """The tensors that the task's loss is computed from."""
    if isinstance(output, dict) or hasattr(output, "items"):
        items = {key: value for key, value in output.items() if value is not None}
        wanted = {
            k: v for k, v in items.items() if not any(f in k for f in _FEATURES) and k not in ("loss", "loss_dict")
        }
        kept = [tensor for value in wanted.values() for tensor in results(value)]
        return kept or [tensor for value in items.values() for tensor in results(value)]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in results(value)]
    if hasattr(output, "sample") and isinstance(output.sample, torch.Tensor):
        return [output.sample]
    return [output] if isinstance(output, torch.Tensor) and output.is_floating_point() else []


def run(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(2)
    return results(model(**inputs))


def loss(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's own loss if the batch has labels, else the distance of the results from fixed random targets."""
    torch.manual_seed(2)
    output = model(**inputs)
    own = output.get("loss") if isinstance(output, dict) else None
    if own is not None:
        return own
    generator = torch.Generator().manual_seed(3)
    return sum(
        (result.float().nan_to_num(0, 0, 0) - torch.randn(result.shape, generator=generator)).square().mean()
        for result in results(output)
    )
