"""Noticing that a module is no longer what a plan was made for.

A recorded call knows tensors and nothing else. What Python decided while it was recorded (flags, hooks, which modules,
which parameters are trained) is written down here and compared before every use of the plan; what cannot be watched is
refused, and so is code that leaves anything behind. A `Watch` costs some tens of microseconds a call.
"""

import collections
import datetime
import dis
import enum
import functools
import gc
import inspect
import itertools
import logging
import operator
import pathlib
import random
import re
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ... import compat
from .trace import PLAIN, Untraceable


_Hook = TypeVar("_Hook", bound=Callable[..., Any])
_CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.MethodDescriptorType)
_DESCRIPTORS = (property, staticmethod, classmethod, types.MemberDescriptorType, types.GetSetDescriptorType)
# Objects of libraries' that cannot change although they have no attributes
_SETTLED = (
    range, slice, type(...), type(NotImplemented), re.Pattern, pathlib.PurePath, inspect.Signature,
    torch.layout, torch.finfo, torch.iinfo, types.GenericAlias, types.UnionType,
)  # fmt: skip
_OUTWARD = {  # what somebody's code calls for an effect, or an answer, that a plan would not have
    print, open, input, exec, eval, globals, locals, __import__, datetime.datetime.now, datetime.datetime.utcnow,
    *(function for name, function in vars(time).items() if isinstance(function, types.BuiltinFunctionType)),
}  # fmt: skip
_GENERATORS = {  # names of what makes random generators, or sets torch's
    "default_rng", "RandomState", "Random", "SystemRandom", "urandom", "secrets", "uuid1", "uuid4", "Generator",
    "manual_seed", "manual_seed_all", "set_rng_state", "set_state", "fork_rng",
}  # fmt: skip
_LOGS = logging.Logger.handle.__code__
_CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque, types.MappingProxyType)
# Libraries whose code keeps nothing outside of the modules it runs in.
_TRUSTED = (
    "torch", "transformers", "peft", "timm", "diffusers", "torchvision", "accelerate", "numpy", "peft_s2a", "sympy", "mpmath",
    "typing_extensions", "einops", "torchao",
)  # fmt: skip
_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = {
    *_HOOKS, "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_activation_settings",
    "_compiled_call_impl",
}  # fmt: skip
_GLOBAL_HOOKS = tuple(
    getattr(torch_module, name)
    for name in (
        "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
    )
)  # fmt: skip


def is_observed_globally() -> bool:
    """Whether hooks that somebody put on all modules would see what happens inside."""
    return any(_GLOBAL_HOOKS)


def spectator(hook: _Hook) -> _Hook:
    """Mark a hook of this package that plans of modules without it may be used in spite of: it computes nothing."""
    vars(hook)["is_spectator"] = True
    return hook


def _is_spectator(hook: Callable[..., Any]) -> bool:
    """Whether plans are the same with a hook and without."""
    return getattr(hook, "is_spectator", False) or compat.captured_by(hook) is not None


def is_plain_tensor(x: Tensor) -> bool:
    """Whether a tensor is of no kind that may have functions of its own."""
    return type(x) in _TENSORS or compat.is_fake(x)


def attributes_of(x: Tensor) -> dict[str, Any]:
    """The attributes that somebody gave a tensor."""
    if not x.__dict__ or compat.is_fake(x):
        return {}
    return {name: thing for name, thing in x.__dict__.items() if not name.startswith("_")}


def _is_trusted(module_name: str | None) -> bool:
    root = (module_name or "").partition(".")[0]
    return root in _TRUSTED or root in sys.stdlib_module_names or root.startswith("namedtuple_")


