"""Training is stable at the defaults over the learning rates that people use for LoRA.

The task is real: handwritten digits for the small backbone of the examples, which was pretrained on clothes. The
learning rate is constant and there is no warm-up, which is harsher than the schedules of practice.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from sklearn.datasets import load_digits
from transformers import ViTForImageClassification

from peft_s2a import S2AConfig


BACKBONE = Path(__file__).parents[2] / "examples" / "backbone"
EPOCHS, BATCH = 2, 25


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, ...]:
    """(training images, training labels, test images, test labels)."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=28, mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:300], order[300:600]
    return images[train], labels[train], images[test], labels[test]


def fine_tune(config: S2AConfig, lr: float, digits: tuple[torch.Tensor, ...]) -> tuple[list[float], float]:
    """(losses of all steps, accuracy on the test images)."""
    images, labels, test_images, test_labels = digits
    torch.manual_seed(0)
    model = ViTForImageClassification.from_pretrained(BACKBONE, num_labels=10, ignore_mismatched_sizes=True)
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(EPOCHS):
        for indices in torch.randperm(len(labels)).split(BATCH):
            loss = F.cross_entropy(model(images[indices]).logits, labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    with torch.no_grad():
        predictions = model.eval()(test_images).logits.argmax(-1)
    return losses, (predictions == test_labels).float().mean().item()


@pytest.mark.parametrize(
    ("kwargs", "lr"),
    [
        pytest.param({}, 5e-4, marks=pytest.mark.slow),
        pytest.param({}, 2e-3, marks=pytest.mark.slow),
        ({}, 5e-3),
        pytest.param({"activation_quantization": None}, 5e-3, marks=pytest.mark.slow),
        pytest.param({"activation_quantization": None, "side_rank": 128}, 5e-3, marks=pytest.mark.slow),
    ],
)
def test_training_is_stable(kwargs, lr, digits):
    losses, accuracy = fine_tune(S2AConfig(**kwargs), lr, digits)
    print(f"{kwargs} {lr}: {losses[0]:.2f} -> {sum(losses[-6:]) / 6:.2f}, accuracy {accuracy:.1%}")
    assert max(losses[len(losses) // 2 :]) < losses[0]
    assert sum(losses[-6:]) / 6 < 0.7 * losses[0]
    assert accuracy > 0.3
