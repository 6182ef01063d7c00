"""Two processes with a model each (DistributedDataParallel) train as one process does, with any option of DDP's."""

import families
import pytest
import torch
import torch.nn.functional as F
from two_processes import build, launch


def test_two_processes_train_as_one():
    launch("ddp_worker.py")


@pytest.mark.parametrize(
    ("family", "bits", "limit"),
    [
        ("vit", None, 1e-5), ("vit", 8, 3e-3), ("vit", 4, 1e-1), ("swin", None, 1e-5), ("swin", 8, 5e-3), ("swin", 4, 7e-2),
        ("resnet", 4, 1e-5),
    ],
)  # fmt: skip
def test_halves_of_a_batch_have_nearly_the_gradients_of_the_whole(family, bits, limit, function_mode):
    """Columns of norms are standardised over the tokens that a process sees, so codes depend on how a batch is split."""
    model = build(family, {"activation_quantization": {"bits": bits} if bits else None})
    images, labels = families.batch(family, 32)

    def gradients(part: slice) -> torch.Tensor:
        model.zero_grad()
        F.cross_entropy(families.logits(model, images[part]), labels[part]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradients(slice(None))
    halves = (gradients(slice(0, None, 2)) + gradients(slice(1, None, 2))) / 2
    assert (halves - whole).norm() < limit * whole.norm()
