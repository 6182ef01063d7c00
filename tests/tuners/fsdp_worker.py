"""Run by `test_fsdp.py` in two processes: losses of sharded training beside those of one process."""

import warnings

import families
import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard

from peft_s2a import S2AConfig


LADDER = {"structures": ("side",), "side_mode": "ladder"}


def build(family: str, options: dict) -> nn.Module:
    torch.manual_seed(0)
    config = S2AConfig(init_weights=False, activation_quantization={"bits": 8}, **options)
    return get_peft_model(families.FAMILIES[family](), config)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Inner ones first, as `fully_shard` wants them."""
    parts = [(name.split("."), module) for name, module in model.named_modules()]
    return [m for name, m in parts if len(name) > 1 and name[-1].isdigit() and name[-2] in ("layers", "stages")][::-1]


def losses(model: nn.Module, rank: int, world: int) -> list[float]:
    optimizer, found = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2), []
    for seed in range(3):
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).chunk(world)[rank]
        loss = model(pixel_values=images, labels=(torch.arange(4) % 5).chunk(world)[rank]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        found.append(mean.item() / world)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for family, options, by_block in (("vit", {}, True), ("resnet", {}, True), ("vit", LADDER, False)):
        expected = losses(build(family, options), 0, 1)
        model = build(family, options)
        for block in blocks(model) if by_block else ():
            fully_shard(block)
        fully_shard(model)
        actual = losses(model, rank, world)
        assert max(abs(a - b) for a, b in zip(actual, expected)) < 1e-4, (family, options, actual, expected)
        assert expected[-1] != expected[0]
    model = build("vit", LADDER)
    for part in (*blocks(model), model):
        fully_shard(part)
    with pytest.raises(RuntimeError, match="on the whole model alone"):
        losses(model, rank, world)
    if rank == 0:
        print("all equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
