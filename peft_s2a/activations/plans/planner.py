"""Which plan a call runs: found, made, or refused with a reason."""

import itertools
import logging
import math
import operator
import threading
import time
import types
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ... import compat
from ...anatomy.usage import clean_caches
from ...compat import (
    DisableTorchFunction,
    count_dispatch_modes,
    count_function_modes,
    dispatch_modes,
    function_modes,
    no_dispatch_modes,
    tree_flatten,
)
from .graph import simplify, split
from .independence import Dependent
from .run import Plan
from .tiles import TiledPlan, batched_arguments, kept_bytes, passed_bytes, sizes_of, tiled_plan, tiles_for, working_set
from .trace import UNOBSERVED, Joint, Untraceable, trace, without_graph
from .watch import Observation, Watch, attributes_of, is_observed_globally, is_plain_tensor, is_profiled


logger = logging.getLogger(__name__)
_PLANS_PER_MODULE = 8  # of other shapes: beyond, the module runs without a plan
_OBSERVATIONS = 3  # that may set up attributes
_RECORDINGS = 32  # for one module: an attribute that changes at every step would ask for another each time
_ENTRIES = 128  # for arguments of one kind: more than models have blocks
# Bytes for the working set of one tile: enough for its operators to have work to do, small beside the codes that are kept.
_ROOM = {"cpu": 8 * 2**20}
_DEFAULT_ROOM = 8 * 2**24
_DISCARDED = object()
_lock = threading.RLock()
_observations = itertools.count(1)


class _Recomputed(threading.local):
    since: float = math.inf  # when what this thread computes again was computed
    asked: Collection[str] = ()  # which outputs of modules it was asked for then


_recomputed = _Recomputed()


