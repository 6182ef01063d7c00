"""What the package uses of torch, peft, accelerate and transformers that these do not promise to keep, in one place.

Checked against torch 2.13.0, peft 0.21.2, accelerate 1.15.0 and transformers 5.23.0.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _ExcludedModule as ExcludedModule
from torch import nn
from torch._C import DisableTorchFunction
from torch._C import _AutoDispatchBelowAutograd as BelowAutograd
from torch._C import _current_autograd_node as current_autograd_node
from torch._C import _current_graph_task_id as current_graph_task_id
from torch._C import _dispatch_has_kernel_for_dispatch_key as has_kernel
from torch._C import _ExcludeDispatchKeyGuard as WithoutKeys
from torch._C import _len_torch_dispatch_stack as count_dispatch_modes
from torch._C import _nn as nn_bindings
from torch._ops import OpOverload
from torch._subclasses.fake_impls import fast_detach
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    is_fake,
)
from torch.autograd import _get_sequence_nr as sequence_number
from torch.autograd import forward_ad
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode as current_function_mode
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.overrides import _is_torch_function_mode_enabled as is_function_mode_enabled
from torch.overrides import _len_torch_function_stack as count_function_modes
from torch.overrides import _pop_mode as pop_function_mode
from torch.overrides import _push_mode as push_function_mode
from torch.utils import checkpoint
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    autograd_would_have_decomposed,
    is_traceable_wrapper_subclass,
)
from torch.utils._python_dispatch import _disable_current_modes as no_dispatch_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils import PushToHubMixin, output_capturing


__all__ = [
    "AUTOCAST_KEYS",
    "DOWNLOAD_ARGUMENTS",
    "VIEW_KEYS",
    "BelowAutograd",
    "BufferDict",
    "DataDependentOutputException",
    "DisableTorchFunction",
    "DynamicOutputShapeException",
    "ExcludedModule",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "PeftAdapterMixin",
    "PushToHubMixin",
    "TorchDispatchMode",
    "TreeSpec",
    "WithoutKeys",
    "add_forward_hook",
    "add_forward_pre_hook",
    "bind_forward_anew",
    "bits_of_bitsandbytes",
    "caches_results",
    "captured_by",
    "collected_outputs",
    "count_dispatch_modes",
    "count_function_modes",
    "current_autograd_node",
    "current_function_mode",
    "current_graph_task_id",
    "decomposed",
    "dispatch_modes",
    "fresh_node_metadata",
    "function_modes",
    "guard_or_false",
    "has_global_module_hooks",
    "has_kernel",
    "hooked_forward",
    "is_fake",
    "is_function_mode_enabled",
    "is_quantized_weight",
    "is_weight_only",
    "nn_bindings",
    "no_dispatch_modes",
    "outer_saved_tensors_hooks",
    "parse_regular_expression",
    "placing_hook",
    "plain_tensors",
    "pop_function_mode",
    "push_function_mode",
    "remove_forward_hooks",
    "replace_methods",
    "replace_recomputed",
    "replaced_forward",
    "resident",
    "sequence_number",
    "snapshot",
    "transform_in_force",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "undo_packing",
    "without_autocast_cache",
    "without_function_modes",
]

try:
    from re import _parser as regular_expressions
except ImportError:  # Python 3.10
    import sre_parse as regular_expressions


def parse_regular_expression(pattern: str) -> Any:
    """The expression as nested (operator, argument) pairs: the form that Python's `re` compiles.

    Raises:
        re.error: if it is malformed.
    """
    re.compile(pattern)
    return regular_expressions.parse(pattern)


def has_global_module_hooks() -> bool:
    """Whether a hook on the calls of all modules has been registered, `torch.nn.modules.module.register_module_*`."""
    return torch_module._has_any_global_hook()


def replaced_forward(module: nn.Module, name: str = "forward") -> Callable[..., Any] | None:
    """The forward method that was set on `module` itself, as accelerate's hooks do; None where calls run its class's.
    `name`: of the attribute."""
    forward = module.__dict__.get(name)
    is_own = getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module
    return None if is_own else forward


def bind_forward_anew(module: nn.Module, before: type[nn.Module]) -> None:
    """Have `module` run its class's forward method where that of `before`, which was its class, has been bound to it: by
    accelerate's hooks, which call `_old_forward` and make it `forward` when they are removed."""
    for name in ("forward", "_old_forward"):
        bound = module.__dict__.get(name)
        if getattr(bound, "__func__", None) is before.forward and bound.__self__ is module:
            module.__dict__[name] = types.MethodType(type(module).forward, module)


