"""Start a script with FSDP2 on CPUs, to try a configuration without GPUs.

    accelerate launch --config_file examples/distributed/fsdp2.yaml examples/distributed/fsdp_on_cpu.py \\
        examples/image_classification.py --use_cpu --train_dir photos/train --method s2a

Accelerate (1.15) shards on accelerators alone: on CPUs the same configuration trains with DistributedDataParallel and
does not say so. FSDP2 itself runs over gloo, so here Accelerate is told to use it. On GPUs, leave this script out.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def shard_on_cpu() -> None:
    initialise = AcceleratorState.__init__

    def sharded(
        self: AcceleratorState, *args: Any, fsdp_plugin: FullyShardedDataParallelPlugin | None = None, **kwargs: Any
    ) -> None:
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = sharded


if __name__ == "__main__":
    shard_on_cpu()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
