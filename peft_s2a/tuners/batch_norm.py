"""Keeping the running statistics of batch normalisation as the base model has them."""

from __future__ import annotations

from torch import nn

from peft_s2a.tuners.layer import AttachedLayer


class FrozenStatistics(AttachedLayer):
    """Keeps its host, a batch normalisation, in inference mode while an adapter that wants so is active.

    The host then is an affine map with the statistics of pretraining, whatever `model.train()` says. An adapter trained
    so computes the same after it is loaded into a fresh base model, whose statistics did not drift along.

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

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.frozen_for)
