"""The tuner: puts the S2A layers into a model and takes them out again. Everything else is PEFT's `BaseTuner`."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from torch import nn

from peft_s2a.config import _S2ABaseConfig
from peft_s2a.registration import PREFIX
from peft_s2a.tuners.batch_norm import FrozenStatistics
from peft_s2a.tuners.bias import BATCH_NORMS, BiasLayer
from peft_s2a.tuners.ladder import LadderRung, LadderTop
from peft_s2a.tuners.layer import AttachedLayer, S2ALayer
from peft_s2a.tuners.prompt import InputPromptLayer, PromptLayer
from peft_s2a.tuners.side import SideLayer, input_width, output_width, projections
from peft_s2a.tuners.targets import (
    find_attention,
    find_task_heads,
    is_excluded,
    resolve_targets,
    side_entry,
    visible_modules,
)


ATTRIBUTES = "|".join(layer.attribute for layer in (SideLayer, PromptLayer, LadderRung, LadderTop))


class S2AModel(BaseTuner):
    """Structure-activation synergy (Jin et al. 2025, arXiv:2503.08154) as a PEFT tuner.

    Serves the PEFT types S2A, S2A_BIAS, S2A_PROMPT and S2A_SIDE. Usually made by `peft.get_peft_model`.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        peft_config ([`S2AConfig`] or one of its variants): The configuration.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`): Create empty adapter weights on the meta device, to speed up loading.

    Raises:
        ValueError: if a requested structure has no place to go in the model; the model is left as it was.
    """

    tuner_layer_cls = S2ALayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        # On the instance: PEFT wants the prefix of a registered class to be its type's name, and this class serves four.
        self.__dict__["prefix"] = PREFIX
        super().__init__(model, *args, **kwargs)

    # Injection: everything is decided, and refused, before the model is changed.

    def _prepare_adapter_config(self, peft_config: _S2ABaseConfig, model_config: dict) -> _S2ABaseConfig:
        if peft_config.modules_to_save is None:
            peft_config.modules_to_save = find_task_heads(self.model)
        peft_config.structure_targets = resolve_targets(self.model, peft_config)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: _S2ABaseConfig, key: str) -> bool | _ExcludedModule:
        if any(key in names for names in peft_config.structure_targets.values()):
            return True
        return _ExcludedModule() if is_excluded(peft_config, key) else False

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, state_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state_dict is not None:  # PEFT reads the targets off the keys, which may go through a layer on the target
            state_dict = {re.sub(rf"\.({ATTRIBUTES})(?=\.{PREFIX})", "", key): None for key in state_dict}
        try:
            super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
            config = self.peft_config[adapter_name]
            self._join_ladder(config)
            self._freeze_statistics(config, adapter_name)
        except Exception:
            self._discard_adapter(adapter_name)
            raise

    def _create_and_replace(
        self,
        peft_config: _S2ABaseConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        targets = peft_config.structure_targets
        if current_key in targets.get("bias", ()):
            self._add_bias(peft_config, adapter_name, parent, target_name)
        if current_key in targets.get("prompt", ()):
            self._add_prompt(peft_config, adapter_name, parent, target_name)
        if current_key in targets.get("side", ()):
            self._add_side(peft_config, adapter_name, parent, target_name)
        if current_key in targets.get("ladder", ()):
            self._add_rung(peft_config, adapter_name, target, current_key)

    def _wrapped(self, parent: nn.Module, target_name: str) -> BiasLayer:
        """The wrapper around a leaf, put there if need be."""
        target = getattr(parent, target_name)
        if not isinstance(target, BiasLayer):
            wrapper = BiasLayer(target)
            wrapper.training = target.training
            self._replace_module(parent, target_name, wrapper, target)
            target = wrapper
        return target

    def _add_bias(self, config: _S2ABaseConfig, adapter_name: str, parent: nn.Module, target_name: str) -> None:
        layer = self._wrapped(parent, target_name)
        frozen_batch_norm = config.freeze_batch_norm_stats and isinstance(layer.get_base_layer(), BATCH_NORMS)
        layer.update_layer(
            adapter_name,
            train_scale=config.train_norm_scale and not frozen_batch_norm,
            init_weights=config.init_weights,
        )

    def _add_prompt(self, config: _S2ABaseConfig, adapter_name: str, parent: nn.Module, target_name: str) -> None:
        target = getattr(parent, target_name)
        layer: PromptLayer | InputPromptLayer | None
        if projections(target) == [getattr(target, "base_layer", target)]:
            host = self._wrapped(parent, target_name)
            layer = InputPromptLayer.on(host) or InputPromptLayer(host, input_width(host.get_base_layer())).attach()
        else:
            layer = PromptLayer.on(target)
            if layer is None:
                parts = find_attention(target)[""]
                layer = PromptLayer(target, parts.query, parts.output, parts.num_heads, parts.width).attach()
        layer.update_layer(adapter_name, num_tokens=config.num_prompt_tokens, init_weights=config.init_weights)

    def _add_side(self, config: _S2ABaseConfig, adapter_name: str, parent: nn.Module, target_name: str) -> None:
        target = getattr(parent, target_name)
        is_leaf = projections(target) == [getattr(target, "base_layer", target)]
        host = self._wrapped(parent, target_name) if is_leaf else target
        layer = SideLayer.on(host) or SideLayer(host, side_entry(parent, target_name)).attach()
        layer.update_layer(
            adapter_name,
            rank=config.side_rank,
            alpha=config.side_alpha,
            activation=config.side_activation,
            init=config.side_init,
            init_weights=config.init_weights,
        )

    def _add_rung(self, config: _S2ABaseConfig, adapter_name: str, block: nn.Module, key: str) -> None:
        names = config.structure_targets["ladder"]
        rung = LadderRung.on(block) or LadderRung(block).attach()
        rung.update_layer(
            adapter_name,
            rank=config.side_rank,
            init=config.side_init,
            init_weights=config.init_weights,
            is_first=key == names[0],
        )
        if key == names[-1]:
            heads = [self.model.get_submodule(name) for name in find_task_heads(self.model)]
            width = input_width(projections(heads[0])[0]) if heads else output_width(projections(block)[-1])
            top = LadderTop.on(block) or LadderTop(block, width).attach()
            top.update_layer(
                adapter_name, rank=config.side_rank, alpha=config.side_alpha, init_weights=config.init_weights
            )

    def _join_ladder(self, config: _S2ABaseConfig) -> None:
        """Connects rungs and top. The heads may just have been wrapped, so this comes after all else."""
        if "ladder" not in config.structure_targets:
            return
        heads = [self.model.get_submodule(name) for name in find_task_heads(self.model)]
        states: dict[str, torch.Tensor] = {}
        for layer in self._layers():
            if isinstance(layer, (LadderRung, LadderTop)):
                layer.states = states
            if isinstance(layer, LadderTop):
                layer.join(heads)

    def _freeze_statistics(self, config: _S2ABaseConfig, adapter_name: str) -> None:
        if not config.freeze_batch_norm_stats:
            return
        for _, module in visible_modules(self.model):
            if isinstance(module, BATCH_NORMS) and module.track_running_stats:
                layer = FrozenStatistics.on(module) or FrozenStatistics(module).attach()
                layer.update_layer(adapter_name)
                layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # Removal.

    def _layers(self) -> list[S2ALayer]:
        return [module for module in self.model.modules() if isinstance(module, S2ALayer)]

    def _detach_layers(self) -> None:
        """Takes off all layers that sit on a module of the base model."""
        for layer in self._layers():
            if isinstance(layer, AttachedLayer) and not isinstance(layer.get_base_layer(), BiasLayer):
                layer.detach_from_host()

    def _discard_adapter(self, adapter_name: str) -> None:
        """Removes what an injection that failed has left; the wrappers too if no other adapter is there."""
        for layer in self._layers():
            if adapter_name in layer._all_available_adapter_names():
                layer.delete_adapter(adapter_name)
        if not any(layer._all_available_adapter_names() for layer in self._layers()):
            self._detach_layers()
            super()._unload_and_optionally_merge(merge=False)

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Refuses, before any weight is changed, to merge what cannot be merged."""
        for layer in self._layers():
            for name in layer.active_adapters if adapter_names is None else adapter_names:
                if name in layer._get_available_adapters() and (reason := layer.not_mergeable(name)):
                    raise ValueError(reason)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Adds the active (or the named) adapters to the base weights; see `BaseTuner.merge_adapter`.

        Raises:
            ValueError: if an adapter has prompts, activation functions or branches around several layers, which no weight
                can hold. Nothing is changed then.
        """
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self.merge_adapter(adapter_names, safe_merge=safe_merge)
        self._detach_layers()
        for layer in self._layers():
            layer.merged_adapters = []
        return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)

    # Saving: running statistics that follow the training images belong to the adapter.

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: _S2ABaseConfig, adapter_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        to_return = super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict, **kwargs
        )
        if not config.freeze_batch_norm_stats:
            statistics = ("running_mean", "running_var", "num_batches_tracked")
            for name, module in model.named_modules():
                if isinstance(module, BATCH_NORMS):
                    keys = (f"{name}.{statistic}" for statistic in statistics)
                    to_return.update({key: state_dict[key] for key in keys if key in state_dict})
        return to_return
