"""Loading adapters that may come from strangers: what is no adapter's is refused, and a refusal leaves no trace.

PEFT and transformers put an adapter into the model before they read its file, and copy every tensor whose name the
model knows, also base weights. So their entry points are guarded here, where S2A is concerned.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from torch import nn

from peft_s2a import compat
from peft_s2a.activations.config import ActivationQuantizationConfig
from peft_s2a.activations.wrap import quantize_activations, restore_activations
from peft_s2a.anatomy.heads import EXACTLY
from peft_s2a.config import _S2ABaseConfig
from peft_s2a.tuners.batch_norm import BatchNormLayer, following_its_host, freeze_as_the_active_want
from peft_s2a.tuners.layer import S2ALayer, aligned
from peft_s2a.tuners.structures import PARAMETER_NAMES
from peft_s2a.tuners.targets import find_task_heads


OF_THE_MODEL = {"base_layer", "original_module", "modules_to_save"}
"""Parts of names that lead to base weights, or to those of other adapters; no file holds them."""
COUNTS = {name for name in BatchNormLayer.other_param_names if name.endswith("num_batches_tracked")}
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def check_tensors(tensors: Mapping[str, torch.Tensor], heads: Iterable[str]) -> None:
    """Refuses tensors that an adapter's file cannot hold.

    Args:
        tensors: a file's content.
        heads: the names, or their endings, of the modules that the adapter saves whole.

    Raises:
        ValueError: if a tensor is neither an S2A parameter nor part of such a module, or has NaN, infinity or a dtype
            that weights do not have.
    """
    heads = tuple(heads)
    foreign = [key for key in tensors if not _belongs(key, heads)]
    if foreign:
        raise ValueError(
            f"The file holds {len(foreign)} tensors that are not an S2A adapter's ({some(foreign)}). Loading them "
            "would change the base model. None of the tensors was loaded."
        )
    check_values(tensors)


def check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses NaN, infinity, and dtypes that weights do not have. Raises a ValueError."""
    odd = [
        f"{key} is {tensor.dtype}"
        for key, tensor in tensors.items()
        if tensor.dtype not in DTYPES and not _is_count(key, tensor)
    ]
    if odd:
        raise ValueError(
            f"The file holds {len(odd)} tensors that are not floating-point numbers of 16, 32 or 64 bits "
            f"({some(odd)}). None of the tensors was loaded."
        )
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"The weights hold NaN or infinity in {len(broken)} of {len(tensors)} tensors ({some(broken)}): the file "
            "is damaged, or training diverged. None of them was loaded."
        )


def _belongs(key: str, heads: tuple[str, ...]) -> bool:
    *host, last = key.removeprefix("base_model.model.").split(".")
    if OF_THE_MODEL.intersection(host):
        return False
    path = f".{'.'.join(host)}."
    return last in PARAMETER_NAMES or any(
        path.startswith(f".{head[1:]}.") if head.startswith(EXACTLY) else f".{head}." in path for head in heads
    )


