"""Small models of every supported family, built from configurations, with random weights and a task head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import pytest
import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    HieraConfig,
    HieraForImageClassification,
    PvtConfig,
    PvtForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)


IMAGE_SIZE = 32
NUM_LABELS = 5
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
}
SWIN = {
    "image_size": IMAGE_SIZE,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
TEXT = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}


class WithHead(nn.Module):
    """A backbone that transformers gives no classifier, with one."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(width, NUM_LABELS)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.backbone(pixel_values=pixel_values).last_hidden_state.mean(1))


class PlainConvNet(nn.Module):
    """A convolutional network that is no transformers model, of stages without residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.stage1 = nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
        )
        self.stage2 = nn.Sequential(
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 32, 1), nn.SiLU()
        )
        self.head = nn.Linear(32, NUM_LABELS)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.stage2(self.stage1(self.stem(pixel_values))).mean((2, 3)))


class PlainTransformer(nn.Module):
    """Torch's own encoder layers, whose inference fast path reads weights without calling the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 8, stride=8)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, NUM_LABELS)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(pixel_values).flatten(2).mT).mean(1))


def _timm(name: str, **kwargs) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        pytest.importorskip("timm")
        from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

        config = TimmWrapperConfig(architecture=name, model_args=kwargs, num_labels=NUM_LABELS)
        return TimmWrapperForImageClassification(config)

    return build


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**VIT, num_labels=NUM_LABELS)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**VIT, num_labels=NUM_LABELS)),
    "beit": lambda: BeitForImageClassification(
        BeitConfig(**VIT, num_labels=NUM_LABELS, use_relative_position_bias=True)
    ),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**VIT, num_labels=NUM_LABELS)),
    "dinov3": lambda: WithHead(DINOv3ViTModel(DINOv3ViTConfig(**VIT)), 32),
    "siglip": lambda: SiglipForImageClassification(
        SiglipConfig(vision_config=VIT, text_config=TEXT, num_labels=NUM_LABELS)
    ),
    "clip": lambda: CLIPForImageClassification(
        CLIPConfig(vision_config={**VIT, "projection_dim": 16}, text_config=TEXT, num_labels=NUM_LABELS)
    ),
    "swin": lambda: SwinForImageClassification(SwinConfig(**SWIN, num_labels=NUM_LABELS)),
    "swinv2": lambda: Swinv2ForImageClassification(Swinv2Config(**SWIN, num_labels=NUM_LABELS)),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=NUM_LABELS)
    ),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 2], num_labels=NUM_LABELS, patch_size=2)
    ),
    "segformer": lambda: SegformerForImageClassification(
        SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            num_attention_heads=[2, 4],
            patch_sizes=[7, 3],
            strides=[4, 2],
            mlp_ratios=[2, 2],
            num_labels=NUM_LABELS,
        )
    ),
    "pvt": lambda: PvtForImageClassification(
        PvtConfig(
            image_size=IMAGE_SIZE,
            num_encoder_blocks=2,
            depths=[1, 1],
            sequence_reduction_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[4, 2],
            strides=[4, 2],
            num_attention_heads=[2, 4],
            mlp_ratios=[2, 2],
            num_labels=NUM_LABELS,
        )
    ),
    "hiera": lambda: HieraForImageClassification(
        HieraConfig(
            image_size=[64, 64],
            embed_dim=16,
            depths=[1, 2],
            num_heads=[1, 2],
            mask_unit_size=[8, 8],
            query_stride=[2, 2],
            num_query_pool=1,
            masked_unit_attention=[True, False],
            num_labels=NUM_LABELS,
        )
    ),
    "timm_vit": _timm("vit_tiny_patch16_224", img_size=IMAGE_SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=4),
    "timm_resnet": _timm("resnet18", channels=(8, 16, 16, 32)),
    "timm_convnext": _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "plain_cnn": PlainConvNet,
    "plain_transformer": PlainTransformer,
}

# Much like another one here. What is tried on every family in several ways is tried in one of them on these in the usual
# run, and in all among the slow tests.
LIKE_ANOTHER = {"deit", "dinov2", "siglip", "clip", "swinv2", "pvt", "timm_vit", "timm_resnet", "timm_convnext"}


def each_in(first: str, *others: str, names: Iterable[str] = FAMILIES, slow: Collection[str] = ()) -> list:
    """Parameters (family, way) for `pytest.mark.parametrize`: every family in every way. Where slow tests are left out
    those that are `LIKE_ANOTHER` are there in the first way only, and those of ``slow`` in none."""
    return [
        pytest.param(
            name, way, marks=pytest.mark.slow if name in slow or (name in LIKE_ANOTHER and way != first) else ()
        )
        for name in names
        for way in (first, *others)
    ]


def build(family: str, seed: int = 0) -> nn.Module:
    """A small model of the family, with the same random weights for the same seed."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    for parameter in model.parameters():  # heads, embeddings and last scales start at zero in some families
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    images = batch(family, size=16)[0]
    fit_running_statistics(model, lambda: logits(model, images))
    return model


def fit_running_statistics(model: nn.Module, run: Callable[[], object]) -> None:
    """As after pretraining; with the initial statistics the images would hardly reach the output."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        run()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def batch(family: str, size: int = 4, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, labels)."""
    generator = torch.Generator().manual_seed(seed)
    side = 64 if family == "hiera" else IMAGE_SIZE
    return torch.randn(size, 3, side, side, generator=generator), torch.arange(size) % NUM_LABELS


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    output = model(pixel_values=images)
    return output if isinstance(output, torch.Tensor) else output.logits