class Watch:
    """The Python state of a module and of everything in it, as it was when this was made.

    Attributes:
        tensors: the parameters and buffers, each once.
        code: classes, modules and functions that are held.
        kinds: the classes of the modules, and what these inherit from.
        reaches_outside: whether an attribute that is no library's refers to a module outside.
        captured: which outputs of its inner modules transformers' hooks collect while they are asked for.

    Raises:
        Untraceable: (when made) if a hook of somebody else looks inside, or something is held that cannot be watched.
    """

    def __init__(self, root: nn.Module, is_harmless: Callable[[Any], bool]) -> None:
        self.modules = list(root.modules())
        self._is_harmless = is_harmless
        self._holders: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._containers: list[tuple[Any, Any]] = []
        self._attributes: list[tuple[dict[str, Any], str, Any]] = []
        self._seen: set[int] = set()
        self._inside = set(map(id, self.modules))
        self._holder_is_users = False
        self.reaches_outside = False
        self.captured: set[str] = set()
        sized: list[Any] = []
        children: list[Any] = []
        slots: dict[int, tuple[dict[str, Any], str]] = {}
        self._aliases: list[tuple[dict[str, Any], str, dict[str, Any], str]] = []
        self._absent: list[tuple[dict[str, Any], str]] = []
        self.code: list[Any] = []
        self._states = [(module.__dict__, list(module.__dict__)) for module in self.modules]
        for module in self.modules:
            state = module.__dict__
            sized.append(state)
            for hooks in () if module is root else _HOOKS:
                self._check_hooks(module, state[hooks])
            sized += [state[hooks] for hooks in _HOOKS if module is not root]
            sized += [state["_modules"], state["_parameters"], state["_buffers"]]
            for name, child in state["_modules"].items():
                self._holders.append(state["_modules"])
                self._names.append(name)
                children.append(child)
            for kind in ("_parameters", "_buffers"):
                for name, tensor in state[kind].items():
                    if tensor is None:
                        self._absent.append((state[kind], name))
                    else:
                        self._watch_tensor(state[kind], name, slots)
            self._watch_attributes(module, state)
        self._children = children
        self._slots = list(slots.values())
        self.tensors = self._read()
        self._empty = [container for container in sized if not container]
        self._filled = [container for container in sized if container]
        self._lengths = list(map(len, self._filled))
        self._types = list(map(type, self.modules))
        self._training = [module.training for module in self.modules]
        self._hook_lists = [(state, tuple(state)) for state in self._filled if type(state).__name__ == "OrderedDict"]
        self.kinds = kinds = list(dict.fromkeys(base for own in self._types for base in own.__mro__))
        self._kinds = [kind for kind in kinds if "forward" in vars(kind)]
        self._forwards = list(map(_FORWARD, self._kinds))
        for kind in kinds:
            self._watch_class(kind)
        self._flat_attributes = [list(column) for column in zip(*self._attributes)] or [[], [], []]
        copies = [before for _, before in self._containers]
        mappings = [before for before in copies if isinstance(before, dict)]
        self._flat_containers = (
            [container for container, _ in self._containers],
            list(map(len, copies)),
            list(itertools.chain.from_iterable(copies)),
            [container for container, before in self._containers if isinstance(before, dict)],
            list(itertools.chain.from_iterable(map(_VALUES, mappings))),
        )
        columns = [list(column) for column in zip(*self._aliases)] or [[], [], [], []]
        self._firsts, self._others = columns[:2], columns[2:]
        self._gaps = [list(column) for column in zip(*self._absent)] or [[], []]
        self._likes = _likes(self.tensors)

    def covers(self, thing: Any) -> bool:
        """Whether changes of a module or class are noticed here."""
        return id(thing) in self._inside or any(thing is kind for kind in self.kinds)

    def _read(self) -> list[Tensor]:
        return [holder[name] for holder, name in self._slots]

    def _check_hooks(self, module: nn.Module, hooks: dict[int, Any]) -> None:
        for hook in hooks.values():
            captured = compat.captured_by(hook)
            if captured is not None:
                self.captured.add(captured)
            elif not self._is_harmless(hook):
                raise Untraceable(f"a hook looks into its {type(module).__name__}")

    def _watch_tensor(self, holder: dict[str, Any], name: str, slots: dict[int, tuple[dict[str, Any], str]]) -> None:
        """Give a tensor a slot, and those that a frozen weight of torchao's holds: it is these that recordings see."""
        tensor = holder[name]
        first = slots.setdefault(id(tensor), (holder, name))
        if first[0] is not holder or first[1] != name:
            self._aliases.append((*first, holder, name))
        if attributes_of(tensor):
            self._attributes.append((holder, name, tensor))
            self._watch(tensor.__dict__, f"{type(tensor).__name__} {name}", 1)
        if tensor.requires_grad or not compat.is_weight_only(tensor):
            return self._check_tensor(tensor)
        inside, settings = tensor.__tensor_flatten__()
        self._attributes.append((holder, name, tensor))
        self._containers.append((tensor.__dict__, _copy(tensor.__dict__)))
        for setting in settings.values():
            self._watch(setting, type(tensor).__name__, 1)
        for part in inside:
            self._watch_tensor(tensor.__dict__, part, slots)

    def _watch_class(self, kind: type) -> None:
        """Write down what a class of somebody's holds for its objects."""
        if _is_trusted(kind.__module__) or id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        self._containers.append((vars(kind), _copy(vars(kind))))
        for name, thing in vars(kind).items():
            if not (name.startswith(("__", "_abc_")) or isinstance(thing, (*_DESCRIPTORS, types.FunctionType))):
                self._watch(thing, f"{kind.__name__}.{name}", 1)

    def _check_tensor(self, tensor: Tensor) -> None:
        if not is_plain_tensor(tensor):
            raise Untraceable(f"it holds a {type(tensor).__name__}")

    def _watch_attributes(self, module: nn.Module, state: dict[str, Any]) -> None:
        self._holder_is_users = not _is_trusted(type(module).__module__)
        names = [name for name in state if name not in _OWN]
        if compat.replaced_forward(module) is not None:
            raise Untraceable(f"the forward method of its {type(module).__name__} was replaced")
        for name in names:
            self._attributes.append((state, name, state[name]))
            self._watch(state[name], f"{type(module).__name__}.{name}", 0)

    def _watch(self, thing: Any, where: str, depth: int) -> None:
        """Write down what ``thing``, which may change in place, holds."""
        if isinstance(thing, nn.Module):
            self.reaches_outside |= self._holder_is_users and id(thing) not in self._inside
            return
        if isinstance(thing, _CODE):
            self.code.append(thing)
        if type(thing) in PLAIN or isinstance(thing, (*_CODE, enum.Enum)) or id(thing) in self._seen:
            return
        self._seen.add(id(thing))
        if isinstance(thing, weakref.ReferenceType):
            return self._watch(thing(), where, depth) if self._holder_is_users else None
        if isinstance(thing, types.MethodType):
            return self._watch(thing.__self__, where, depth)
        if isinstance(thing, functools.partial):
            for part in (thing.func, thing.args, thing.keywords):
                self._watch(part, where, depth)
            return
        if isinstance(thing, Tensor):
            raise Untraceable(f"it holds a tensor that is no parameter or buffer, as {where}")
        if depth > 4:
            raise Untraceable(f"what it holds as {where} is nested too deeply to be watched")
        if isinstance(thing, _CONTAINERS):
            inside = [*thing.keys(), *thing.values()] if isinstance(thing, _MAPPINGS) else list(thing)
            if not isinstance(thing, (tuple, frozenset)):
                self._containers.append((thing, _copy(thing)))
            if hasattr(thing, "__dict__"):  # of a class derived from them
                self._containers.append((thing.__dict__, _copy(thing.__dict__)))
                inside += thing.__dict__.values()
        elif type(thing).__module__ == "_thread" or _is_trusted(type(thing).__module__):
            # configurations and the like of libraries: what they hold themselves
            if _hides_its_state(thing):
                raise Untraceable(f"it holds a {type(thing).__name__} as {where}, whose changes cannot be noticed")
            inside = list(getattr(thing, "__dict__", {}).values())
            if hasattr(thing, "__dict__"):
                self._containers.append((thing.__dict__, _copy(thing.__dict__)))
            if type(thing).__module__.partition(".")[0] not in sys.stdlib_module_names:
                inside = [x for x in inside if isinstance(x, (list, dict, set)) or type(x).__name__.endswith("Config")]
        elif hasattr(thing, "__dict__") and not hasattr(type(thing), "__slots__"):
            inside = list(vars(thing).values())
            self._containers.append((vars(thing), _copy(vars(thing))))
            for kind in type(thing).__mro__:
                self._watch_class(kind)
        else:
            raise Untraceable(f"it holds a {type(thing).__name__} as {where}, whose changes cannot be noticed")
        for item in inside:
            self._watch(item, where, depth + 1)

    def holds(self) -> bool:
        """Whether everything is as it was."""
        if any(self._empty) or list(map(len, self._filled)) != self._lengths:
            return False
        if list(map(type, self.modules)) != self._types:
            return False
        try:
            if not all(map(operator.is_, map(operator.getitem, self._holders, self._names), self._children)):
                return False
        except KeyError:
            return False
        if [module.training for module in self.modules] != self._training:
            return False
        if not self._is_untouched():
            for state, name, expected in self._attributes:
                thing = state.get(name, _GONE)
                if thing is not expected and not (type(thing) is type(expected) in PLAIN and thing == expected):
                    return False
            for container, before in self._containers:
                if not _equal(container, before):
                    return False
        for hooks, keys in self._hook_lists:
            if tuple(hooks) != keys:
                return False
        if list(map(_FORWARD, self._kinds)) != self._forwards:
            return False
        try:
            self.tensors = self._read()
            return (
                _likes(self.tensors) == self._likes
                and all(map(operator.is_, map(operator.getitem, *self._firsts), map(operator.getitem, *self._others)))
                and all(map(operator.is_, map(operator.getitem, *self._gaps), itertools.repeat(None)))
            )
        except (KeyError, AttributeError):  # it is gone, or no tensor
            return False

    def put_back(self) -> None:
        """Undo what code that ran on tensors without values has left in the modules."""
        for module, training in zip(self.modules, self._training):
            module.training = training
        for (holder, name), tensor in zip(self._slots, self.tensors):
            holder[name] = tensor
        for first, name, holder, alias in self._aliases:
            holder[alias] = first[name]
        for holder, name in self._absent:
            holder[name] = None
        for state, names in self._states:
            for name in set(state).difference(names):
                del state[name]
        for state, name, expected in self._attributes:
            state[name] = expected
        for container, before in self._containers:
            if _equal(container, before) or isinstance(container, types.MappingProxyType):
                continue
            container.clear()
            (container.update if isinstance(container, (dict, set)) else container.extend)(before)

    def _is_untouched(self) -> bool:
        """Whether attributes and containers hold the very same things: the common case, at the speed of C."""
        states, names, expected = self._flat_attributes
        containers, lengths, items, mappings, values = self._flat_containers
        try:
            return (
                list(map(len, containers)) == lengths
                and all(map(operator.is_, map(operator.getitem, states, names), expected))
                and all(map(operator.is_, itertools.chain.from_iterable(containers), items))
                and all(map(operator.is_, itertools.chain.from_iterable(map(_VALUES, mappings)), values))
            )
        except KeyError:
            return False

    def signature(self, read: set[str] | None) -> Any:
        """Equal for modules that compute the same with their own parameters, as far as attributes called as in ``read``
        (None: any) decide about it."""
        place = {id(module): index for index, module in enumerate(self.modules)}
        described_already: set[int] = set()

        def contents(x: Any, depth: int = 0) -> list[Any]:
            """What is read of an object, and of its class if that is somebody's."""
            kinds = [kind for kind in type(x).__mro__ if not _is_trusted(kind.__module__)]
            own = [vars(x)] if hasattr(x, "__dict__") else []
            return [
                (name, relative(item, depth + 1))
                for holder in (*own, *map(vars, kinds))
                for name, item in holder.items()
                if name not in _OWN and (read is None or name in read) and not isinstance(item, _DESCRIPTORS)
            ]

        def relative(x: Any, depth: int = 0) -> Any:
            if isinstance(x, nn.Module):
                return place.get(id(x), type(x))
            if isinstance(x, types.MethodType):
                return x.__func__, relative(x.__self__)
            if isinstance(x, functools.partial):
                return x.func, relative(list(x.args)), relative(x.keywords)
            own = relative(vars(x), depth + 1) if isinstance(x, _CONTAINERS) and hasattr(x, "__dict__") else None
            if isinstance(x, dict):
                return own, tuple((relative(k), relative(v, depth + 1)) for k, v in x.items())
            if isinstance(x, (list, tuple, set, frozenset)):
                return type(x), own, tuple(relative(i, depth + 1) for i in x)
            if type(x) in PLAIN or isinstance(x, _CODE):
                return type(x), x
            if depth > 4 or id(x) in described_already or isinstance(x, Tensor):
                return _Same(x)
            described_already.add(id(x))
            return _Same(x), contents(x, depth)

        number = {id(tensor): index for index, tensor in enumerate(self.tensors)}

        def held(tensor: Tensor | None) -> Any:
            if tensor is None or not compat.is_weight_only(tensor):
                return number.get(id(tensor)), relative({} if tensor is None else attributes_of(tensor))
            inside, settings = tensor.__tensor_flatten__()
            return type(tensor), [number[id(tensor.__dict__[part])] for part in inside], relative(settings)

        described = []
        for module in self.modules:
            state = module.__dict__
            hooks = [
                [relative(hook) for hook in state[kind].values() if not _is_spectator(hook)]
                for kind in (() if module is self.modules[0] else _HOOKS)
            ]
            described.append(
                (
                    type(module),
                    module.training,
                    hooks,
                    list(state["_modules"]),
                    [(name, held(t)) for kind in ("_parameters", "_buffers") for name, t in state[kind].items()],
                    contents(module),
                )
            )
        return described, self._forwards, self._likes


