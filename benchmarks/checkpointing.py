"""For which vision models does transformers offer activation checkpointing?

    python benchmarks/checkpointing.py        # imports a few hundred model classes: a minute

Walks the registry: the class of every model type that takes images, for each task, has the attribute
`supports_gradient_checkpointing`. Nothing is built.

Writes `benchmarks/results/checkpointing.json`.
"""

from __future__ import annotations

import collections
import warnings
from typing import Any

import transformers
from environment import RESULTS, describe_environment, write_result
from transformers.models.auto import modeling_auto


TASKS = {  # transformers' tables of classes by model type
    "classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "semantic segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "object detection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "universal segmentation": "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "depth estimation": "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "backbone": "MODEL_FOR_BACKBONE_MAPPING_NAMES",
}


def classes_of(model_type: str, table: str) -> list[type]:
    """The classes for a model type, none where they cannot be imported (a library is missing)."""
    names = getattr(modeling_auto, table)[model_type]
    found = (imported(name) for name in ((names,) if isinstance(names, str) else names))
    return [each for each in found if hasattr(each, "supports_gradient_checkpointing")]


def imported(name: str) -> type | None:
    try:
        return getattr(transformers, name)
    except (AttributeError, ImportError, RuntimeError):
        return None


def walk(tasks: dict[str, str] = TASKS) -> list[dict[str, Any]]:
    """One row a model type, sorted: whether its class for each task supports checkpointing."""
    support: dict[str, dict[str, bool]] = collections.defaultdict(dict)
    for task, table in tasks.items():
        for model_type in getattr(modeling_auto, table).keys() - {"timm_wrapper"}:  # which asks timm, for each model
            if classes := classes_of(model_type, table):
                support[model_type][task] = all(each.supports_gradient_checkpointing for each in classes)
    return [{"model_type": name, "supported": found} for name, found in sorted(support.items())]


def main() -> None:
    warnings.filterwarnings("ignore")
    rows = walk()
    path = RESULTS / "checkpointing.json"
    write_result(path, {"environment": describe_environment(), "rows": rows})
    missing = [row["model_type"] for row in rows if not all(row["supported"].values())]
    print(f"{len(missing)} of {len(rows)} model types without: {', '.join(missing)}\nwritten to {path}")


if __name__ == "__main__":
    main()
