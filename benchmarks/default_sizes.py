"""What S2A keeps for the backward pass beside full fine-tuning, on transformers' image classifiers at their default sizes.

    python benchmarks/default_sizes.py               # all of them: a few minutes on one idle core
    python benchmarks/default_sizes.py vit resnet    # some of them, the rest as recorded

Nothing is computed: the steps run on fake tensors (`peft_s2a.estimate_memory`), whose bytes are those of real ones; only
Siglip2 takes a real step.
Writes `benchmarks/results/default_sizes.json`, which `benchmarks/models.py --render` puts into `docs/models.md`.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import time
import warnings
from typing import Any

from environment import RESULTS, describe_environment, write_result
from tqdm.auto import tqdm


RESULT = RESULTS / "default_sizes.json"
BATCH_SIZE = 4


def classifiers() -> list[str]:
    """The model types of all image classifiers of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    return sorted(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)


def _sum_of_outputs(model: Any, batch: dict[str, Any]) -> Any:
    return model(**batch)[0].sum()


def _patches(config: Any) -> dict[str, Any]:
    """Images cut into patches, as Siglip2's processor gives them."""
    import torch

    side = int(config.num_patches**0.5)
    return {
        "pixel_values": torch.zeros(BATCH_SIZE, side**2, config.num_channels * config.patch_size**2),
        "pixel_attention_mask": torch.ones(BATCH_SIZE, side**2, dtype=torch.int64),
        "spatial_shapes": torch.full((BATCH_SIZE, 2), side),
        "labels": torch.zeros(BATCH_SIZE, dtype=torch.int64),
    }


def measure(name: str) -> dict[str, Any]:
    """Bytes kept for each image by full fine-tuning and by S2A, and what S2A keeps most of; or why that is unknown."""
    import torch

    from peft_s2a import ActivationQuantizationConfig, S2AConfig, estimate_memory, profile_memory
    from peft_s2a.memory.estimate import image_batch
    from peft_s2a.memory.models import find_model

    start = time.perf_counter()
    row: dict[str, Any] = {"model": name}
    device = "cpu" if name == "siglip2" else "meta"  # whose position table is resized to what a tensor says
    try:
        for method in ("full", "s2a"):
            model = find_model(name).build(device)
            if method == "s2a":
                from peft import get_peft_model

                # tiles change nothing in what is kept, and take time to record
                quantisation = ActivationQuantizationConfig(mlp_tiles=1)
                with torch.device(device):
                    model = get_peft_model(model, S2AConfig(activation_quantization=quantisation))
            batch, loss_fn = image_batch(model, BATCH_SIZE), None
            if name == "siglip2":
                batch = _patches(model.config.vision_config)
            if name == "imagegpt":  # reads its images as rows of colours, each a token
                del batch["pixel_values"]
                batch["input_ids"] = torch.empty(
                    BATCH_SIZE, model.config.n_positions, dtype=torch.int64, device="meta"
                )
            if name == "pp_lcnet":  # transformers' classifier takes no labels, and computes no loss
                del batch["labels"]
                loss_fn = _sum_of_outputs
            report = (profile_memory if device == "cpu" else estimate_memory)(
                model, batch, optimizer=None, loss_fn=loss_fn
            )
            row[method] = report.saved_bytes // BATCH_SIZE
        row["full_precision"] = report.kept.full_precision // BATCH_SIZE
        largest = sorted(report.by_operator.items(), key=lambda item: -item[1].total)[:8]
        row["by_operator"] = {operator: vars(size) for operator, size in largest}
        row["unplanned"] = sorted(set(report.unplanned.values()))
    except Exception as error:
        row = {"model": name, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    row["seconds"] = round(time.perf_counter() - start, 1)
    gc.collect()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="model types of transformers; none: all")
    args = parser.parse_args()
    sys.path.insert(0, str(RESULTS.parents[1] / "tests"))
    import conftest  # noqa: F401  (makes timm importable)

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    known = classifiers()
    if unknown := set(args.models) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    rows = {row["model"]: row for row in json.loads(RESULT.read_text())["rows"]} if RESULT.exists() else {}
    for name in tqdm(args.models or known):
        rows[name] = measure(name)
        ordered = [rows[one] for one in known if one in rows]
        result = {"environment": describe_environment(), "batch_size": BATCH_SIZE, "known": known, "rows": ordered}
        write_result(RESULT, result)


if __name__ == "__main__":
    main()
