"""Running statistics of batch normalisation: kept as the base model has them, or the adapter's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peft_s2a.compat import BufferDict, resident
from peft_s2a.tuners.bias import BiasLayer
from peft_s2a.tuners.layer import AttachedLayer


class FrozenStatistics(AttachedLayer):
    """Keeps its host, a batch or instance normalisation, in inference mode while an adapter that wants so is active.

    The host then is an affine map with the statistics of pretraining, whatever `model.train()` says. An adapter
    trained so computes the same after it is loaded into a fresh base model, whose statistics did not drift along.

    It works through `nn.Module.train`, which sets the flag of the host before it visits the host's children.
    """

    attribute = "frozen_statistics"

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        self.frozen_for: set[str] = set()
        self.training = host.training

    def update_layer(self, adapter_name: str) -> None:
        self.frozen_for.add(adapter_name)

    def _set_host_mode(self) -> None:
        frozen = bool(self.frozen_for.intersection(self.active_adapters))
        self._host[0].training = self.training and not frozen

    def train(self, mode: bool = True) -> FrozenStatistics:
        super().train(mode)
        self._set_host_mode()
        return self

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._set_host_mode()

    def delete_adapter(self, adapter_name: str) -> None:
        self.frozen_for.discard(adapter_name)
        super().delete_adapter(adapter_name)
        self._set_host_mode()

    def detach_from_host(self) -> None:
        super().detach_from_host()
        self._host[0].training = self.training

    def move_to(self, host: nn.Module) -> None:
        """Takes the module that the layer is a child of now for its host."""
        self._host[0] = host
        self._set_host_mode()

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.frozen_for)


def freeze_as_the_active_want(model: nn.Module, active_adapters: list[str]) -> None:
    """Where an adapter was deleted each layer has chosen a new one of its own, but these know only adapters that freeze."""
    for layer in model.modules():
        if isinstance(layer, FrozenStatistics):
            layer.set_adapter(active_adapters)


def following_its_host(convert: Callable) -> Callable:
    """Around `SyncBatchNorm.convert_sync_batchnorm`, which makes a new module of each batch normalisation and gives it the
    children of the old one: `FrozenStatistics` then keep the new one in inference mode."""

    @functools.wraps(convert)
    def convert_sync_batchnorm(cls: type, module: nn.Module, process_group: Any = None) -> nn.Module:
        converted = convert(cls, module, process_group)
        layer = FrozenStatistics.on(converted)
        if layer is not None and converted is not module:
            layer.move_to(converted)
        return converted

    return convert_sync_batchnorm


class BatchNormLayer(BiasLayer):
    """A [`BiasLayer`] around a batch or instance normalisation whose adapters may have running statistics of their own.

    Statistics that follow the training images belong to the adapter: they are saved with it, and the base model's stay
    as they are for other adapters, and for `disable_adapter`. With several active adapters the first one's are used.

    Args:
        base_layer: a batch normalisation, or an instance normalisation with running statistics.
    """

    statistics = {
        "running_mean": "s2a_running_mean",
        "running_var": "s2a_running_var",
        "num_batches_tracked": "s2a_num_batches_tracked",
    }
    other_param_names = tuple(statistics.values())

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for name in self.other_param_names:
            setattr(self, name, BufferDict({}, persistent=True))
        self._replaced: dict[str, dict[str, torch.Tensor]] = {}
        """Merged adapter -> what its statistics took the place of."""

    def update_statistics(self, adapter_name: str) -> None:
        """Gives an adapter its own statistics, which start as the base module's."""
        for name, own_name in self.statistics.items():
            getattr(self, own_name)[adapter_name] = getattr(self.get_base_layer(), name).clone()

    def _get_available_adapters(self) -> set[str]:
        return super()._get_available_adapters() | set(self.s2a_running_mean.keys())

    def _own_statistics(self, adapter_name: str) -> dict[str, torch.Tensor]:
        return {
            name: resident(getattr(self, own_name), adapter_name)
            for name, own_name in self.statistics.items()
            if adapter_name in getattr(self, own_name)
        }

    def _adapted_tensors(
        self, adapters: list[str], *, bias_inside: bool
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        tensors, offset = super()._adapted_tensors(adapters, bias_inside=bias_inside)
        statistics = next(filter(None, map(self._own_statistics, adapters)), None)
        if statistics is not None:
            tensors.update(statistics)
            for name in ("weight", "bias"):
                value = tensors[name] if name in tensors else resident(self.base_layer, name)
                if value is not None:  # torch wants it of the statistics' dtype; PEFT keeps an adapter's in float32
                    tensors[name] = value.to(statistics["running_mean"].dtype)
        return tensors, offset

    def _merge_adapter(self, adapter_name: str, sign: int) -> dict[torch.Tensor, torch.Tensor]:
        new_values = super()._merge_adapter(adapter_name, sign)
        base_layer = self.get_base_layer()
        statistics = self._own_statistics(adapter_name)
        if sign > 0:
            if any(self._replaced.values()):  # as without merging, those of the first adapter count
                statistics = {}
            self._replaced[adapter_name] = {name: getattr(base_layer, name).clone() for name in statistics}
        else:
            statistics = self._replaced.pop(adapter_name)
        for name, value in statistics.items():
            base_statistic = getattr(base_layer, name)
            new_values[base_statistic] = value.to(base_statistic.device, copy=True)
        return new_values