def hooked_forward(module: nn.Module) -> str:
    """The name of the attribute for the forward method that accelerate's hook on `module` calls, or, without one, calls
    run."""
    return "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"


def placing_hook(module: nn.Module) -> AlignDevicesHook | None:
    """accelerate's hook on `module`, if all it does is to bring arguments and results to devices (`device_map` over
    several GPUs)."""
    hook = module.__dict__.get("_hf_hook")
    if type(hook) is not AlignDevicesHook or hook.offload or hook.no_grad:
        return None
    return hook if getattr(module.__dict__.get("_old_forward"), "__func__", None) is type(module).forward else None


def add_forward_hook(module: nn.Module, hook: Callable[..., Any], always: bool = False) -> None:
    """`module.register_forward_hook` with keywords, under a key that is the same for like modules. torch numbers hooks and
    torch.compile guards on the numbers: it would compile every block of a model anew where blocks are compiled alone."""
    handle = module.register_forward_hook(hook, with_kwargs=True, always_call=always)
    options = module._forward_hooks_with_kwargs, module._forward_hooks_always_called
    _rename_hook(handle.id, hook, module._forward_hooks, *options)


def add_forward_pre_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """`module.register_forward_pre_hook` with keywords, as `add_forward_hook`."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    _rename_hook(handle.id, hook, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)


def _rename_hook(number: int, hook: Callable[..., Any], hooks: dict[Any, Any], *options: dict[Any, Any]) -> None:
    name = key = hook.__qualname__
    while key in hooks:
        key = f"{key}, {name}"
    for held in (hooks, *options):
        if number in held:
            held[key] = held.pop(number)


def remove_forward_hooks(module: nn.Module, owner: Any) -> None:
    """Removes the forward hooks and forward pre-hooks of `module` that are bound methods of `owner`. A handle would do
    so too, but it does not follow when a model is copied."""
    for hooks, options in (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    ):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
            del hooks[key]
            for option in options:
                option.pop(key, None)


def resident(module: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter or buffer of ``module`` with its values, to be read outside of the calls of ``module``: accelerate's
    `cpu_offload` and `dispatch_model` leave tensors without values there, and hooks that fetch them for a call.

    Raises:
        RuntimeError: if a trained parameter was offloaded and the module is in training mode: what is fetched is a copy,
            and its gradient would be lost.
    """
    tensor = getattr(module, name)
    return _fetched(module, name, tensor) if tensor is not None and tensor.is_meta else tensor


def _fetched(module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "weights_map", None) is not None:
            if tensor.requires_grad and module.training and torch.is_grad_enabled():
                raise RuntimeError(
                    f"accelerate has offloaded {name!r}, which is trained, and only lends out copies, whose gradients would "
                    "be lost. Offloaded models are for inference: call `model.eval()`, or keep the adapter on the device."
                )
            return one.weights_map[name].to(one.execution_device)
    return tensor  # of a model on the meta device


DOWNLOAD_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")
"""What transformers' and PEFT's `load_adapter` hand on to the Hub's client."""
_GUARDED = "_guarded_by_s2a"


def replace_methods(replacements: Mapping[tuple[type, str], Callable[[Callable], Callable]]) -> None:
    """Puts a function around methods of other libraries, once: {(class, name): what takes the stock function and returns
    the new one}. Used where they offer no hook, and adapters of ours need one."""
    for (cls, name), replace in replacements.items():
        stock = inspect.getattr_static(cls, name)
        is_classmethod = isinstance(stock, classmethod)
        function = stock.__func__ if is_classmethod else stock
        if getattr(function, _GUARDED, False):
            continue
        new = replace(function)
        setattr(new, _GUARDED, True)
        setattr(cls, name, classmethod(new) if is_classmethod else new)


