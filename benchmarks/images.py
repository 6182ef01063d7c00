"""The real images of the benchmarks, and how they are given to a backbone."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's, as in pretraining


def fashion_mnist(split: str, folder: Path = FASHION_MNIST) -> tuple[Tensor, Tensor]:
    """Grey images ``[N, 28, 28]`` in [0, 1], labels ``[N]``, 0-9 (Xiao et al. 2017): 60,000 "train" or 10,000 "test".

    Raises:
        FileNotFoundError: if the files are not there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} not found: install Debian's package dataset-fashion-mnist")
    prefix = {"train": "train", "test": "t10k"}[split]
    images, labels = (
        np.frombuffer(gzip.decompress((folder / f"{prefix}-{name}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
        for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return torch.tensor(images).view(-1, 28, 28) / 255, torch.tensor(labels).long()


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 grey images ``[N, 8, 8]`` in [0, 1] and labels ``[N]``, 0-9, of scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target).long()


def pixel_values(images: Tensor, size: int) -> Tensor:
    """Grey images ``[N, H, W]`` in [0, 1] as a backbone takes them: ``[N, 3, size, size]``, normalised."""
    pixels = F.interpolate(images[:, None], (size, size), mode="bilinear").expand(-1, 3, -1, -1)
    return (pixels - MEAN[:, None, None].to(images)) / STD[:, None, None].to(images)
