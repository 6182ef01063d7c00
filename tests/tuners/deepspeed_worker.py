"""Run by `test_deepspeed.py` in two processes: ZeRO's losses and adapter beside those of one process."""

import sys
import warnings

import deepspeed
import torch
import torch.distributed as dist
from families import FAMILIES
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn

from peft_s2a import S2AConfig


def build() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(FAMILIES["vit"](), S2AConfig(init_weights=False, activation_quantization={"bits": 8}))


def losses(model: nn.Module, step, rank: int, world: int) -> list[float]:
    found = []
    for seed in range(3):
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).chunk(world)[rank]
        loss = model(pixel_values=images, labels=(torch.arange(4) % 5).chunk(world)[rank]).loss
        step(loss)
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        found.append(mean.item() / world)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    deepspeed.init_distributed("gloo")
    rank, world, stage = dist.get_rank(), dist.get_world_size(), int(sys.argv[1])
    one, two = build(), build()
    optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 1e-2)

    def step_alone(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    expected = losses(one, step_alone, 0, 1)
    trained = [p for p in two.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=two,
        optimizer=torch.optim.SGD(trained, 1e-2),
        config={
            "train_micro_batch_size_per_gpu": 4 // world,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 0.0,  # it clips at 1 unless told otherwise
            "zero_allow_untested_optimizer": True,
        },
    )

    def step_sharded(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    actual = losses(engine, step_sharded, rank, world)
    assert max(abs(a - b) for a, b in zip(actual, expected, strict=True)) < 1e-3, (actual, expected)
    assert expected[0] != expected[-1]
    with deepspeed.zero.GatheredParameters(list(two.parameters()), enabled=stage == 3):
        alone, sharded = get_peft_model_state_dict(one), get_peft_model_state_dict(two)
        assert alone.keys() == sharded.keys()
        for name, value in alone.items():
            torch.testing.assert_close(sharded[name], value, rtol=1e-3, atol=1e-4, msg=name)
    if rank == 0:
        print("all equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
