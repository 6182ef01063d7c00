"""Refusing models whose layers are split over processes (tensor parallelism).

A structure and a code are made for a layer that is whole and reads whole activations. A part of one has part of the
channels, of the heads or of the tokens, so the mean over tokens, the scales of a row and the bias of a layer would be
those of the part. FSDP2 is another matter: its parameters are parts only while they are not in use.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


WAYS_OUT = (
    "S2A's structures and quantised activations need whole layers. Load the model without `tp_plan` or "
    "`parallelize_module`, and train on several processes with DistributedDataParallel or FSDP2 (`fully_shard`); see "
    "docs/distributed.md."
)


class TensorParallelError(ValueError):
    """A model is tensor-parallel."""


def refuse_tensor_parallel(model: nn.Module) -> None:
    """Does nothing to a model whose layers are whole, or sharded by FSDP2.

    Raises:
        TensorParallelError: If a layer is split over processes: by transformers' `tp_plan`, by torch's
            `parallelize_module`, or by DeepSpeed's AutoTP. The model is as it was.
    """
    found = _found(model)
    if found is not None:
        raise TensorParallelError(f"The model is tensor-parallel: {found}. {WAYS_OUT}")


def refuse_partitioned(model: nn.Module) -> None:
    """Does nothing to a model whose weights have their shapes, from which an adapter takes its own.

    Raises:
        ValueError: If DeepSpeed's ZeRO-3 spread the weights when they were read. The model is as it was.
    """
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", None)
        if shape is not None and parameter.shape != shape:
            raise ValueError(
                f"ZeRO-3 spread the weights over processes when they were read: `{name}`, of shape {tuple(shape)}, is "
                f"{tuple(parameter.shape)} here, and an adapter takes its shapes from them. Read the model and add the "
                "adapter before there is a ZeRO-3 configuration and call `deepspeed.initialize` then, or train with "
                "ZeRO-2, FSDP2 (`fully_shard`) or DistributedDataParallel; see docs/distributed.md."
            )


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether it is a `DTensor`: what a layer of torch's tensor parallelism computes with."""
    distributed = sys.modules.get("torch.distributed.tensor")  # without it there are none, and importing it takes time
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def refuse_distributed(tensor: torch.Tensor) -> None:
    """
    Raises:
        TensorParallelError: If the tensor is one of a tensor-parallel layer.
    """
    if is_distributed(tensor):
        raise TensorParallelError(
            f"A layer is tensor-parallel: it computes with a DTensor of shape {tuple(tensor.shape)}, {_layout(tensor)}. "
            f"{WAYS_OUT}"
        )


def _found(model: nn.Module) -> str | None:
    """The first sign of tensor parallelism."""
    whole = set()  # modules whose parameters FSDP2 gathers before they are used
    for module in model.modules():
        if _is_fully_sharded(module):
            whole.update(module.modules())
    for name, module in model.named_modules():
        where = f"`{name}`" if name else type(module).__name__
        size = getattr(module, "_tp_size", None)  # transformers'
        if isinstance(size, int) and size > 1:
            return f"transformers split {where} over {size} processes (`tp_plan`)"
        if getattr(module, "_hf_tp_plan", None) is not None:  # transformers', before 5.17
            return f"transformers split {where} ({module._hf_tp_plan!r}, from `tp_plan`)"
        if type(module).__module__.startswith("deepspeed.module_inject"):
            return f"DeepSpeed split {where} ({type(module).__name__})"
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and is_distributed(tensor) and (module not in whole or _is_split_twice(tensor)):
                return f"`{own}` of {where} is a DTensor, {_layout(tensor)}"
    return None


def _is_fully_sharded(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _is_split_twice(tensor: Any) -> bool:
    """Whether a parameter of FSDP2 was a part before. Alone it shards over a mesh of one dimension, or over the last of
    two with copies along the first."""
    return tensor.device_mesh.ndim > 1 and not tensor.placements[0].is_replicate()


def _layout(tensor: Any) -> str:
    placements = ", ".join(map(str, tensor.placements))
    return f"laid out as {placements} over {tensor.device_mesh.size()} device(s), outside of `fully_shard`"
