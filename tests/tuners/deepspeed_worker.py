"""Run by `test_deepspeed.py` in two processes: ZeRO's losses and adapter beside those of one process."""

import sys
import warnings

import deepspeed
import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from two_processes import ALL_EQUAL, assert_close, assert_same_tensors, build, losses, sgd


def main() -> None:
    warnings.simplefilter("ignore")
    deepspeed.init_distributed("gloo")
    rank, world, stage = dist.get_rank(), dist.get_world_size(), int(sys.argv[1])
    one, two = build("vit"), build("vit")
    expected = losses(one, 0, 1)
    engine, *_ = deepspeed.initialize(
        model=two,
        optimizer=sgd(two),
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

    assert_close(losses(engine, rank, world, step=step_sharded), expected, tolerance=1e-3)
    with deepspeed.zero.GatheredParameters(list(two.parameters()), enabled=stage == 3):
        assert_same_tensors(get_peft_model_state_dict(two), get_peft_model_state_dict(one))
    if rank == 0:
        print(ALL_EQUAL)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
