"""What has to hold wherever an adapter is put: the checks that the walks over models share."""

from __future__ import annotations

from pathlib import Path

import torch
import zoo
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn


def reached(model: nn.Module, inputs: dict) -> set[str]:
    """The parameters of a stock model that get a gradient, and the modules that hold one."""
    model.requires_grad_(True)
    model.zero_grad()
    zoo.loss(model, inputs).backward()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {name for name, p in parameters.items() if p.grad is not None and p.grad.abs().sum() > 0}
    model.zero_grad()
    return names | {name.rpartition(".")[0] for name in names}


def _stock_name(key: str) -> str:
    """The parameter of the stock model for one trained whole; for an offset or a scale its module; else itself."""
    name = key.removeprefix("base_model.model.")
    if "modules_to_save" in name:
        return name.replace("modules_to_save.default.", "")
    host, _, own = name.removesuffix(".default").rpartition(".")
    return host if own in ("s2a_bias", "s2a_scale") else name


def _is_wanted(name: str, wanted: set[str]) -> bool:
    return name in wanted or "_adapter." in name or "ladder_" in name


def trained_results(model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    with torch.no_grad():
        return zoo.run(model.eval(), inputs)


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


LONGEST = 30
"""Steps for those whose first one overshoots, as that of a wide head at this learning rate does under any method."""


def check(name: str, config: PeftConfig, folder: Path, steps: int = 8) -> PeftModel:
    """Start equal, train everything that is declared trained, lower the loss, reload equal. Returns the model."""
    inputs = zoo.batch(name)
    base = zoo.build(name).requires_grad_(False)
    expected = trained_results(base, inputs)
    model = get_peft_model(base, config)
    assert_equal(trained_results(model, inputs), expected)

    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    # Small models pass on small gradients. The squares of those below 1e-19 are zero, which eps has to outweigh.
    optimizer = torch.optim.Adam(trainable.values(), lr=5e-3, eps=1e-16)
    losses, touched = [], set()
    while len(losses) < steps or (min(losses[1:]) >= losses[0] and len(losses) < LONGEST):
        optimizer.zero_grad()
        # In eval mode, without dropout and other draws, so that losses compare.
        loss = zoo.loss(model, inputs)
        loss.backward()
        losses.append(loss.item())
        touched |= {key for key, p in trainable.items() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
    # A head may hold what this task leaves unused, and a layer stand behind a unit that never fires.
    wanted = reached(zoo.build(name), inputs)
    untouched = sorted(key for key in set(trainable) - touched if _is_wanted(_stock_name(key), wanted))
    assert not untouched, f"no gradient reaches {len(untouched)} of {len(trainable)}: {untouched[:4]}"
    assert min(losses[1:]) < losses[0], losses
    adapted = [key for key in trainable if "modules_to_save" not in key]
    assert adapted, "only heads are trained"

    trained = trained_results(model, inputs)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(zoo.build(name), folder)
    assert_equal(trained_results(loaded, inputs), trained)
    return model