def _likes(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    return (
        list(map(type, tensors)), list(map(_LIKE, tensors)), list(map(_STRIDE, tensors)), list(map(len, map(_DICT, tensors)))
    )  # fmt: skip


class _Same:
    """Equal to the very same object only."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: Any) -> bool:
        return self.thing is (other.thing if isinstance(other, _Same) else other)

    __hash__ = None


_GONE = object()
_VALUES = operator.methodcaller("values")
_FORWARD = operator.attrgetter("forward")
_LIKE = operator.attrgetter("requires_grad", "dtype", "device", "shape")
_STRIDE = operator.methodcaller("stride")
_DICT = operator.attrgetter("__dict__")
_MAPPINGS = (dict, types.MappingProxyType)


def _copy(container: Any) -> Any:
    return dict(container) if isinstance(container, _MAPPINGS) else list(container)


def _equal(container: Any, before: Any) -> bool:
    """Whether a container holds the same (plain values: equal) things in the same order."""
    if len(container) != len(before):
        return False
    if isinstance(container, _MAPPINGS):
        if list(container) != list(before):
            return False
        pairs = zip(container.values(), before.values())
    else:
        pairs = zip(container, before)
    return all(a is b or (type(a) is type(b) and type(a) in PLAIN and a == b) for a, b in pairs)


def _hides_its_state(thing: Any) -> bool:
    """Whether a library's object may change where nobody can look: generators of random numbers, iterators, arrays."""
    if isinstance(thing, random.Random) or any(kind.__module__ == "_ctypes" for kind in type(thing).__mro__):
        return True
    if hasattr(thing, "__dict__") or type(thing) is object or isinstance(thing, _SETTLED):
        return False
    numpy = sys.modules.get("numpy")
    return type(thing).__module__ != "_thread" and not (numpy and isinstance(thing, numpy.generic))


def is_profiled() -> bool:
    """Whether a profiler written in C, such as `cProfile`, follows calls in this thread. Once another takes its place it
    cannot be put back."""
    profiler = sys.getprofile()
    return profiler is not None and not callable(profiler)


class Observation:
    """What Python code ran, while this was entered, and whether it did anything that a recording would miss.

    Libraries' own code is trusted to keep its state in modules, which `Watch` compares. Other code must not assign
    globals or variables of enclosing functions, nor read any that may change without notice.

    Attributes:
        code: the code other than libraries' that ran.
    """

    def __init__(self) -> None:
        self._frames: dict[types.CodeType, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._seen: set[types.CodeType] = set()
        self._calls: list[str] = []
        self._random, self._numpy = random.getstate(), _numpy_state()

    @property
    def code(self) -> frozenset[types.CodeType]:
        return frozenset(self._frames)

    def __enter__(self) -> "Observation":
        self._random, self._numpy = random.getstate(), _numpy_state()
        self._outer = sys.getprofile()
        seen, found = self._seen, self._frames

        def note(frame: types.FrameType, event: str, argument: Any) -> None:
            if event == "c_call" and argument in _OUTWARD and not _is_trusted(frame.f_globals.get("__name__")):
                self._calls.append(argument.__name__)
            if event == "call" and (code := frame.f_code) not in seen:
                if code is _LOGS:
                    return self._note_logging(frame)
                seen.add(code)
                if not _is_trusted(frame.f_globals.get("__name__")):
                    found[code] = (frame.f_globals, {name: frame.f_locals.get(name) for name in code.co_freevars})

        self._collects = gc.isenabled()
        gc.disable()  # the finalisers of others' garbage are no code of the module's
        sys.setprofile(note)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(self._outer)
        if self._collects:
            gc.enable()

    def _note_logging(self, frame: types.FrameType | None) -> None:
        while frame is not None and frame.f_globals.get("__name__") == "logging":
            frame = frame.f_back
        if frame is not None and not _is_trusted(frame.f_globals.get("__name__")):
            self._calls.append("log")

    @property
    def hooks_gradients(self) -> bool:
        """Whether code other than libraries' may have put hooks on tensors."""
        return any("register_hook" in code.co_names for code in self._frames)

    def names(self) -> set[str] | None:
        """All names of attributes, and strings, in the code that ran; None if somebody's computes such names."""
        if any(map(_computes_names, self._frames)):
            return None
        return _named(self._seen)

    def globals(self, watch: Watch) -> list[tuple[dict[str, Any], str, Any]]:
        """Globals that the code read, attributes of classes, modules and functions among them, and their values, for a
        later comparison.

        Args:
            watch: of the module whose code it was.

        Raises:
            Untraceable: if something was done that a recording would miss.
        """
        if random.getstate() != self._random or _numpy_state() != self._numpy:
            raise Untraceable("it draws random numbers from Python or NumPy")
        if self._calls:
            raise Untraceable(f"its code calls {self._calls[0]}()")
        read: list[tuple[dict[str, Any], str, Any]] = []
        holders = list(watch.code) if self._frames else []
        for code, (names, closure) in self._frames.items():
            if not {"environ", "getenv"}.isdisjoint(code.co_names):
                raise Untraceable("its code reads environment variables")
            if drawn := _GENERATORS.intersection(code.co_names):
                raise Untraceable(f"its code has random generators of its own ({min(drawn)})")
            for instruction in dis.get_instructions(code):
                operation, name = instruction.opname, instruction.argval
                if operation in ("STORE_GLOBAL", "DELETE_GLOBAL") or (
                    operation == "STORE_DEREF" and name in code.co_freevars
                ):
                    raise Untraceable(f"its code assigns {name!r}, which outlives the call")
                if operation == "IMPORT_NAME" and not _is_trusted(name):
                    raise Untraceable(f"its code imports {name!r} while it runs")
                if operation in ("LOAD_GLOBAL", "LOAD_NAME") and name in names:
                    if not _is_settled(names[name]):
                        raise Untraceable(f"its code reads the global {name!r}, which may change without notice")
                    read.append((names, name, names[name]))
                    holders.append(names[name])
            for name, held in closure.items():
                if name == "__class__" or watch.covers(held):
                    continue
                if not isinstance(held, _CODE):
                    raise Untraceable(f"its code reads {name!r} of an enclosing function")
                holders.append(held)
        named = None if any(map(_computes_names, self._frames)) else _named(self._frames)
        for holder in holders:  # which grows
            if watch.covers(holder):
                continue
            for names in map(vars, filter(_holds_attributes, getattr(holder, "__mro__", (holder,)))):
                for name in list(names) if named is None else named.intersection(names):
                    if name.startswith("__"):
                        continue
                    held = names[name]
                    if not (_is_settled(held) or isinstance(held, _DESCRIPTORS)):
                        raise Untraceable(
                            f"its code reads {name!r} of {holder.__name__}, which may change without notice"
                        )
                    read.append((names, name, held))
                    if isinstance(held, _CODE) and not any(held is other for other in holders):
                        holders.append(held)
        functions = [x for kind in watch.kinds for x in vars(kind).values()] + holders
        for function in functions:
            if getattr(function, "__code__", None) in self._frames and not all(map(_is_settled, _defaults(function))):
                raise Untraceable(f"default arguments of its {function.__name__} may change without notice")
        return read


def _named(codes: Iterable[types.CodeType]) -> set[str]:
    """All names, also as strings, in code."""
    names = {name for code in codes for name in code.co_names}
    return names | {const for code in codes for const in code.co_consts if isinstance(const, str)}


def _computes_names(code: types.CodeType) -> bool:
    """Whether code may read attributes whose names do not stand in it."""
    if not {"vars", "__dict__", "attrgetter", "__getattribute__"}.isdisjoint(code.co_names):
        return True
    instructions = iter(list(dis.get_instructions(code)))
    for instruction in instructions:
        if instruction.argval not in ("getattr", "hasattr") or not instruction.opname.startswith("LOAD_"):
            continue
        given = False  # as a constant
        for argument in instructions:
            if argument.opname.startswith("CALL"):
                given &= argument.arg >= 2  # or else it is handed to something else
                break
            if not argument.opname.startswith(("LOAD_", "PUSH_NULL", "PRECALL", "CACHE")):
                return True
            given |= argument.opname == "LOAD_CONST" and isinstance(argument.argval, str)
        if not given:
            return True
    return False


def _defaults(function: types.FunctionType) -> list[Any]:
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _holds_attributes(x: Any) -> bool:
    """Whether a class, module or function of somebody's may hold attributes that change."""
    return hasattr(x, "__dict__") and not _is_trusted(x.__name__ if isinstance(x, types.ModuleType) else x.__module__)


def _is_settled(x: Any) -> bool:
    """Whether a value cannot change in place (or is code)."""
    if type(x) in PLAIN or isinstance(x, (*_CODE, enum.Enum)):
        return True
    if isinstance(x, (tuple, frozenset)):
        return all(map(_is_settled, x))
    return type(x).__module__ in ("logging", "torch._ops", "typing") or isinstance(x, functools._lru_cache_wrapper)


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    kind, keys, *rest = numpy.random.get_state()
    return kind, keys.tobytes(), rest
