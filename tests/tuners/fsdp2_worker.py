"""Run by `test_fsdp.py` in two processes: training sharded by `fully_shard`, saved and resumed, beside that of one process."""

import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import families
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.models.vit.modeling_vit import ViTLayer
from two_processes import (
    ALL_EQUAL,
    LADDER,
    accumulated,
    assert_close,
    assert_same_tensors,
    build,
    losses,
    sgd,
    with_checkpoints,
)

from peft_s2a import restore_activations


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "distributed"))
from fsdp_on_cpu import shard_on_cpu


def blocks(model: nn.Module) -> list[nn.Module]:
    """Inner ones first, as `fully_shard` wants them."""
    parts = [(name.split("."), module) for name, module in model.named_modules()]
    return [m for name, m in parts if len(name) > 1 and name[-1].isdigit() and name[-2] in ("layers", "stages")][::-1]


def sharded_by_block(model: nn.Module, **options) -> nn.Module:
    for part in (*blocks(model), model):
        fully_shard(part, **options)
    return model


def check_saving(folder: Path, rank: int, world: int) -> None:
    """The adapter saved from shards is the one that a single process saves, and a sharded model goes on from it."""
    one, two = build("vit"), sharded_by_block(build("vit"))
    assert_close(losses(two, rank, world), losses(one, 0, 1))
    with pytest.raises(RuntimeError, match="invalid python storage"):  # shards alone are no adapter
        two.save_pretrained(folder / f"shards-{rank}")
    state = get_model_state_dict(two, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # the other processes' is empty
        two.save_pretrained(folder / "two", state_dict=state)
        one.save_pretrained(folder / "one")
    dist.barrier()
    alone, sharded = (load_file(folder / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert len(alone) > 10
    assert_same_tensors(sharded, alone)
    torch.manual_seed(0)
    resumed = PeftModel.from_pretrained(families.FAMILIES["vit"](), folder / "two", is_trainable=True)
    assert_close(losses(sharded_by_block(resumed), rank, world, range(3, 5)), losses(one, 0, 1, range(3, 5)))


def check_mixed_precision(rank: int, world: int) -> None:
    policy, seen = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), set()
    model = sharded_by_block(build("vit"), mp_policy=policy)
    blocks(model)[0].register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    assert_close(losses(model, rank, world), losses(build("vit"), 0, 1), tolerance=2e-2)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def check_checkpoints(rank: int, world: int) -> None:
    """Both transformers' checkpoints and those that Accelerate's plugin puts around blocks."""
    expected = losses(with_checkpoints(build("vit")), 0, 1)
    by_transformers, wrapped = with_checkpoints(build("vit")), build("vit").train()
    apply_activation_checkpointing(wrapped, check_fn=lambda module: isinstance(module, ViTLayer))
    around_blocks = [module for module in wrapped.modules() if isinstance(module, CheckpointWrapper)]
    for model, parts in ((by_transformers, blocks(by_transformers)), (wrapped, around_blocks)):
        for part in (*parts, model):
            fully_shard(part)
        assert_close(losses(model, rank, world), expected)


def check_accumulation(rank: int, world: int) -> None:
    expected = accumulated(build("vit"), 0, 1, lambda sent: nullcontext())
    model = sharded_by_block(build("vit"))

    def sends(sent: bool) -> nullcontext:
        model.set_requires_gradient_sync(sent)
        return nullcontext()

    assert_close(accumulated(model, rank, world, sends), expected)


def check_restoring(rank: int, world: int) -> None:
    """Activations of a sharded model, whose classes FSDP has derived from ours, may be restored."""
    model = sharded_by_block(build("vit"))
    restore_activations(model)
    assert_close(losses(model, rank, world), losses(build("vit", {"activation_quantization": None}), 0, 1), 1e-5)


def check_accelerate(rank: int, world: int) -> None:
    """Accelerate's plugin, which also shards the embeddings."""
    shard_on_cpu()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["ViTLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = build("vit")
    prepared, _ = accelerator.prepare(model, sgd(model))
    assert all(hasattr(parameter, "full_tensor") for parameter in prepared.parameters())
    assert_close(losses(prepared, rank, world), losses(build("vit"), 0, 1))


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    check_saving(Path(sys.argv[1]), rank, world)
    check_mixed_precision(rank, world)
    check_checkpoints(rank, world)
    check_accumulation(rank, world)
    check_restoring(rank, world)
    for family, options, by_block in (("vit", {}, True), ("resnet", {}, True), ("vit", LADDER, False)):
        expected = losses(build(family, options), 0, 1)
        model = build(family, options)
        for block in blocks(model) if by_block else ():
            fully_shard(block)
        fully_shard(model)
        assert_close(losses(model, rank, world), expected)
    model = sharded_by_block(build("vit", LADDER))
    with pytest.raises(RuntimeError, match="the whole model alone"):
        losses(model, rank, world)
    check_accelerate(rank, world)
    if rank == 0:
        print(ALL_EQUAL)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
