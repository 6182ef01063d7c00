"""What the S2A layers share: book-keeping on top of PEFT's `BaseTunerLayer`, and layers that sit *on* a module.

Two ways of reaching a module of the base model:

* A leaf (linear, convolution, normalisation) is wrapped, `parent.fc1 = BiasLayer(base_layer=fc1)`, as everywhere in
  PEFT.
* A module with children of its own (an attention layer, an MLP, a stage) keeps its place and class: PEFT skips
  whatever lies inside a wrapper when a second adapter is injected or everything is unloaded, so wrapping it would hide
  its leaves. An `AttachedLayer` is registered as its child and acts through forward hooks.

Parameters are named `s2a_*` and held in dictionaries keyed by adapter, directly below the layer. PEFT and transformers
both rely on this when they insert the adapter's name into the keys of a checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from peft_s2a.compat import add_forward_hook, add_forward_pre_hook, remove_forward_hooks


_ALIGNMENT = 64  # bytes, at which torch allocates


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy of it where torch itself would have put one: safetensors leaves tensors where they lie in a file,
    and matrix products of such weights round otherwise than those of the model that was saved."""
    is_apart = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu"
    return tensor.clone() if is_apart and tensor.data_ptr() % _ALIGNMENT else tensor


class S2ALayer(nn.Module, BaseTunerLayer):
    """Base class of the S2A layers.

    A subclass lists its parameter dictionaries in `adapter_layer_names` (trained) and `other_param_names` (frozen),
    and says in `not_mergeable` why an adapter cannot be merged, or implements `merged_into` and `_merge_adapter`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    def adapters_in_use(self) -> list[str]:
        """The active adapters that have weights here; none while adapters are disabled or merged."""
        if self._disable_adapters or self.merged_adapters:
            return []
        found = []  # with loops: every generator is a frame more for torch.compile to trace
        for adapter in self.active_adapters:
            for name in (*self.adapter_layer_names, *self.other_param_names):
                if adapter in self._modules[name]:
                    found.append(adapter)
                    break
        return found

    def reference_tensor(self) -> torch.Tensor:
        """A floating-point tensor of the base module; new weights take its device and dtype."""
        base_layer = self.get_base_layer()
        tensors = [*base_layer.parameters(), *base_layer.buffers()]
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        return floating[0] if floating else torch.empty(0, device=tensors[0].device if tensors else None)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        # PEFT moves loaded weights there; its own version knows only modules that hold a weight themselves.
        like = self.reference_tensor()
        return like.device, like.dtype

    def not_mergeable(self, adapter_name: str) -> str | None:
        """Why `adapter_name` cannot be merged into the base module, with what to do instead; None if it can."""
        return None

    def merged_into(self, adapter_name: str) -> list[nn.Parameter]:
        """The base parameters that merging changes."""
        raise NotImplementedError

    def _merge_adapter(self, adapter_name: str, sign: int) -> dict[nn.Parameter, torch.Tensor]:
        """The tensors of the base module that merging changes, with their new values. `sign` is -1 for unmerging."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the parameters of the base module.

        Args:
            safe_merge: check the new values for NaN and infinity first.
            adapter_names: which adapters; the active ones by default.

        Raises:
            ValueError: if an adapter has no form that the base module could hold, or is broken (`safe_merge`).
        """
        available = self._get_available_adapters()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in available:
                continue
            if reason := self.not_mergeable(name):
                raise ValueError(reason)
            new_values = self._merge_adapter(name, sign=1)
            if safe_merge and not all(torch.isfinite(value).all() for value in new_values.values()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            for parameter, value in new_values.items():
                parameter.data = value.to(parameter.dtype)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Takes merged adapters out of the base parameters again, up to rounding of their dtype."""
        while self.merged_adapters:
            for parameter, value in self._merge_adapter(self.merged_adapters.pop(), sign=-1).items():
                parameter.data = value.to(parameter.dtype)

    def enable_adapters(self, enabled: bool) -> None:
        """Toggles the adapters; merged ones are taken out of the base parameters first, as PEFT's layers do."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)


class _Calls(threading.local):
    """The forward passes that attached layers take part in, in this thread.

    What one hook leaves for another belongs to the call, not to the layer: models are shared by threads, called again
    from within hooks, and interrupted.
    """

    def __init__(self) -> None:
        self.running: WeakKeyDictionary[AttachedLayer, list[dict[str, torch.Tensor]]] = WeakKeyDictionary()
        """The calls that have begun and not ended yet, the innermost last."""
        self.loose: WeakKeyDictionary[AttachedLayer, dict[str, torch.Tensor]] = WeakKeyDictionary()
        """What is left outside of any call, where a user runs the parts of a model one by one."""


_CALLS = _Calls()
_DEEPEST = 8
"""Calls of one layer within another that are remembered: an interrupt from the keyboard leaves some behind."""


class AttachedLayer(S2ALayer):
    """A layer that is a child of the module it adapts and acts through hooks on it or on other modules.

    A subclass says in `_hook` which hooks it needs; they must be bound methods of the layer, so that they follow it
    when a model is copied. What one hook leaves for another goes into `in_flight`, under `_during` a module that
    contains both.
    """

    attribute: str
    """Name under which the layer is registered on its host."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        # In lists, or the host would become a child of its own child.
        self._host = [host]
        self._hooked: list[nn.Module] = []
        self._traced_call: dict[str, torch.Tensor] | None = None
        """`in_flight` of a call that torch.compile traces as a whole: a graph has no use for threads' own state, and
        would be compiled again for every change of it."""

    @classmethod
    def on(cls, host: nn.Module) -> AttachedLayer | None:
        """The layer of this class that sits on `host`, if there is one."""
        layer = getattr(host, cls.attribute, None)
        return layer if isinstance(layer, cls) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Passes its input on: an `nn.Sequential` calls all its children, this one too if it is the host."""
        return x

    def get_base_layer(self) -> nn.Module:
        return self._host[0]

    def attach(self) -> AttachedLayer:
        """Registers the layer on its host, and its hooks."""
        self._host[0].add_module(self.attribute, self)
        if self.adapter_layer_names:
            self._before(self._host[0], self._refuse_replicas)
        self._hook()
        return self

    def _refuse_replicas(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "S2A does not run under torch.nn.DataParallel, whose replicas share the hooks, and so the weights, "
                "of the original. Start one process per device (`accelerate launch` or `torchrun`), or let one "
                "device be visible."
            )

    def detach_from_host(self) -> None:
        """Takes the layer off its host, and its hooks off all modules."""
        self._unhook()
        delattr(self._host[0], self.attribute)

    def _hook(self) -> None:
        """Registers the layer's own hooks through `_before` and `_after`."""

    def _before(self, module: nn.Module, hook: Callable) -> None:
        add_forward_pre_hook(module, hook)
        self._hooked.append(module)

    def _after(self, module: nn.Module, hook: Callable, always: bool = False) -> None:
        add_forward_hook(module, hook, always)
        self._hooked.append(module)

    def _during(self, module: nn.Module) -> None:
        """Lets `in_flight` begin and end with each call of `module`."""
        self._before(module, self._begin)
        self._after(module, self._end, always=True)

    def _begin(self, *call: Any) -> None:
        if torch.compiler.is_compiling():
            self._traced_call = {}
            return
        calls = _CALLS.running.setdefault(self, [])
        calls.append({})
        del calls[:-_DEEPEST]

    def _end(self, *call: Any) -> None:
        if torch.compiler.is_compiling():
            self._traced_call = None
            return
        calls = _CALLS.running.get(self)
        if calls:
            calls.pop()

    @property
    def in_flight(self) -> dict[str, torch.Tensor]:
        """What one hook leaves for another, in the call that is running in this thread."""
        if torch.compiler.is_compiling() and self._traced_call is not None:
            return self._traced_call
        calls = _CALLS.running.get(self)
        return calls[-1] if calls else _CALLS.loose.setdefault(self, {})

    def forget_loose(self) -> None:
        """Ends a call that nobody else ends: one outside of the module that `_during` names."""
        _CALLS.loose.pop(self, None)

    def _unhook(self) -> None:
        for module in self._hooked:
            remove_forward_hooks(module, owner=self)
        self._hooked.clear()


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The first tensor among a module's arguments: its input.

    Raises:
        ValueError: if there is none, as in heads that read a list of feature maps.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    raise ValueError(
        "An S2A layer sits on a module whose arguments include no tensor (a head that reads several feature maps, "
        "say). Leave that module out with `exclude_modules`, or use `side_mode='residual'` instead of a ladder."
    )


def with_first_tensor(args: tuple, kwargs: dict[str, Any], tensor: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments with their first tensor (see `first_tensor`) replaced."""
    for index, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            return (*args[:index], tensor, *args[index + 1 :]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
    return args, {**kwargs, name: tensor}


def as_tensor(output: Any) -> torch.Tensor:
    """The tensor that a module returned, alone or as the first of a tuple or list.

    Raises:
        ValueError: if it returned something else, as whole models do.
    """
    tensor = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(
            f"An S2A layer sits on a module that returns a {type(output).__name__} and no tensor or tuple that "
            "starts with one. Leave that module out with `exclude_modules`."
        )
    return tensor


def with_tensor(output: Any, tensor: torch.Tensor) -> Any:
    """`output` with its tensor (see `as_tensor`) replaced."""
    if isinstance(output, torch.Tensor):
        return tensor
    return [tensor, *output[1:]] if isinstance(output, list) else (tensor, *output[1:])
