"""A training step, the same for measured and estimated memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from peft_s2a.compat import tree_leaves


OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
LossFunction = Callable[[nn.Module, Any], torch.Tensor]


class TrainingStep:
    """Forward, backward and optimiser step of `model` on `batch`.

    Args:
        model: The model, at least one parameter of which is trained.
        batch: Keyword arguments of the model as a mapping, or its single positional argument.
        optimizer: Makes the optimiser from the trained parameters; None leaves the optimiser out.
        loss_fn: `loss_fn(model, batch)` gives the loss, a scalar. None: the model's own loss, `model(**batch).loss`.
        autocast: Low-precision dtype of the forward pass under `torch.autocast`, None for none.

    Raises:
        ValueError: If no parameter is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        optimizer: OptimizerFactory | None,
        loss_fn: LossFunction | None,
        autocast: torch.dtype | None,
        device: torch.device,
    ):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError("model: no parameter requires a gradient, so there is no training step to look at")
        self.model = model
        self.batch = batch
        self.loss_fn = loss_fn or model_loss
        self.autocast = (lambda: torch.autocast(device.type, autocast)) if autocast is not None else nullcontext
        self.optimizer = optimizer(trained) if optimizer is not None else None

    def loss(self) -> torch.Tensor:
        """The loss of a forward pass.

        Raises:
            ValueError: If it is no scalar tensor.
        """
        with self.autocast():
            loss = self.loss_fn(self.model, self.batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn: must return the loss as a scalar tensor, got {got}")
        return loss

    def forward_backward(self) -> None:
        self.loss().backward()

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
        for parameter in self.model.parameters():
            parameter.grad = None

    def __call__(self) -> None:
        self.forward_backward()
        self.update()


def model_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss that `model` computes itself, as transformers' models do when the batch has labels.

    Raises:
        ValueError: If the output has no loss.
    """
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, torch.Tensor) and output.numel() == 1:
        loss = output
    if loss is None:
        raise ValueError(
            f"model: the output ({type(output).__name__}) has no loss; put labels into the batch, "
            "or pass loss_fn(model, batch)"
        )
    return loss


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the unique storages among `tensors`; what is no tensor is passed over."""
    storages = {id(s): s for s in (t.untyped_storage() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))}
    return sum(storage.nbytes() for storage in storages.values())
