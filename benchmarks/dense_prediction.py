"""What S2A keeps for the backward pass beside full fine-tuning, on models for segmentation, depth and detection.

    python benchmarks/dense_prediction.py           # two minutes on one idle core

Nothing is computed: the steps run on fake tensors (`peft_s2a.estimate_memory`). The loss is the mean of the first output,
which keeps nothing of its own.
Writes `benchmarks/results/dense_prediction.json`, which `benchmarks/models.py --render` puts into `docs/models.md`.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from typing import Any

from environment import RESULTS, describe_environment, write_result
from tqdm.auto import tqdm


RESULT = RESULTS / "dense_prediction.json"
BATCH_SIZE = 4


def models() -> dict[str, tuple[Callable[[], Any], int]]:
    """{name: (what makes it, pixels of a side)}, at the default sizes of transformers."""
    import transformers as t

    swin = t.SwinConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    upernet = t.UperNetConfig(backbone_config=swin, auxiliary_in_channels=384)

    return {
        "SegFormer": (lambda: t.SegformerForSemanticSegmentation(t.SegformerConfig()), 512),
        "UperNet, Swin-T": (lambda: t.UperNetForSemanticSegmentation(upernet), 512),
        "MobileViT": (lambda: t.MobileViTForSemanticSegmentation(t.MobileViTConfig()), 512),
        "DPT": (lambda: t.DPTForDepthEstimation(t.DPTConfig()), 384),
        "Depth Anything": (lambda: t.DepthAnythingForDepthEstimation(t.DepthAnythingConfig()), 518),
        "GLPN": (lambda: t.GLPNForDepthEstimation(t.GLPNConfig()), 512),
        "YOLOS": (lambda: t.YolosForObjectDetection(t.YolosConfig()), 512),
    }


def _mean_of_first_output(model: Any, batch: dict[str, Any]) -> Any:
    return model(**batch)[0].mean()


def measure(name: str) -> dict[str, Any]:
    """Bytes kept for each image by full fine-tuning, by S2A, and by S2A that also codes what trained layers read."""
    import torch
    from peft import get_peft_model

    from peft_s2a import ActivationQuantizationConfig, S2AConfig, estimate_memory

    build, size = models()[name]
    row: dict[str, Any] = {"model": name, "image_size": size}
    methods = {"full": None, "s2a": False, "s2a_coded_inputs": True}  # whether inputs of trained layers are codes
    with torch.device("meta"):
        batch = {"pixel_values": torch.empty(BATCH_SIZE, 3, size, size)}
        for method, coded in methods.items():
            model = build().train()
            if coded is not None:
                # tiles change nothing in what is kept, and take time to record
                quantisation = ActivationQuantizationConfig(mlp_tiles=1, compress_linear_inputs=coded)
                model = get_peft_model(model, S2AConfig(activation_quantization=quantisation))
            report = estimate_memory(model, batch, optimizer=None, loss_fn=_mean_of_first_output)
            row[method] = report.saved_bytes // BATCH_SIZE
    return row


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = [measure(name) for name in tqdm(models())]
    write_result(RESULT, {"environment": describe_environment(), "batch_size": BATCH_SIZE, "rows": rows})


if __name__ == "__main__":
    main()