def _is_count(key: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor counts the batches that a normalisation has seen."""
    return tensor.dtype == torch.int64 and any(
        part in COUNTS or part == "num_batches_tracked" for part in key.split(".")
    )


def some(items: list[str]) -> str:
    """The first few of `items`, for messages."""
    shown = [item if len(item) <= 200 else f"{item[:200]}..." for item in items[:3]]
    return ", ".join(shown) + (", ..." if len(items) > 3 else "")


@contextmanager
def unchanged_on_failure(model: nn.Module):
    """Undoes what happened to the modules of `model` meanwhile if an exception ends it and S2A is in the model.

    Restored are children, parameters, buffers, hooks, attributes and classes of all modules, and which parameters are
    trained; not the values of tensors.
    """
    modules = [(module, type(module), _state(module)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        if any(isinstance(module, S2ALayer) for module in model.modules()):
            for module, cls, state in modules:
                module.__class__ = cls
                _set_state(module, state)
            for parameter, requires_grad in trained:
                parameter.requires_grad = requires_grad
        raise


def _state(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """attribute -> (its value, a copy of it if it is a collection)."""
    return {
        name: (value, value.copy() if isinstance(value, (dict, set, list)) else None)
        for name, value in module.__dict__.items()
    }


def _set_state(module: nn.Module, state: dict[str, tuple[Any, Any]]) -> None:
    module.__dict__.clear()
    for name, (value, content) in state.items():
        if isinstance(value, list):
            value[:] = content
        elif content is not None:  # handles of hooks refer to the collection itself
            value.clear()
            value.update(content)
        module.__dict__[name] = value


def _guard_peft_from_pretrained(load: Callable) -> Callable:
    @functools.wraps(load)
    def from_pretrained(cls: type, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        with unchanged_on_failure(model):
            loaded = load(cls, model, *args, **kwargs)
        given = kwargs.get("config")
        if isinstance(given, _S2ABaseConfig):
            # As in PEFT, the configuration that was passed is the adapter's, with what has been decided for it.
            for name, config in loaded.peft_config.items():
                if name == (args[1] if len(args) > 1 else kwargs.get("adapter_name", "default")):
                    given.__dict__.update(config.__dict__)
                    loaded.peft_config[name] = given
        return loaded

    return from_pretrained


def _guard_peft_load_adapter(load: Callable) -> Callable:
    @functools.wraps(load)
    def load_adapter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with unchanged_on_failure(self):
            _refuse_pickle(args[0] if args else kwargs.get("model_id"), kwargs.get("subfolder"))
            return load(self, *args, **kwargs)

    return load_adapter


def _refuse_pickle(folder: Any, subfolder: str | None) -> None:
    """Raises if a local adapter of ours has its weights in a pickle file alone."""
    if not isinstance(folder, (str, Path)):
        return
    path = Path(folder, subfolder or "")
    if (path / "adapter_model.safetensors").exists() or not (path / "adapter_model.bin").exists():
        return
    if isinstance(PeftConfig.from_pretrained(str(folder), subfolder=subfolder), _S2ABaseConfig):
        raise ValueError(
            f"{path} holds its weights in adapter_model.bin, a pickle file, which could run code; adapters of peft-s2a are "
            "safetensors only. If you trust the file, convert it: `safetensors.torch.save_file(torch.load("
            '"adapter_model.bin", weights_only=True), "adapter_model.safetensors")`.'
        )


def _guard_transformers_load_adapter(load: Callable) -> Callable:
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_adapter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        download = {**given.get("kwargs", {}), **(given.get("adapter_kwargs") or {})}
        download = {name: download[name] for name in compat.DOWNLOAD_ARGUMENTS if download.get(name) is not None}
        if given.get("local_files_only"):
            download["local_files_only"] = True
        name, config = given.get("peft_model_id"), given.get("peft_config")
        if config is None and name is not None:
            config = PeftConfig.from_pretrained(name, **download)
        if not isinstance(config, _S2ABaseConfig):
            return load(self, *args, **kwargs)
        _refuse_pickle(name, download.get("subfolder"))
        tensors = given.get("adapter_state_dict")
        if tensors is None and name is not None:
            tensors = load_peft_weights(name, device="cpu", **download)
            kwargs["use_safetensors"] = True  # the file that has just been looked at
        check_tensors(
            tensors or {}, find_task_heads(self) if config.modules_to_save is None else config.modules_to_save
        )
        with unchanged_on_failure(self):
            loaded = load(self, *args, **kwargs)
        _align(self)
        return loaded

    return load_adapter


def _align(model: nn.Module) -> None:
    """What transformers has put into a model as it lay in the file; see `aligned`."""
    for module in model.modules():
        parts: list[nn.Module] = []
        if isinstance(module, S2ALayer):
            parts = [getattr(module, name) for name in (*module.adapter_layer_names, *module.other_param_names)]
        elif isinstance(module, ModulesToSaveWrapper):
            parts = [module.modules_to_save]
        for tensor in (tensor for part in parts for tensor in (*part.parameters(), *part.buffers())):
            tensor.data = aligned(tensor.data)


def _following_the_active(change: Callable) -> Callable:
    """Around what changes which adapters of a transformers model are active: activations are quantised as these want."""

    @functools.wraps(change)
    def changed(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        before = _wanted_by_the_active(self)
        change(self, *args, **kwargs)
        if self._hf_peft_config_loaded:
            freeze_as_the_active_want(self, self.active_adapters())
        follow_quantization(self, before, _wanted_by_the_active(self))

    return changed


def _wanted_by_the_active(model: nn.Module) -> ActivationQuantizationConfig | None:
    if not model._hf_peft_config_loaded or not getattr(model, "peft_config", None):
        return None
    return wanted_quantization(model.peft_config, model.active_adapters())


def wanted_quantization(
    configs: Mapping[str, PeftConfig], adapters: Iterable[str]
) -> ActivationQuantizationConfig | None:
    """How the first of `adapters` that wants it wants activations to be quantised."""
    found = (getattr(configs.get(name), "activation_quantization", None) for name in adapters)
    return next(filter(None, found), None)


def follow_quantization(
    model: nn.Module, before: ActivationQuantizationConfig | None, wanted: ActivationQuantizationConfig | None
) -> None:
    """Quantises the activations of `model` as its adapters want now, if they wanted something else before."""
    if wanted == before:
        return
    if wanted is None:
        restore_activations(model)
    else:
        quantize_activations(model, wanted)


def _guard_enable_adapters(enable: Callable) -> Callable:
    @functools.wraps(enable)
    def enable_adapters(self: nn.Module) -> None:
        """As in transformers, which forgets the modules that are trained whole: it disables them alone."""
        enable(self)
        if any(isinstance(config, _S2ABaseConfig) for config in self.peft_config.values()):
            for module in self.modules():
                if isinstance(module, ModulesToSaveWrapper):
                    module.enable_adapters(enabled=True)

    return enable_adapters


def guard_loading() -> None:
    """Guards the ways in which PEFT and transformers load adapters, transformers activates, enables and deletes them, and
    torch replaces modules that they sit on. Harmless if done already."""
    compat.replace_methods(
        {
            (PeftModel, "from_pretrained"): _guard_peft_from_pretrained,
            (PeftModel, "load_adapter"): _guard_peft_load_adapter,
            (compat.PeftAdapterMixin, "load_adapter"): _guard_transformers_load_adapter,
            (compat.PeftAdapterMixin, "set_adapter"): _following_the_active,
            (compat.PeftAdapterMixin, "delete_adapter"): _following_the_active,
            (compat.PeftAdapterMixin, "enable_adapters"): _guard_enable_adapters,
            (nn.SyncBatchNorm, "convert_sync_batchnorm"): following_its_host,
        }
    )
