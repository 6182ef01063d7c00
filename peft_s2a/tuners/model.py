"""The tuner: puts the S2A layers into a model and takes them out again. Everything else is PEFT's `BaseTuner`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from peft_s2a.activations.config import ActivationQuantizationConfig
from peft_s2a.activations.wrap import quantize_activations, restore_activations
from peft_s2a.anatomy import (
    BATCH_NORMS,
    CONTAINERS,
    exact_keys,
    find_attention,
    find_task_heads,
    has_running_statistics,
    hidden_in_heads,
    input_width,
    named_exactly,
    output_width,
    projections,
    saved_whole,
    side_entry,
    visible_modules,
)
from peft_s2a.compat import BufferDict, ExcludedModule, is_quantized_weight, name_in_state
from peft_s2a.config import _S2ABaseConfig
from peft_s2a.loading import check_values, follow_quantization, some, wanted_quantization
from peft_s2a.parallelism import refuse_partitioned, refuse_tensor_parallel
from peft_s2a.registration import PREFIX
from peft_s2a.tuners.batch_norm import BatchNormLayer, FrozenStatistics, freeze_as_the_active_want
from peft_s2a.tuners.bias import BiasLayer
from peft_s2a.tuners.ladder import LadderRung, LadderTop
from peft_s2a.tuners.layer import AttachedLayer, S2ALayer, aligned
from peft_s2a.tuners.prompt import InputPromptLayer, PromptLayer
from peft_s2a.tuners.side import DEFAULT_RANK, SideLayer
from peft_s2a.tuners.structures import PARAMETER_NAMES
from peft_s2a.tuners.targets import find_statistics, is_excluded, recorded_in, resolve_targets


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
        # On the instance: PEFT wants the prefix of a registered class to be its type's name, and this class serves
        # four.
        self.__dict__["prefix"] = PREFIX
        self.__dict__["_is_injecting"] = False
        super().__init__(model, *args, **kwargs)

    # Injection: everything is decided, and refused, before the model is changed.

    def _prepare_adapter_config(self, peft_config: _S2ABaseConfig, model_config: dict) -> _S2ABaseConfig:
        peft_config.structure_targets = resolve_targets(self.model, peft_config)
        self._refuse_conflicts(peft_config)
        return peft_config

    def _refuse_conflicts(self, config: _S2ABaseConfig) -> None:
        """Raises if one adapter trains whole what another one adapts: the wrapper of neither fits into the other's."""
        for name, other in self.peft_config.items():
            if other is config or not isinstance(other, _S2ABaseConfig) or other.structure_targets is None:
                continue
            for whole, adapted in ((config, other), (other, config)):
                found = [
                    target
                    for structure, targets in adapted.structure_targets.items()
                    for target in targets
                    if not (structure == "statistics" and adapted.freeze_batch_norm_stats)
                    and saved_whole(whole.modules_to_save or (), target)
                ]
                if found:
                    one, another = (
                        ("it", f"the adapter {name!r}") if whole is config else (f"the adapter {name!r}", "it")
                    )
                    raise ValueError(
                        f"The adapter cannot be added: {one} trains {found[0]!r} in full, which {another} adapts. Leave it "
                        "out of one of them, with `modules_to_save` or `exclude_modules`."
                    )

    @staticmethod
    def _check_target_module_exists(peft_config: _S2ABaseConfig, key: str) -> bool | ExcludedModule:
        if any(key in names for names in peft_config.structure_targets.values()):
            return True
        return ExcludedModule() if is_excluded(peft_config, key) else False

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, state_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if "." in adapter_name or any(hasattr(kind({}), adapter_name) for kind in (nn.ParameterDict, BufferDict)):
            self._discard_adapter(adapter_name)
            raise ValueError(
                f"An adapter cannot be called {adapter_name!r}: its weights are held under this name by torch "
                "modules, which allow no dots and none of their own attributes. Choose another name."
            )
        try:
            refuse_tensor_parallel(model)
            refuse_partitioned(model)
        except ValueError:
            self._discard_adapter(adapter_name)
            raise
        # What is decided for this model goes into a copy, so that the user's configuration serves other models too.
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        if config.modules_to_save is None:
            config.modules_to_save = exact_keys(model, find_task_heads(model))
        if reason := _untrainable(model, config.modules_to_save) or _not_there(model, config.modules_to_save):
            self._discard_adapter(adapter_name)
            raise ValueError(reason)
        if state_dict is not None:
            config.structure_targets = recorded_in(state_dict)
            if statistics := find_statistics(model, config):
                config.structure_targets["statistics"] = statistics
            # PEFT reads the targets off the keys: what comes before our prefix.
            names = {name for targets in config.structure_targets.values() for name in targets}
            state_dict = dict.fromkeys(f"{name}.{PREFIX}" for name in names)
        requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
        wanted_before = self._wanted_quantization(
            dict.fromkeys(name for layer in self._layers() for name in layer.active_adapters)
        )
        self._is_injecting = True
        for top in self._ladder_tops():
            top.leave()  # PEFT copies heads with all that hooks on them refer to
        try:
            super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
            self._train_whole(config, adapter_name)
            self._freeze_statistics(config, adapter_name)
            self._quantize_activations(wanted_before, has_new_layers=True)
        except Exception:
            self._discard_adapter(adapter_name)
            for parameter, required_grad in requires_grad.items():
                parameter.requires_grad = required_grad
            raise
        finally:
            self._is_injecting = False
            self._join_ladders()

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
        if current_key in targets.get("statistics", ()) and not peft_config.freeze_batch_norm_stats:
            self._wrapped(parent, target_name).update_statistics(adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own moves weights to the right device, where ours are made, and expects modules that hold a weight.
        setattr(parent, child_name, new_module)

    def _wrapped(self, parent: nn.Module, target_name: str) -> BiasLayer:
        """The wrapper around a leaf, put there if need be."""
        target = getattr(parent, target_name)
        if not isinstance(target, BiasLayer):
            has_statistics = isinstance(target, BATCH_NORMS) or has_running_statistics(target)
            wrapper = BatchNormLayer(target) if has_statistics else BiasLayer(target)
            wrapper.training = target.training
            self._replace_module(parent, target_name, wrapper, target)
            if isinstance(parent, nn.TransformerEncoderLayer):
                # Without gradient it would read the base weights and call no layer, unless one of them has a hook.
                wrapper.register_forward_pre_hook(_do_nothing)
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
        entry = side_entry(parent, target_name)
        split = None if entry is None else (parent, entry)
        layer = SideLayer.on(host) or SideLayer(host, split).attach()
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
        rank = config.side_rank or DEFAULT_RANK
        rung = LadderRung.on(block) or LadderRung(block).attach()
        rung.update_layer(
            adapter_name,
            rank=rank,
            init=config.side_init,
            init_weights=config.init_weights,
            is_first=key == names[0],
        )
        if key == names[-1]:
            heads = [self.model.get_submodule(name) for name in find_task_heads(self.model)]
            width = input_width(projections(heads[0])[0]) if heads else output_width(projections(block)[-1])
            top = LadderTop.on(block) or LadderTop(block, width).attach()
            top.update_layer(adapter_name, rank=rank, alpha=config.side_alpha, init_weights=config.init_weights)

    def _freeze_statistics(self, config: _S2ABaseConfig, adapter_name: str) -> None:
        """Also in heads that other adapters train in full, where PEFT looks for no targets."""
        if not config.freeze_batch_norm_stats:
            return
        names = set(config.structure_targets.get("statistics", ()))
        modules = {**dict(visible_modules(self.model)), **dict(hidden_in_heads(self.model))}
        for host in (module for name, module in modules.items() if name in names):
            layer = FrozenStatistics.on(host) or FrozenStatistics(host).attach()
            layer.update_layer(adapter_name)
            layer.set_adapter(self.active_adapters)

    def _train_whole(self, config: _S2ABaseConfig, adapter_name: str) -> None:
        """What PEFT does for `modules_to_save`, for those that are given by their whole names."""
        for name in named_exactly(config.modules_to_save):
            parent_name, _, own_name = name.rpartition(".")
            wrapper = self.model.get_submodule(name)
            if isinstance(wrapper, ModulesToSaveWrapper):
                wrapper.update(adapter_name)
            else:
                wrapper = ModulesToSaveWrapper(wrapper, adapter_name)
                wrapper.set_adapter([])
                setattr(self.model.get_submodule(parent_name), own_name, wrapper)
            if adapter_name in self.active_adapters:
                wrapper.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def _ladder_tops(self) -> list[LadderTop]:
        return [layer for layer in self._layers() if isinstance(layer, LadderTop)]

    def _join_ladders(self) -> None:
        """Connects rungs and tops. The heads may just have been wrapped, so this comes after all else."""
        tops = self._ladder_tops()
        if tops:
            heads = [self.model.get_submodule(name) for name in find_task_heads(self.model)]
            rungs = [layer for layer in self._layers() if isinstance(layer, LadderRung)]
            for top in tops:
                top.join(self.model, rungs, heads)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Adds the adapter whose offsets and scales are `sum(weight * those of the adapter)`, inactive at first.

        Only adapters of biases are linear in all that they hold: prompts pass through a softmax, and side branches
        read directions of their own, which a sum does not keep.

        Args:
            adapters: names of adapters that train biases alone, and save no module whole.
            weights: a factor for each of them.
            adapter_name: the name of the new one.

        Raises:
            ValueError: if the name is taken, a name is unknown, there are not as many weights as adapters, or an
                adapter holds anything else. The model is left as it was.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"`adapter_name` is {adapter_name!r}, which the model has already. Choose another name.")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(
                f"`weights` must hold one number for each of `adapters`, got {len(weights)} for {len(adapters)} adapters."
            )
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"`adapters` names {name!r}, but the model has {', '.join(self.peft_config)}.")
            config = self.peft_config[name]
            if config.structures != ("bias",) or config.modules_to_save or not config.freeze_batch_norm_stats:
                raise ValueError(
                    f"Adapter {name!r} holds more than biases ({', '.join(config.structures)}; trained in full: "
                    f"{', '.join(config.modules_to_save or ()) or 'nothing'}), which have no weighted sum. Sum adapters "
                    "made with `S2ABiasConfig(modules_to_save=[])` and frozen batch-norm statistics."
                )
        configs = [self.peft_config[name] for name in adapters]
        config = self.peft_config[adapter_name] = copy.copy(configs[0])
        config.structure_targets = {
            kind: list(dict.fromkeys(name for one in configs for name in one.structure_targets.get(kind, ())))
            for kind in dict.fromkeys(kind for one in configs for kind in one.structure_targets)
        }
        config.train_norm_scale = any(one.train_norm_scale for one in configs)
        config.init_weights, config.dropped_targets = True, None
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for layer in self._layers():
                for name in layer.adapter_layer_names if isinstance(layer, BiasLayer) else ():
                    parameters = getattr(layer, name)
                    if adapter_name in parameters:
                        terms = [w * parameters[one] for one, w in zip(adapters, weights) if one in parameters]
                        parameters[adapter_name].copy_(sum(terms[1:], start=terms[0]) if terms else torch.zeros(()))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:  # PEFT would drop the argument without a word
            raise ValueError(
                "S2A does not mix adapters within a batch, as `adapter_names` asks for: split the batch by adapter "
                "and call `set_adapter` before each part."
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            refuse_tensor_parallel(self.model)  # it may have become so since
        yield

    # Removal.

    def print_placement(self) -> None:
        """Prints, for each adapter, the modules trained in full, how many modules carry each structure, and what was
        left out and why."""
        for name, config in self.peft_config.items():
            print(f"{name}: trained in full: {', '.join(config.modules_to_save or ()) or 'nothing'}")
            for structure, targets in config.structure_targets.items():
                print(f"  {structure}: {len(targets)} modules")
            for structure, reasons in (config.dropped_targets or {}).items():
                for target, reason in reasons.items():
                    print(f"  no {structure} on {target}: it {reason}")

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        try:
            return super()._get_module_names_tied_with_embedding()
        except NotImplementedError:  # detectors, which have no input embeddings that anything could be tied to
            return []

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; see `BaseTuner.delete_adapter`. Activations are quantised as those want that are active then."""
        wanted_before = self._wanted_quantization(self.active_adapters)
        super().delete_adapter(adapter_name)
        freeze_as_the_active_want(self.model, self.active_adapters)
        self._quantize_activations(wanted_before)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Activates adapters; see `BaseTuner.set_adapter`. Activations are quantised as the first of them wants that wants it."""
        wanted_before = self._wanted_quantization(self.active_adapters)
        super().set_adapter(*args, **kwargs)
        if not self._is_injecting:  # which may still fail, and then leaves nothing quantised
            self._quantize_activations(wanted_before)

    def _wanted_quantization(self, adapters: Iterable[str]) -> ActivationQuantizationConfig | None:
        return wanted_quantization(self.peft_config, adapters)

    def _quantize_activations(
        self, wanted_before: ActivationQuantizationConfig | None, has_new_layers: bool = False
    ) -> None:
        """As the active adapters want, if that has changed: what a user has set beside stays."""
        wanted = self._wanted_quantization(self.active_adapters)
        if has_new_layers and wanted is not None:
            quantize_activations(self.model, wanted)
        else:
            follow_quantization(self.model, wanted_before, wanted)

    def _layers(self) -> list[S2ALayer]:
        return [module for module in self.model.modules() if isinstance(module, S2ALayer)]

    def _detach_layers(self) -> None:
        """Takes off all layers that sit on a module of the base model."""
        for layer in self._layers():
            if isinstance(layer, AttachedLayer) and not isinstance(layer.get_base_layer(), BiasLayer):
                layer.detach_from_host()

    def _discard_adapter(self, adapter_name: str) -> None:
        """Removes all that an injection that failed has left, so that the model is as it was before."""
        self.peft_config.pop(adapter_name, None)
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                module.delete_adapter(
                    adapter_name, [other for other in module.active_adapters if other != adapter_name]
                )
                if not module.modules_to_save:
                    parent_name, _, own_name = name.rpartition(".")
                    setattr(self.model.get_submodule(parent_name), own_name, module.original_module)
        for layer in self._layers():
            if adapter_name in layer._all_available_adapter_names():
                layer.delete_adapter(adapter_name)
            if isinstance(layer, AttachedLayer) and not layer._all_available_adapter_names():
                layer.detach_from_host()
        for name, module in list(self.model.named_modules()):
            if isinstance(module, BiasLayer) and not module._all_available_adapter_names():
                if not any(isinstance(child, AttachedLayer) for child in module.children()):
                    parent_name, _, own_name = name.rpartition(".")
                    setattr(self.model.get_submodule(parent_name), own_name, module.get_base_layer())
        if not self.peft_config and getattr(self.model, "_hf_peft_config_loaded", False):
            self.model._hf_peft_config_loaded = False  # transformers sets it before it injects an adapter

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Refuses, before any weight is changed, to merge what cannot be merged."""
        holders = _holders(self.model)
        for layer in self._layers():
            for name in layer.active_adapters if adapter_names is None else adapter_names:
                if name not in layer._get_available_adapters():
                    continue
                if reason := layer.not_mergeable(name):
                    raise ValueError(reason)
                for parameter in layer.merged_into(name):
                    if len(users := holders.get(id(parameter), ())) > 1:
                        raise ValueError(
                            f"Adapter {name!r} cannot be merged: {' and '.join(sorted(users)[:2])} share a parameter (are "
                            "tied), and what is added for one would change the other. Keep the adapter separate, or leave "
                            "one of them out with `exclude_modules`."
                        )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Adds the active (or the named) adapters to the base weights; see `BaseTuner.merge_adapter`.

        Raises:
            ValueError: if an adapter has prompts, activation functions or branches around several layers, which no
                weight can hold. Nothing is changed then.
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
        if self._wanted_quantization(self.active_adapters) is not None:
            restore_activations(self.model)
        self._detach_layers()
        for layer in self._layers():
            layer.merged_adapters = []
        return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)

    # Saving and loading: nothing is lost on the way out, and broken weights are refused before anything is copied.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: _S2ABaseConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        found = super()._get_adapter_state_dict(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict=state_dict,
            unwanted_adapter_names=unwanted_adapter_names,
        )
        names = dict(cls._names_of_layers(model, adapter_name))
        own = {name for name, is_there in names.items() if is_there}
        absent = names.keys() - own
        _refuse_names_of_modules(cls._own_names(model, adapter_name) - absent, adapter_name, unwanted_adapter_names)
        # PEFT looks for what lies in wrapped modules by other names.
        found |= {name: state_dict[name] for name in own if name in state_dict}
        missing = own - found.keys()
        if missing and state_dict:  # processes that save nothing come with an empty one
            raise ValueError(
                f"`state_dict` lacks {len(missing)} of the {len(own)} tensors of the adapter {adapter_name!r} "
                f"({some(sorted(missing))}), so it is not saved. Give the whole model's, with its own names."
            )
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: _S2ABaseConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        check_values(state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        own, known = cls._own_names(model, adapter_name), model.state_dict().keys()
        named = ((f"{key}.{adapter_name}", key, value) for key, value in remapped.items())
        remapped = {new if new in own else key: value for new, key, value in named}  # of wrapped modules, see above
        # Parameters that this model lacks are left to PEFT, which reports them.
        foreign = [
            key
            for key in remapped
            if key not in own and (key in known or key.rpartition(".")[2] not in PARAMETER_NAMES)
        ]
        if foreign:
            raise ValueError(
                f"{len(foreign)} tensors are not those of an S2A adapter ({some(foreign)}). Loading them would change "
                "the base model or another adapter. None of the tensors was loaded."
            )
        return remapped

    @classmethod
    def _own_names(cls, model: nn.Module, adapter_name: str) -> set[str]:
        """The names in `model.state_dict()` of what belongs to an adapter."""
        names = {name for name, _ in cls._names_of_layers(model, adapter_name)}
        for prefix, module in model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                own = module.adapter_state_dict_load_map(adapter_name).values()
                names.update(f"{name_in_state(prefix)}.{name}" for name in own)
        return names

    @staticmethod
    def _names_of_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, bool]]:
        """Names in `model.state_dict()` that an adapter's layers may use, and whether it does use them."""
        for prefix, module in model.named_modules():
            if isinstance(module, S2ALayer):
                for name in (*module.adapter_layer_names, *module.other_param_names):
                    yield f"{name_in_state(prefix)}.{name}.{adapter_name}", adapter_name in getattr(module, name)

    def _load_from_state_dict(
        self, state_dict: dict[str, torch.Tensor], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # Torch would report a wrong shape after it has copied all the other tensors.
        own = self.state_dict(prefix=prefix)
        wrong = [
            f"{key} is {tuple(tensor.shape)} instead of {tuple(own[key].shape)}"
            for key, tensor in state_dict.items()
            if key in own and tensor.shape != own[key].shape
        ]
        if wrong:
            raise RuntimeError(
                f"size mismatch for {len(wrong)} tensors of the adapter ({some(wrong)}): its configuration is not "
                "the one that it was trained with. None of them was loaded."
            )
        if local_metadata.get("assign_to_params_buffers"):  # with `low_cpu_mem_usage`
            state_dict.update({key: aligned(tensor) for key, tensor in state_dict.items()})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _holders(model: nn.Module) -> dict[int, set[str]]:
    """{id of a parameter: names of the modules that use it}. A leaf that an adapter wraps is its wrapper's alone, unless
    others call it too."""
    found: dict[int, set[str]] = {}
    names = {id(module): name for name, module in model.named_modules()}
    for parameter in model.parameters(recurse=False):
        found.setdefault(id(parameter), set()).add("the model itself")
    for module in model.modules():
        for child_name, child in module._modules.items():
            if child is None:
                continue
            name = (
                names[id(module)] if isinstance(module, BiasLayer) else f"{names[id(module)]}.{child_name}".lstrip(".")
            )
            for parameter in child.parameters(recurse=False):
                found.setdefault(id(parameter), set()).add(name)
    return found


def _not_there(model: nn.Module, modules_to_save: list[str]) -> str | None:
    """Why modules that are given by their whole names cannot be trained whole; None if they can."""
    for name in named_exactly(modules_to_save):
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = model
        if module is model:
            return f"`modules_to_save` names {name!r}, which {type(model).__name__} has not."
        if isinstance(module, CONTAINERS):
            return f"`modules_to_save` names {name!r}, a {type(module).__name__}, which nobody calls. Name its parts."
    return None


def _refuse_names_of_modules(own: set[str], adapter_name: str, others: list[str]) -> None:
    """Raises if PEFT takes tensors of an adapter for another one's, which it tells by their names' parts."""
    for other in others:
        taken = sorted(name for name in own if other in name.split("."))
        if taken:
            raise ValueError(
                f"The adapter {adapter_name!r} cannot be saved beside one called {other!r}: PEFT takes every tensor for the "
                f"latter's whose name has that part ({some(taken)}). Delete {other!r}, or give it a name that no module has."
            )


def _untrainable(model: nn.Module, modules_to_save: list[str]) -> str | None:
    """Why the modules that are to be trained whole cannot be; None if they can."""
    for name, module in visible_modules(model):
        if saved_whole(modules_to_save, name) and any(map(is_quantized_weight, module.parameters(recurse=False))):
            return (
                f"{name!r} is to be trained whole, but its weight is held quantised ({type(module.weight).__name__}), "
                "and codes have no gradient. Leave it out when the model is quantised (`modules_to_not_convert` or "
                "`llm_int8_skip_modules` of transformers' configurations), or train other modules: `modules_to_save=[]`."
            )
    return None


def _do_nothing(module: nn.Module, args: tuple) -> None:
    pass
