"""How a forward pass uses a model: which modules it calls, in which order, on what shapes, and which weights its result
depends on. Nothing is computed: the pass runs on fake tensors, which have shapes but no data."""

from __future__ import annotations

import copy
import functools
import logging
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peft_s2a.compat import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    tree_leaves,
    tree_map_only,
)

from .inputs import example_inputs


logger = logging.getLogger(__name__)

# What models put out beside the result of their task; not what a loss is computed from.
FEATURES = ("hidden_state", "attentions", "pooler_output", "model_output", "past_key_values", "intermediate", "init_")

_known: dict[Hashable, Usage | None] = {}
"""Models that have been observed, the last few of them."""


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        input: shape of the first tensor among its arguments, None if there is none.
        output: shape of the tensor that it returns, alone or as the first of a tuple or list; None if there is none.
        reads: whether its input depends on the model's input or weights. Queries that start as zeros do not.
    """

    input: torch.Size | None
    output: torch.Size | None
    reads: bool


@dataclass
class Usage:
    """What a forward pass did.

    Attributes:
        calls: name -> its calls, in the order of first use; wrapped modules under their wrapper's name.
        reached: names of the modules that hold a parameter on which the result depends, themselves or inside; None if
            the pass could not be followed to its end.
        dead: then, names of modules that are known to be called for nothing.
        is_complete: whether the model was given all that it can take. If not, a part that was never called may still
            be used otherwise.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    reached: set[str] | None = None
    dead: set[str] = field(default_factory=set)
    is_complete: bool = True

    def knows(self, name: str) -> bool:
        """Whether it can be told if the module is used: all of the model was, or the module that holds it has run."""
        if self.is_complete:
            return True
        parent = name.rpartition(".")[0]
        while parent:
            if parent in self.calls:
                return True
            parent = parent.rpartition(".")[0]
        return name in self.calls


def observe(model: nn.Module) -> Usage | None:
    """How a forward pass uses `model`, in eval mode; None where no input can be made for it. Where operators depend on
    the values of tensors the pass is known up to there. The model is not changed."""
    key = _signature(model)
    if key is not None and key in _known:
        return _known[key]
    complaints = logging.getLogger("torch._subclasses.fake_tensor")  # of inputs that do not fit
    was_disabled, complaints.disabled = complaints.disabled, True
    try:
        # whatever the default is: inputs, and what a model makes on its way, go with the fakes
        with torch.device("cpu"):
            for inputs, is_complete in example_inputs(model):
                usage = Usage(is_complete=is_complete)
                try:
                    _observe(model, inputs, usage)
                except (DataDependentOutputException, DynamicOutputShapeException) as error:
                    logger.debug("%s can be followed only in part: %s", type(model).__name__, error)
                    usage.is_complete = False
                    _observe_image_tower(model, inputs, usage)
                except Exception as error:  # whatever a model raises on an input that it does not take
                    logger.debug("%s cannot be followed: %s", type(model).__name__, error)
                    continue
                return _remember(key, usage)
    finally:
        complaints.disabled = was_disabled
    return _remember(key, None)


def _signature(model: nn.Module) -> Hashable | None:
    """What decides how a model of transformers runs: its configuration, modules and shapes. None for other models,
    whose attributes may decide."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string") or not hasattr(config, "model_type"):
        return None
    modules = tuple((name, type(module)) for name, module in model.named_modules())
    shapes = tuple((name, parameter.shape, parameter.dtype) for name, parameter in model.named_parameters())
    return config.to_json_string(use_diff=False), modules, shapes


def _remember(key: Hashable | None, usage: Usage | None) -> Usage | None:
    if key is not None:
        if len(_known) >= 32:
            del _known[next(iter(_known))]
        _known[key] = usage
    return usage


def _observe_image_tower(model: nn.Module, inputs: dict[str, Any], usage: Usage) -> None:
    """What of a vision-language model makes the features of images, where the whole depends on the tokens' values."""
    images = {name: value for name, value in inputs.items() if name == "pixel_values"}
    if not images or not hasattr(model, "get_image_features"):
        return
    tower = Usage()
    try:
        _observe(model, images, tower, model.get_image_features)
    except Exception as error:
        logger.debug("the image tower of %s cannot be followed: %s", type(model).__name__, error)
        return
    usage.calls = tower.calls | usage.calls
    usage.dead = tower.calls.keys() - (tower.reached or set())


