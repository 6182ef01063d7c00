"""Run by `test_ddp.py` in two processes: DistributedDataParallel with each of its options, beside one process."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import (
    ALL_EQUAL,
    LADDER,
    accumulated,
    assert_close,
    assert_same_trained,
    batch,
    build,
    losses,
    mean_over_processes,
    steps_of_sgd,
    with_checkpoints,
)

from peft_s2a import ActivationQuantizationConfig, quantize_activations


OPTIONS = (
    {},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
    {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    {"static_graph": True, "gradient_as_bucket_view": True},
)


def lora_with_codes() -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES["vit"]()
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, modules_to_save=["classifier"])
    return quantize_activations(get_peft_model(model, lora), ActivationQuantizationConfig(bits=8))


FEW_OPTIONS = OPTIONS[1], OPTIONS[-1]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: build("vit"),
    "swin": lambda: build("swin"),
    "resnet": lambda: build("resnet"),
    "ladder": lambda: build("vit", LADDER),
    "lora": lora_with_codes,
}


class TwoTasks(nn.Module):
    """A second head on the same backbone: each call trains one of the heads, and leaves the other without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build("vit")
        torch.manual_seed(1)
        self.second = nn.Linear(5, 5)

    def forward(self, task: int, pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.model(pixel_values=pixel_values).logits
        return nn.functional.cross_entropy(self.second(logits) if task else logits, labels)


def two_tasks(model: nn.Module, rank: int, world: int) -> list[float]:
    """The first half of a batch belongs to the first head, the second to the second: each process trains one of them."""
    step, found = steps_of_sgd(model), []
    for seed in range(3):
        if world == 1:
            loss = sum(model(task, **batch(seed, task, 2)) for task in range(2)) / 2
        else:
            loss = model(rank, **batch(seed, rank, 2))
        step(loss)
        found.append(mean_over_processes(loss, world))
    return found


def accumulating(model: nn.Module, rank: int, world: int) -> list[float]:
    return accumulated(model, rank, world, lambda sent: nullcontext() if sent or world == 1 else model.no_sync())


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    def check(run: Callable, make: Callable[[], nn.Module], name: str) -> None:
        one = make()
        expected = run(one, 0, 1)
        for options in OPTIONS if name == "vit" else FEW_OPTIONS:
            if run is two_tasks and not options.get("find_unused_parameters"):
                continue  # torch asks for it where processes leave out different parameters
            if run is accumulating and options.get("static_graph"):
                continue  # torch fails where the first backward pass sends nothing, whatever the model
            two = make()
            try:
                assert_close(run(DistributedDataParallel(two, **options), rank, world), expected)
                assert_same_trained(two, one)
            except Exception as error:
                raise AssertionError(f"{name}, {options}") from error

    for name, make in MODELS.items():
        check(losses, make, name)
    check(losses, lambda: with_checkpoints(build("vit")), "checkpointing")
    check(accumulating, MODELS["vit"], "accumulating")
    check(two_tasks, TwoTasks, "two tasks")
    if rank == 0:
        print(ALL_EQUAL)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