def as_before(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, to be computed later what is computed from now on: a block whose first call is observed meanwhile,
    and whose result is used, has no plan then either, nor one that is asked for outputs inside. A checkpoint counts and
    compares what its two runs keep."""
    since, asked = next(_observations), frozenset(compat.collected_outputs())

    def recompute(*args: Any, **kwargs: Any) -> Any:
        outer = _recomputed.since, _recomputed.asked
        _recomputed.since, _recomputed.asked = since, asked
        try:
            return function(*args, **kwargs)
        finally:
            _recomputed.since, _recomputed.asked = outer

    return recompute


def asked_outputs() -> Collection[str]:
    """What a model of transformers is asked for of its modules' outputs, or was where it is computed again."""
    return compat.collected_outputs() or _recomputed.asked


@dataclass
class Entry:
    """What is known of modules of one kind, called with arguments of one kind.

    Attributes:
        signature: equal for these modules.
        read: names of the attributes that their code reads; None: any.
        globals: (namespace, name, value) of the globals that it reads.
        code: what code outside of libraries is among it.
        plan: None until it is made; a text where it cannot be made, the reason.
        joint: the recorded call.
        at_once: bytes that it has in use at once beside its arguments and results.
        kept: bytes that it keeps for backward, and the blocks after it in proportion.
        passed: bytes of its arguments that hold samples, and of its results.
        tiled: {number of tiles: plan}.
        whole: why it does not run in tiles.
    """

    signature: Any
    read: set[str] | None
    globals: list[tuple[dict[str, Any], str, Any]]
    code: frozenset[types.CodeType]
    plan: Plan | str | None = None
    joint: Joint | None = None
    at_once: int = 0
    kept: int = 0
    passed: int = 0
    tiled: dict[int, TiledPlan] = field(default_factory=dict)
    whole: str | None = None

    def holds(self) -> bool:
        foreign = () if self.joint is None else self.joint.foreign
        return all(names.get(name) is value for names, name, value in self.globals) and not any(
            tensor.requires_grad for tensor in foreign
        )

    def in_one_piece(self) -> str | None:
        """Why its plan runs without tiles, where that has a reason."""
        return self.whole and f"in one piece, because {self.whole}"


class Store:
    """The plans of a model: modules that compute the same share them."""

    def __init__(self) -> None:
        self.entries: dict[Any, list[Entry]] = {}

    def __deepcopy__(self, memo: dict) -> "Store":
        return Store()

    def __reduce__(self):
        return Store, ()


class Planner:
    """Runs one module by plans.

    A plan is used while everything holds that it was made for: the arguments' kinds, torch's settings, and the state of
    the module and of all modules in it. Otherwise the module runs whole, under its operator mode, and `reason` says why.

    Args:
        store: shared by the modules of a model.
        settings: what else decides about the recorded operators; compared by equality.
        later: how many times what this block keeps the blocks after it keep. Memory peaks where all codes are kept, in
            the last blocks; those before them have that much more room.
        narrows: by which share less the last block's arguments and results take than this block's. Where that is much,
            as in backbones whose feature maps shrink, there is as much less room.
        tiles: how many tiles to run in; None: as many as the room asks for.
        is_harmless: whether a hook may be ignored.
    """

    def __init__(
        self,
        store: Store,
        settings: Any,
        is_harmless: Callable[[Any], bool],
        later: float,
        narrows: float,
        tiles: int | None,
    ) -> None:
        self.store, self.settings, self.is_harmless, self.tiles = store, settings, is_harmless, tiles
        self.later, self.narrows = later, narrows
        self.reason: str | None = None
        self._said: set[str] = set()  # reasons that are in the log
        self._unsettled = self._recorded_before = 0
        self._observed = 0  # when a result was last used that was computed without a plan, to observe the module
        self._forget()

    def _forget(self) -> None:
        self._watch: Watch | None = None
        self._entries: dict[Any, Entry] = {}
        self._chosen: dict[Any, Plan | TiledPlan] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watch": None, "_entries": {}, "_chosen": {}}

    def run(self, module: nn.Module, whole: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """``whole(*args, **kwargs)``, the module's forward pass under its operator mode, by a plan where there may be one."""
        if self._observed > _recomputed.since:
            return whole(*args, **kwargs)
        try:
            if reason := _unfit():
                raise Untraceable(reason)
            leaves: list[Any] = []
            # a mode in force would take every attribute that is read of a tensor for a call
            with DisableTorchFunction():
                key = (_describe(args, leaves), _describe(kwargs, leaves), _ambient())
                watch = self._watched(module)
            if watch.captured and not watch.captured.isdisjoint(asked := asked_outputs()):
                raise Untraceable(f"it is asked for {min(watch.captured.intersection(asked))} of its modules")
            entry = self._entries.get(key)
            if entry is not None and entry.holds() and (plan := self._chosen.get(key)) is not None:
                if self.reason is not None:
                    self.reason = entry.in_one_piece()
                return plan(leaves, watch.tensors)
            if entry is None or not entry.holds():
                self._chosen.pop(key, None)  # it was made for another entry
                if not any(isinstance(x, Tensor) and x.requires_grad for x in (*leaves, *watch.tensors)):
                    return whole(*args, **kwargs)
                entry = self._find(module, key)
                if entry is None:
                    entry, result = self._observe(module, whole, args, kwargs, leaves, key)
                    if result is not _DISCARDED:
                        self._observed = next(_observations)
                        return result
            with compat.without_function_modes():
                if entry.plan is None:
                    if is_profiled():
                        raise Untraceable("a profiler follows its code")
                    self._make(entry, whole, args, kwargs, leaves)
                if isinstance(entry.plan, str):
                    raise Untraceable(entry.plan)
                plan = self._chosen[key] = self._choose(entry, whole, args, kwargs, leaves)
        except Untraceable as error:
            self._fall_back(module, str(error))
            return whole(*args, **kwargs)
        self.reason = entry.in_one_piece()
        return plan(leaves, watch.tensors)

    def _watched(self, module: nn.Module) -> Watch:
        if self._unsettled > _OBSERVATIONS:
            raise Untraceable("it changes attributes of its modules while it runs")
        if self._watch is None or not self._watch.holds():
            self._forget()
            self._watch = Watch(module, self.is_harmless)
        return self._watch

    def _find(self, module: nn.Module, key: Any) -> Entry | None:
        """What is known from this module or another of its kind."""
        for entry in self.store.entries.get((type(module), key), ()):
            if entry.holds() and entry.signature == (self.settings, self._watch.signature(entry.read)):
                self._entries[key] = entry
                return entry
        if self._recorded_before >= _RECORDINGS:
            raise Untraceable("it changed too often to be recorded once more")
        if len(self._entries) >= _PLANS_PER_MODULE:
            raise Untraceable(f"it is called with more than {_PLANS_PER_MODULE} kinds of arguments")
        return None

    def _observe(
        self, module: nn.Module, whole: Callable[..., Any], args: tuple, kwargs: dict, leaves: Sequence[Any], key: Any
    ) -> tuple[Entry | None, Any]:
        """Run the module without a plan, to see whether its code does anything that a recording would miss.

        Nothing is recorded that fills a cache, sets up an attribute or writes to a list of somebody's. Where the run left
        nothing behind its result is discarded, and random generators are set back: so the first call computes what later
        calls do.
        """
        if is_profiled():
            raise Untraceable("a profiler follows its code")
        watch = self._watch
        tensors = [x for x in (*leaves, *watch.tensors) if isinstance(x, Tensor)]
        versions = [x._version for x in tensors if not x.is_inference()]
        devices = list({x.device for x in tensors if x.device.type == "cuda"})
        random = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        with no_dispatch_modes(), _DeferredHooks() as hooks, Observation() as observation:
            result = whole(*args, **kwargs)
        before = watch.tensors
        if not watch.holds():
            self._unsettled += 1
            hooks.run()
            return None, result
        names = observation.names()
        entry = Entry((self.settings, watch.signature(names)), names, [], observation.code)
        self._entries[key] = entry
        self._recorded_before += 1
        known = self.store.entries.setdefault((type(module), key), [])
        known.append(entry)
        del known[:-_ENTRIES]
        after: list[Any] = []
        _describe(args, after), _describe(kwargs, after)
        try:
            entry.globals = observation.globals(watch)
            if any(map(operator.is_not, watch.tensors, before)):
                raise Untraceable("it puts another tensor in the place of a buffer")
            if watch.reaches_outside and observation.code:
                raise Untraceable("it holds a module outside of it")
            if observation.hooks_gradients:
                entry.whole = "hooks on its tensors may mix the gradients of samples"
            if len(after) != len(leaves) or any(one is not other for one, other in zip(after, leaves)):
                raise Untraceable("it changes a list or dict among its arguments")
        except Untraceable as error:
            entry.plan = str(error)
            self._fall_back(module, entry.plan)
            hooks.run()
            return entry, result
        if [x._version for x in tensors if not x.is_inference()] != versions:
            hooks.run()
            return entry, result
        for state, restore in zip(random, [torch.set_rng_state, *(partial(_set_rng_state, d) for d in devices)]):
            restore(state)
        return entry, _DISCARDED

    def _make(self, entry: Entry, whole: Callable[..., Any], args: tuple, kwargs: dict, leaves: Sequence[Any]) -> None:
        with _lock:
            if entry.plan is not None:
                return
            start = time.perf_counter()
            flat, spec = tree_flatten((args, kwargs))
            try:
                if len(flat) != len(leaves) or any(one is not other for one, other in zip(flat, leaves)):
                    raise Untraceable("its arguments are of types that cannot be told apart")
                backward_pass = Observation() if entry.code else UNOBSERVED
                joint = self._recorded(whole, flat, spec, backward_pass=backward_pass)
                if isinstance(backward_pass, Observation):
                    entry.globals += backward_pass.globals(self._watch)
                    if not backward_pass.code <= entry.code:  # checkpoints run again what ran before
                        entry.whole = "its own code computes gradients, and may mix those of samples"
                    if backward_pass.code:  # which may read any attribute
                        entry.read, entry.signature = None, (self.settings, self._watch.signature(None))
                halves = split(joint)
                entry.plan, entry.joint = Plan.of(joint, halves), joint
                entry.kept, entry.passed = kept_bytes(halves), passed_bytes(joint)
                entry.at_once = max(working_set(halves.forward), working_set(halves.backward))
            except Untraceable as error:
                entry.plan = str(error)
            except (MemoryError, torch.OutOfMemoryError):  # which says nothing about the module
                raise
            except Exception as error:  # ours, and no reason to stop a training run: the module runs as it is
                entry.plan = f"no plan could be made of the recording ({type(error).__name__}: {error})"
            logger.debug("Recorded a plan in %.2f s.", time.perf_counter() - start)

    def _recorded(
        self,
        whole: Callable[..., Any],
        flat: Sequence[Any],
        spec: Any,
        sizes: Sequence[Any] = (),
        backward_pass: AbstractContextManager = UNOBSERVED,
    ) -> Joint:
        watch = self._watch
        before = watch.tensors
        with clean_caches(watch.modules):
            try:
                joint = trace(whole, flat, spec, before, sizes, backward_pass)
            finally:
                is_left_alone = watch.holds() and all(map(operator.is_, watch.tensors, before))
                if not is_left_alone:
                    watch.tensors = before
                    watch.put_back()
        if not is_left_alone:
            raise Untraceable("it changes attributes of its modules while it runs")
        if joint.foreign and watch.reaches_outside:
            raise Untraceable("it reads a tensor of a module outside of it")
        simplify(joint)
        return joint

    def _choose(
        self, entry: Entry, whole: Callable[..., Any], args: tuple, kwargs: dict, leaves: Sequence[Any]
    ) -> Plan | TiledPlan:
        """The plan for this module's share of the memory: whole, or in tiles where that is proved to be the same."""
        x = leaves[entry.joint.arguments[0]]
        gradients = sum(
            self._watch.tensors[i].nbytes for i in entry.joint.slots if self._watch.tensors[i].requires_grad
        )
        beyond_the_last = self.later * entry.kept - self.narrows * entry.passed
        room = _ROOM.get(x.device.type, _DEFAULT_ROOM) + max(0, beyond_the_last)
        tiles = tiles_for(entry.at_once, room) if self.tiles is None else self.tiles
        if x.dim() < 2 or gradients > x.nbytes:  # which are added up tile after tile
            return entry.plan
        tiles = min(tiles, x.shape[0])
        if tiles < 2 or entry.whole is not None:
            return entry.plan
        with _lock:
            if tiles not in entry.tiled:
                flat, spec = tree_flatten((args, kwargs))
                held = {
                    entry.joint.arguments[entry.joint.inputs.index(node)] for node in batched_arguments(entry.joint)
                }

                def record(size: int) -> Joint:
                    sizes = [(size, *leaf.shape[1:]) if i in held else None for i, leaf in enumerate(flat)]
                    return self._recorded(whole, flat, spec, sizes)

                try:
                    entry.tiled[tiles] = tiled_plan(entry.joint, sizes_of(x.shape[0], tiles), record)
                except (Dependent, Untraceable) as error:
                    entry.whole = str(error)
                    return entry.plan
                except (MemoryError, torch.OutOfMemoryError):  # as above
                    raise
                except Exception as error:
                    entry.whole = f"no tiles could be made of the recording ({type(error).__name__}: {error})"
                    return entry.plan
            return entry.tiled[tiles]

    def _fall_back(self, module: nn.Module, reason: str) -> None:
        self.reason = reason
        if reason not in self._said:
            self._said.add(reason)
            logger.info("%s runs without a plan: %s.", type(module).__name__, reason)


@dataclass(slots=True, eq=False)
class _Kept:
    packed: Any


class _DeferredHooks:
    """Others' `saved_tensors_hooks` see what a run keeps for backward when it is known that its result is used."""

    def __enter__(self) -> "_DeferredHooks":
        self._kept: list[_Kept] = []
        self._context = nullcontext()
        self._hooks = compat.outer_saved_tensors_hooks()
        if self._hooks is not None:
            self._context = saved_tensors_hooks(self._keep, self._unpack)
        self._context.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._context.__exit__(*exception)

    def _keep(self, x: Tensor) -> _Kept:
        self._kept.append(_Kept(without_graph(x)))
        return self._kept[-1]

    def _unpack(self, kept: _Kept) -> Tensor:
        return self._hooks[1](kept.packed)

    def run(self) -> None:
        for kept in self._kept:
            kept.packed = self._hooks[0](kept.packed)
        self._kept.clear()


def _set_rng_state(device: torch.device, state: Tensor) -> None:
    torch.cuda.set_rng_state(state, device)


def _describe(x: Any, leaves: list[Any]) -> Any:
    """What a plan depends on of an argument, for comparison; adds its leaves, in the order of pytrees."""
    kind = type(x)
    if kind in (tuple, list, torch.Size):
        return kind, tuple([_describe(item, leaves) for item in x])
    if kind is dict:
        return tuple([(name, _describe(item, leaves)) for name, item in x.items()])
    leaves.append(x)
    if isinstance(x, Tensor) and is_plain_tensor(x):
        if x.__dict__ and attributes_of(x):
            raise Untraceable("an argument is a tensor with attributes of somebody's")
        place = next(i for i, leaf in enumerate(leaves) if leaf is x)  # whether it was there before: code may ask
        return place, x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_leaf
    if x is None or kind in (bool, int, float, str, torch.dtype, torch.device):
        return kind, x
    raise Untraceable(f"an argument is a {kind.__name__}")


def _ambient() -> tuple:
    """What of torch's own settings decides about operators."""
    cuda = torch.backends.cuda
    return (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
    )  # fmt: skip


def _unfit() -> str | None:
    """Why no plan may be used now, whatever the module; None if one may."""
    if is_observed_globally():
        return "hooks on all modules look inside"
    if count_function_modes() and _foreign_function_mode():
        return "a function mode of somebody else is in force"
    if transform := compat.transform_in_force():
        return f"it runs under {transform}"
    if count_dispatch_modes() and any(map(compat.caches_results, dispatch_modes())):
        return "a selective checkpoint caches results that it would write over"
    return None


def _foreign_function_mode() -> bool:
    return any(not getattr(mode, "is_replaced_by_plans", False) for mode in function_modes())