def _observe(model: nn.Module, inputs: dict[str, Any], usage: Usage, run: Callable[..., Any] | None = None) -> None:
    """Fills in `usage` by `run`, the model's forward pass by default."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def fake_input(tensor: torch.Tensor) -> torch.Tensor:
        made = mode.from_tensor(tensor.to(dtype) if tensor.is_floating_point() else tensor)
        return made.requires_grad_() if made.is_floating_point() else made

    with stand_in(model, fake, trainable=True), torch.random.fork_rng([]), mode, torch.enable_grad():
        for module in model.modules():
            vars(module)["training"] = False
            for name in ("gradient_checkpointing", "grad_checkpointing"):  # would hide the weights inside
                if vars(module).get(name):
                    vars(module)[name] = False
        for name, module in model.named_modules():
            module.register_forward_hook(_recorder(usage, name), with_kwargs=True)
        parameters = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
        args = tuple(tree_map_only(torch.Tensor, fake_input, inputs.get("*", ())))
        kwargs = tree_map_only(torch.Tensor, fake_input, {k: v for k, v in inputs.items() if k != "*"})
        output = (run or model)(*args, **kwargs)
        if run is not None and getattr(output, "pooler_output", None) is not None:  # what the language model reads
            output = output.pooler_output
        usage.reached = set()
        for name in _leaves_below(results(output), parameters):
            while name:
                name = name.rpartition(".")[0]
                usage.reached.add(name.removesuffix(".base_layer"))


def _recorder(usage: Usage, name: str) -> Callable:
    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        returned = output[0] if isinstance(output, (tuple, list)) and output else output
        usage.calls.setdefault(name, []).append(
            Call(
                None if first is None else first.shape,
                returned.shape if isinstance(returned, torch.Tensor) else None,
                first is not None and first.requires_grad,
            )
        )

    return record


def results(output: Any) -> list[torch.Tensor]:
    """The tensors that a task's loss is computed from: all that a model returns, but for features where it returns
    more than those."""
    if hasattr(output, "items"):
        items = {key: value for key, value in output.items() if value is not None}
        wanted = [value for key, value in items.items() if not any(feature in key for feature in FEATURES)]
        found = [tensor for value in wanted for tensor in results(value)]
        return found or [tensor for value in items.values() for tensor in results(value)]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in results(value)]
    if isinstance(getattr(output, "sample", None), torch.Tensor):  # diffusers' autoencoders
        return [output.sample]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _leaves_below(tensors: list[torch.Tensor], parameters: dict[int, str]) -> set[str]:
    """The names of the parameters that `tensors` depend on."""
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen, names = set(pending), set()
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in parameters:
            names.add(parameters[id(variable)])
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return names


@contextmanager
def stand_in(
    model: nn.Module, fake: Callable[[torch.Tensor], torch.Tensor], *, trainable: bool = False
) -> Iterator[None]:
    """Puts fake tensors in the place of parameters and buffers. Afterwards every module has its own attributes again,
    so nothing that it remembered inside (cached tables, say) is left in it, nor in the caches of its code.

    Args:
        model: any module.
        fake: makes the fake tensor of a real one.
        trainable: let all parameters require gradients, whether the real ones do or not.
    """
    fakes: dict[int, torch.Tensor] = {}  # by identity, so that tied parameters stay tied
    modules = list(model.modules())
    originals = [dict(vars(module)) for module in modules]
    try:
        for module, attributes in zip(modules, originals):
            for name, value in attributes.items():
                if isinstance(value, functools._lru_cache_wrapper):
                    delattr(module, name)
                elif isinstance(value, (dict, list, set)):
                    vars(module)[name] = copy.copy(value)
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in fakes:
                        replacement = fake(tensor)
                        if isinstance(tensor, nn.Parameter):
                            needs_grad = tensor.requires_grad or (trainable and tensor.is_floating_point())
                            replacement = nn.Parameter(replacement, requires_grad=needs_grad)
                        fakes[id(tensor)] = replacement
                    tensors[name] = fakes[id(tensor)]
        with clean_caches(modules):
            yield
    finally:
        for module, attributes in zip(modules, originals):
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def clean_caches(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Nothing that is computed inside, of tensors without values, stays in the caches of the modules' code."""
    caches = {cache: cache.cache_info().misses for cache in _caches(modules)}
    try:
        yield
    finally:
        for cache, misses in caches.items():
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _caches(modules: Iterable[nn.Module]) -> Iterator[functools._lru_cache_wrapper]:
    """The caches of methods, and of functions beside them, that are shared by all models: `functools.lru_cache`, plain
    or inside another decorator."""
    classes = {base for module in modules for base in type(module).__mro__ if issubclass(base, nn.Module)}
    files = {sys.modules[cls.__module__] for cls in classes if cls.__module__ in sys.modules}
    for holder in (*classes, *files):
        name = holder.__name__ if holder in files else holder.__module__
        for function in list(vars(holder).values()):
            function = getattr(function, "__func__", function)  # of static methods
            if getattr(function, "__module__", None) != name:
                continue
            for cell in getattr(function, "__closure__", None) or ():
                with suppress(ValueError):  # an empty cell
                    if isinstance(cell.cell_contents, functools._lru_cache_wrapper):
                        yield cell.cell_contents
            if isinstance(function, functools._lru_cache_wrapper):
                yield function
