"""Training in two processes over gloo, beside one: what the workers and the tests that start them share."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist
from families import FAMILIES
from forked import ranks, run_scripts
from peft import get_peft_model
from torch import Tensor, nn

from peft_s2a import S2AConfig


ALL_EQUAL = "all equal"  # a worker's last word
LADDER = {"structures": ("side",), "side_mode": "ladder"}


def launch(worker: str, *arguments: str, timeout: float = 500) -> None:
    """Run a script beside this one in two processes."""
    command = (Path(__file__).with_name(worker), *arguments)
    first, second = run_scripts(command, command, environments=ranks(), timeout=timeout)
    assert ALL_EQUAL in first.stdout, first.stderr[-3000:] + second.stderr[-3000:]


def build(family: str, options: dict | None = None) -> nn.Module:
    """S2A on a small model, at 8 bits: 4-bit codes depend on how a batch is split."""
    torch.manual_seed(0)
    config = S2AConfig(init_weights=False, **{"activation_quantization": {"bits": 8}, **(options or {})})
    model = get_peft_model(FAMILIES[family](), config)
    for module in model.modules():  # stochastic depth draws for each image of a process
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model


def batch(seed: int, rank: int, world: int) -> dict[str, Tensor]:
    """What one of `world` processes gets of a batch of four images."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": images.chunk(world)[rank], "labels": (torch.arange(4) % 5).chunk(world)[rank]}


def mean_over_processes(loss: Tensor, world: int) -> float:
    mean = loss.detach().clone()
    if world > 1:
        dist.all_reduce(mean)
    return mean.item() / world


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)


def steps_of_sgd(model: nn.Module) -> Callable[[Tensor], None]:
    optimizer = sgd(model)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def losses(
    model: nn.Module, rank: int, world: int, seeds: range = range(3), step: Callable[[Tensor], None] | None = None
) -> list[float]:
    """Of some steps, over the whole batch."""
    step, found = step or steps_of_sgd(model), []
    for seed in seeds:
        loss = model(**batch(seed, rank, world)).loss
        step(loss)
        found.append(mean_over_processes(loss, world))
    return found


def accumulated(
    model: nn.Module, rank: int, world: int, sends: Callable[[bool], AbstractContextManager]
) -> list[float]:
    """Two batches a step; within `sends(False)` a backward pass keeps its gradients to itself."""
    optimizer, found = sgd(model), []
    for step in range(3):
        optimizer.zero_grad()
        for seed in (2 * step, 2 * step + 1):
            with sends(seed % 2 == 1):
                loss = model(**batch(seed, rank, world)).loss
                loss.backward()
            found.append(mean_over_processes(loss, world))
        optimizer.step()
    return found


def with_checkpoints(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def assert_close(actual: list[float], expected: list[float], tolerance: float = 1e-4) -> None:
    assert max(abs(a - b) for a, b in zip(actual, expected, strict=True)) < tolerance, (actual, expected)
    assert len(set(expected)) == len(expected), f"nothing was learned: {expected}"


def assert_same_trained(actual: nn.Module, expected: nn.Module) -> None:
    """All trained parameters are equal within rounding."""
    trained = [{n: p.detach() for n, p in m.named_parameters() if p.requires_grad} for m in (actual, expected)]
    assert_same_tensors(*trained)


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Of an adapter: the same names, and values that are equal within rounding."""
    assert actual.keys() == expected.keys() and expected
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-4, msg=name)