def transform_in_force() -> str | None:
    """What differentiates or maps the code that runs now in another way than autograd; None if nothing does."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else None


def replace_recomputed(replace: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Have every non-reentrant checkpoint that is made from now on recompute ``replace(function)`` in place of its
    ``function``. It is called before ``function`` is for the first time."""
    original = checkpoint._checkpoint_without_reentrant_generator

    @functools.wraps(original)
    def generator(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return original(replace(fn), *args, **kwargs)

    checkpoint._checkpoint_without_reentrant_generator = generator


@contextmanager
def fresh_node_metadata() -> Iterator[None]:
    """What is noted meanwhile for the nodes of graphs is forgotten. Selective checkpoints write there, on tensors without
    values, and never take it back: torch.compile would later take every node for part of one."""
    outer, fx_traceback.current_meta = fx_traceback.current_meta, dict(fx_traceback.current_meta)
    try:
        yield
    finally:
        fx_traceback.current_meta = outer


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Meanwhile autocast casts a parameter every time that it is used, and hands out no result of before."""
    outer = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(outer)


@contextmanager
def without_function_modes() -> Iterator[None]:
    """Meanwhile no function mode is in force but those entered inside. One in force would be called whenever torch, in its
    own Python code, reads an attribute of a tensor."""
    outer = [pop_function_mode() for _ in range(count_function_modes())]
    try:
        yield
    finally:
        for mode in reversed(outer):
            push_function_mode(mode)


def snapshot(x: torch.Tensor) -> torch.Tensor:
    """A tensor's metadata as they are now, on its memory. For fake tensors, a short cut to ``x.detach()``."""
    return fast_detach(x.fake_mode, x) if isinstance(x, FakeTensor) else x.detach()


def decomposed(func: OpOverload, tensors: list, mode: TorchDispatchMode, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``func(*args, **kwargs)`` under ``mode``, by the operators that autograd makes of ``func`` and that it has not been
    asked for here, as in inference mode; NotImplemented for all others. ``tensors`` are those among the arguments."""
    if not _is_composite(func) or not autograd_would_have_decomposed(func, tensors):
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)


@functools.cache
def _is_composite(func: OpOverload) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return key in func.py_kernels or func.has_kernel_for_dispatch_key(key)


# What autograd, autocast and the like make of a call is in its recording already, and need not be done again.
AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
VIEW_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def caches_results(mode: TorchDispatchMode) -> bool:
    """Whether a dispatch mode is that of a selective checkpoint, which caches results of operators and hands them out again."""
    return isinstance(mode, (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode))


def outer_saved_tensors_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The innermost `torch.autograd.graph.saved_tensors_hooks` in force."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def collected_outputs() -> Collection[str]:
    """Which outputs of its modules a model of transformers collects in the call that runs, such as "attentions"."""
    return output_capturing._active_collector.get() or ()


def captured_by(hook: Any) -> str | None:
    """Which outputs a hook of transformers' collects while they are asked for; None for other hooks. A model has them from
    the first time on that it is asked for any."""
    if getattr(hook, "__module__", None) != output_capturing.__name__:
        return None
    names = hook.__code__.co_freevars
    return hook.__closure__[names.index("key")].cell_contents if "key" in names else None


_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def name_in_state(name: str) -> str:
    """What a module's name of `named_modules` is in a state dict: FullyShardedDataParallel and torch's
    `checkpoint_wrapper` leave themselves out there."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


# torchao's weights that products read dequantised, whose `dequantize` gives those very numbers.
_WEIGHTS_ONLY = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
_OF_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "act_pre_scale")


def is_weight_only(weight: torch.Tensor) -> bool:
    """Whether torchao holds a weight in few bits and leaves the activations that it is multiplied with as they are."""
    kind = type(weight)
    return (
        kind.__name__ in _WEIGHTS_ONLY
        and kind.__module__.startswith("torchao.")
        and all(getattr(weight, name, None) is None for name in _OF_ACTIVATIONS)
    )


def is_quantized_weight(weight: torch.Tensor | None) -> bool:
    """Whether torchao or bitsandbytes hold a weight in codes, whatever its dtype says; not told under torch.compile."""
    kind = type(weight)
    if kind is nn.Parameter or torch.compiler.is_compiling():
        return False
    return kind.__module__.startswith("torchao.") or kind.__name__ in ("Int8Params", "Params4bit")


def bits_of_bitsandbytes(kind: type[nn.Module]) -> int | None:
    """In how many bits a class of bitsandbytes' linear layers holds a frozen weight: 8 or 4; None for other classes."""
    for base in kind.__mro__:
        if base.__module__.startswith("bitsandbytes.") and base.__name__ in ("Linear8bitLt", "Linear4bit"):
            return 8 if base.__name__ == "Linear8bitLt" else 4
    return None


def undo_packing(layer: nn.Module) -> None:
    """Lays the weight of bitsandbytes' `Linear4bit` out as it was before a call in eval mode on a CPU with bf16
    instructions, after which it could no longer be trained through."""
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        layer.weight.data, state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, layer.weight.quant_state)
        if state.absmax.dim() == 2:  # left by it as the packing made it of one for each group, row after row
            state.absmax = state.absmax.T.reshape(-1).float()
        layer.weight.quant_state = state


def plain_tensors(x: torch.Tensor) -> list[torch.Tensor]:
    """``x``, or the tensors that it is made of, if it is one of those that hold others."""
    if not is_traceable_wrapper_subclass(x):
        return [x]
    names, _ = x.__tensor_flatten__()
    return [plain for name in names for plain in plain_tensors(getattr(x, name))]
