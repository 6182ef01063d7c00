"""Ladder: a narrow network beside a backbone that needs no backward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft_s2a.anatomy import input_width, projections
from peft_s2a.compat import BufferDict, resident
from peft_s2a.tuners.layer import AttachedLayer, as_tensor, first_tensor, with_first_tensor, with_tensor
from peft_s2a.tuners.side import frozen_projection


class _LadderBase(AttachedLayer):
    crosses_modules = True
    """Its hooks leave each other tensors from one module to another: those that hold a host run without a plan."""

    def not_mergeable(self, adapter_name: str) -> str:
        return (
            f"Adapter {adapter_name!r} is a ladder beside the backbone, which no weight of it can hold, so it cannot "
            "be merged. Keep the adapter separate, or train with `side_mode='residual'` and "
            "`side_activation='linear'`."
        )


class LadderRung(_LadderBase):
    r"""One step of the ladder, beside one block: `h <- h + gelu(D x + A h + a)`, x being the block's input.

    Ladder side-tuning (Sung et al. 2022, arXiv:2206.06522, section 3) runs a small trained network that reads the
    backbone's intermediate features and sends nothing back, so the backbone needs no backward pass. There each rung is
    a narrow copy of a transformer block behind a learned projection; here, our choice, it is one recurrent layer of
    width r behind a frozen projection D, so that of the backbone nothing at all is kept. A starts at zero.

    While the backbone runs, a rung only computes `D x`, for which nothing has to be trained; the ladder's top runs all
    steps. So nothing that is trained runs inside a block, which may be checkpointed.

    The state h is [batch, positions..., r]. Where the backbone reduces its resolution the state is averaged over
    windows; tokens without a square layout are averaged to one state per image.

    Args:
        host: the block.
    """

    attribute = "ladder_adapter"
    adapter_layer_names = ("s2a_mix", "s2a_shift")
    other_param_names = ("s2a_down",)

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        self.s2a_mix = nn.ParameterDict({})
        self.s2a_shift = nn.ParameterDict({})
        self.s2a_down = BufferDict({}, persistent=True)
        self.activation = nn.GELU()

    def _hook(self) -> None:
        self._before(self._host[0], self._read)

    def update_layer(self, adapter_name: str, *, rank: int, init: str, init_weights: bool, is_first: bool) -> None:
        """Adds an adapter; the first rung of a ladder starts the state, others mix it (A). See [`S2ASideConfig`]."""
        like = self.reference_tensor()
        first = projections(self._host[0])[0]
        down = frozen_projection(first, (rank, input_width(first)), init)
        self.s2a_down[adapter_name] = down.to(like.device, like.dtype)
        factory = {"device": like.device, "dtype": like.dtype}
        self.s2a_shift[adapter_name] = nn.Parameter(torch.zeros(rank, **factory))
        if is_first:
            return
        self.s2a_mix[adapter_name] = nn.Parameter(torch.zeros(rank, rank, **factory))
        if not init_weights:
            nn.init.normal_(self.s2a_mix[adapter_name], std=rank**-0.5)

    def _read(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        # What the block receives decides: [..., channels] as tokens have them, or [batch, channels, ...] as images do.
        first = projections(self._host[0])[0]
        width = input_width(first)
        if x.shape[-1] != width or (x.dim() > 3 and x.shape[1] == width and not isinstance(first, nn.Linear)):
            x = x.movedim(1, -1)
        for name in self.adapters_in_use():
            self.in_flight[name] = F.linear(x, resident(self.s2a_down, name).to(x.dtype))

    def step(self, adapter_name: str, state: torch.Tensor | None) -> torch.Tensor | None:
        """The state behind this rung. `state` is the one before it, None at the first rung."""
        if adapter_name not in self.s2a_down:
            return state
        features = self.in_flight.pop(adapter_name)
        rank = features.shape[-1]
        features = features + _whole(resident(self.s2a_shift, adapter_name), rank).to(features.dtype)
        if state is None:
            return self.activation(features)
        state = resample(state.to(features.dtype), features.shape[1:-1])
        mix = _whole(resident(self.s2a_mix, adapter_name), rank, rank).to(features.dtype)
        return state + self.activation(features + F.linear(state, mix))


class LadderTop(_LadderBase):
    """Joins the ladder's state, averaged over positions, to the features: `y + side_alpha / side_rank * U h`.

    U starts at zero. With task heads the features are what these read, behind everything of the backbone; without one
    they are what the last block, on which the layer sits, puts out.

    Args:
        host: the last block.
        width: the width of the features.
    """

    attribute = "ladder_top"
    adapter_layer_names = ("s2a_up",)

    def __init__(self, host: nn.Module, width: int) -> None:
        super().__init__(host)
        self.width = width
        self.s2a_up = nn.ParameterDict({})
        self.scaling: dict[str, float] = {}
        self._rungs: list[LadderRung] = []
        self._heads: list[nn.Module] = []

    def join(self, model: nn.Module, rungs: list[LadderRung], heads: list[nn.Module]) -> None:
        """Sets the rungs below, in order, and where the state joins the features: at the inputs of `heads`, or at the
        host's output if there are none. `model` holds all of them."""
        self.leave()
        self._rungs, self._heads = rungs, heads
        self._during(model)
        for head in heads:
            self._before(head, self._join_input)
        if not heads:
            self._after(self._host[0], self._join_output)

    def leave(self) -> None:
        """Undoes `join`."""
        self._unhook()
        self._rungs, self._heads = [], []

    def _begin(self, *call: Any) -> None:
        for layer in self._rungs:
            layer._begin()
        super()._begin()

    def _end(self, *call: Any) -> None:
        for layer in self._rungs:
            layer._end()
        super()._end()

    def update_layer(self, adapter_name: str, *, rank: int, alpha: float, init_weights: bool) -> None:
        """Adds an adapter; the arguments are those of [`S2ASideConfig`]."""
        like = self.reference_tensor()
        up = torch.zeros(self.width, rank, device=like.device, dtype=like.dtype)
        self.s2a_up[adapter_name] = nn.Parameter(up)
        if not init_weights:
            nn.init.normal_(self.s2a_up[adapter_name], std=rank**-0.5)
        self.scaling[adapter_name] = alpha / rank

    def delete_adapter(self, adapter_name: str) -> None:
        self.scaling.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _join_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if not self.adapters_in_use():
            return None
        joined = with_first_tensor(args, kwargs, self._join(first_tensor(args, kwargs)))
        if module is self._heads[-1]:
            self.forget_loose()
        return joined

    def _join_output(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not self.adapters_in_use():
            return output
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise RuntimeError(
                "Beside a backbone without a task head a ladder joins the output of the last block, which gradient "
                "checkpointing would run twice. It has nothing to save here, since the backbone keeps nothing for "
                "backward: call `gradient_checkpointing_disable()`."
            )
        joined = with_tensor(output, self._join(as_tensor(output)))
        self.forget_loose()
        return joined

    def _join(self, features: torch.Tensor) -> torch.Tensor:
        for name in self.adapters_in_use():
            update = self._update(name).to(features.dtype)
            positions = [1] * (features.dim() - 2)
            channels_first = features.dim() == 4 and features.shape[1] == self.width
            shape = (self.width, *positions) if channels_first else (*positions, self.width)
            features = features + update.reshape(-1, *shape)
        return features

    def _update(self, adapter_name: str) -> torch.Tensor:
        """What is added to the features, [batch, width]. Several heads share it."""
        if any(adapter_name in rung.in_flight for rung in self._rungs):
            state = None
            for rung in self._rungs:
                state = rung.step(adapter_name, state)
            up = _whole(resident(self.s2a_up, adapter_name), self.width, state.shape[-1]).to(state.dtype)
            up = up * self.scaling[adapter_name]
            self.in_flight[adapter_name] = F.linear(state.flatten(1, -2).mean(1), up)
        if adapter_name not in self.in_flight:
            raise RuntimeError(
                "A ladder joins the features that a task head reads, but the backbone has not run before this head: "
                "call the whole model, or its backbone and then its heads."
            )
        return self.in_flight[adapter_name]


def _whole(parameter: torch.Tensor, *shape: int) -> torch.Tensor:
    """`parameter`, which is sharded and not gathered now if it is a DTensor (FSDP2) or of another shape (FSDP1)."""
    if hasattr(parameter, "full_tensor") or parameter.shape != shape:
        raise RuntimeError(
            "The ladder's parameters are sharded with single blocks of the backbone, but it runs outside of them. Shard "
            "the whole model alone (`fully_shard(model)`, or `FullyShardedDataParallel(model)` without a wrapping "
            'policy), or use `side_mode="residual"`.'
        )
    return parameter


def resample(state: torch.Tensor, positions: torch.Size) -> torch.Tensor:
    """`state` [batch, positions..., r] averaged or repeated to other positions.

    Grids and square token sequences are averaged over windows. Sequences that differ otherwise (by a class token, say)
    go through their mean, one state per image.
    """
    if state.shape[1:-1] == positions:
        return state
    old_grid, new_grid = _grid(state.shape[1:-1]), _grid(positions)
    if old_grid is None or new_grid is None:
        mean = state.flatten(1, -2).mean(1)
        return mean.reshape(len(mean), *[1] * len(positions), -1).expand(-1, *positions, -1)
    image = state.reshape(len(state), *old_grid, -1) if state.dim() == 3 else state
    pooled = F.adaptive_avg_pool2d(image.movedim(-1, 1), new_grid).movedim(1, -1)
    return pooled.reshape(len(state), *positions, state.shape[-1])


def _grid(positions: torch.Size) -> tuple[int, int] | None:
    if len(positions) == 2:
        return positions[0], positions[1]
    side = math.isqrt(math.prod(positions))
    return (side, side) if len(positions) == 1 and side * side == math.prod(positions) else None
