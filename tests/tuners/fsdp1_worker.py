"""Run by `test_fsdp.py` in two processes: training sharded by FullyShardedDataParallel, beside that of one process."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.resnet.modeling_resnet import ResNetStage
from transformers.models.vit.modeling_vit import ViTLayer
from two_processes import ALL_EQUAL, LADDER, assert_close, assert_same_tensors, build, losses


CPU = torch.device("cpu")


def shard(model: nn.Module, *blocks: type[nn.Module], **options) -> FullyShardedDataParallel:
    """Frozen and trained parameters lie beside each other in a block, which needs `use_orig_params`."""
    policy = ModuleWrapPolicy(blocks) if blocks else None
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=CPU, use_orig_params=True, **options)


def check_losses(rank: int, world: int) -> None:
    for family, options, block in (
        ("vit", {}, ViTLayer),
        ("vit", {"activation_quantization": None}, ViTLayer),
        ("resnet", {}, ResNetStage),
        ("vit", LADDER, None),
    ):
        expected = losses(build(family, options), 0, 1)
        model = shard(build(family, options), *([block] if block else []))
        held = sum(p.numel() for p in model.parameters())
        assert held < 0.6 * sum(p.numel() for p in build(family, options).parameters()), "nothing was sharded"
        assert_close(losses(model, rank, world), expected)


def check_ladder_by_block(rank: int, world: int) -> None:
    model = shard(build("vit", LADDER), ViTLayer)
    with pytest.raises(RuntimeError, match="the whole model alone"):
        losses(model, rank, world)


def check_mixed_precision(rank: int, world: int) -> None:
    model = shard(build("vit"), ViTLayer, mixed_precision=MixedPrecision(torch.bfloat16, torch.float32))
    assert_close(losses(model, rank, world), losses(build("vit"), 0, 1), tolerance=2e-2)


def check_saving(folder: Path, rank: int, world: int) -> None:
    """The adapter saved from shards is the one that a single process saves."""
    one, two = build("vit"), build("vit")
    sharded = shard(two, ViTLayer)
    assert_close(losses(sharded, rank, world), losses(one, 0, 1))
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))  # offloaded, torch crashes
    if rank == 0:
        two.save_pretrained(folder / "two", state_dict=state)
        one.save_pretrained(folder / "one")
        alone, saved = (load_file(folder / name / "adapter_model.safetensors") for name in ("one", "two"))
        assert len(alone) > 10
        assert_same_tensors(saved, alone)


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    check_losses(rank, world)
    check_ladder_by_block(rank, world)
    check_mixed_precision(rank, world)
    check_saving(Path(sys.argv[1]), rank, world)
    if rank == 0:
        print(ALL_EQUAL)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
