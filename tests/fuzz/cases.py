"""What a case is, and the comparison of a case on a quantised model with the same on the stock model.

Compared are, at every step: the results; the arguments, which a block may have changed in place; what the modules hold
beside parameters (buffers, attributes, lists) after forward and after backward; what the case itself watches (what its
hooks were handed, say); where the random generators stand; and the gradients of inputs and parameters.

Gradients at 8 bits are within some percent of stock's, except where they are a small difference of large terms. How
large the terms are is seen from stock's own rounding, float32 against float64, which grows with them alike.
"""

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from peft_s2a import ActivationQuantizationConfig, S2AConfig, quantize_activations
from peft_s2a.activations.wrap import _is_under_mode


LEARNING_RATE = 0.02
# Of a parameter's gradient; of all parameters' together.
ERROR, COSINE, NORM = 0.06, 0.995, 0.03
# Of all gradients together: where float32 itself is off by more they are nothing but a difference of large terms.
UNDETERMINED = 1e-3
# 8 bits round at 2^-9 of a group's range, float32 at 2^-25 of a value, and a code is read once where values are rounded often.
ROUNDING = 2**17
# Of the root mean square over all gradients: an error that is too small to matter to any step.
NEGLIGIBLE, LARGEST_NOISE = 0.004, 0.05
OUTPUT_ERROR = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
OWN_ATTRIBUTES = ("_activation", "_s2a")  # how attributes that quantisation itself adds to modules start


@dataclass(frozen=True)
class Setting:
    """How the model of a case is made cheap."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    adapter: str | None = None

    def config(self) -> ActivationQuantizationConfig:
        return ActivationQuantizationConfig(**{"bits": 8, **dict(self.options)})


DEFAULT = Setting("default")
FOUR_BITS = Setting("4 bits", (("bits", 4),))
TILES = tuple(Setting(f"{n} tiles", (("mlp_tiles", n),)) for n in (2, 3, 4))
LORA, LORA_IN_TILES = Setting("lora", adapter="lora"), Setting("lora, 2 tiles", (("mlp_tiles", 2),), "lora")
S2A, S2A_IN_TILES = Setting("s2a", adapter="s2a"), Setting("s2a, 2 tiles", (("mlp_tiles", 2),), "s2a")
S2A_BIAS = Setting("s2a, bias", adapter="s2a-bias")
SETTINGS = (DEFAULT, *TILES, LORA, LORA_IN_TILES, S2A, S2A_IN_TILES)


class Case:
    """A model, and what is done with it. A fresh instance is made for every run, so hooks may note things on it."""

    settings: tuple[Setting, ...] = (DEFAULT, TILES[0])
    batches: tuple[int, ...] = (4, 4, 5, 3)  # one a step
    shape: tuple[int, ...] = (5, 16)  # of a sample
    batch_dim = 0
    input_requires_grad = False
    dtype = torch.float32
    bits_matter = True  # False where gradients at 8 bits are not expected to be close
    output_error: float | None = None  # None: the dtype's
    error, cosine, norm = ERROR, COSINE, NORM
    has_float64 = True  # False where float64 computes something else: autocast, masks so large that scores are rounded

    def build(self) -> nn.Module:
        raise NotImplementedError

    def train_what(self, model: nn.Module) -> None:
        """What is trained without an adapter: biases, and other vectors."""
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() < 2)

    def after_wrapping(self, model: nn.Module) -> None:
        """Hooks, patches and the like that come after the model was made cheap."""

    def before(self, model: nn.Module, step: int) -> None:
        """Flags that are switched between steps."""

    def inputs(self, step: int, batch: int, generator: torch.Generator) -> tuple[tuple, dict]:
        shape = list(self.shape)
        shape.insert(self.batch_dim, batch)
        return (torch.randn(shape, generator=generator),), {}

    def call(self, model: nn.Module, *args, **kwargs) -> Any:
        return model(*args, **kwargs)

    def loss_terms(self, model: nn.Module, result: Any) -> list[Tensor]:
        """The tensors that go into the loss, each weighted at random."""
        return [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]

    def watched(self, model: nn.Module) -> Any:
        """Further values that have to be stock's, as a pytree of tensors and plain values."""
        return None

    def close(self) -> None:
        """Undo what reaches beyond the model, such as global hooks."""


class StockFails(Exception):
    """The stock model cannot run the case."""


@dataclass
class Step:
    """What was seen of one step."""

    error: str | None = None
    seen: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)


def run(case: Case, setting: Setting | None, adapter: str | None, seed: int, double: bool = False,
        updates: list[dict[str, Tensor | None]] | None = None) -> list[Step]:  # fmt: skip
    """The steps of ``case``: on the stock model if ``setting`` is None. ``updates``: gradients to follow between
    steps in place of its own, so that two runs are at the same weights."""
    _seed(seed)
    model = case.build().train()
    torch.manual_seed(seed + 1)
    dtype = torch.float64 if double else case.dtype
    try:
        model = _cheap(case, model.to(dtype), setting, adapter)
        case.after_wrapping(model)
    except Exception as error:
        case.close()
        return [Step(f"while it was wrapped: {_described(error)}")]
    steps = []
    try:
        for index, batch in enumerate(case.batches):
            steps.append(step := _step(case, model, index, batch, seed, dtype))
            if step.error is not None:
                break
            followed = step.gradients if updates is None else updates[index]
            _update(model, followed)
    finally:
        case.close()
    return steps


def _cheap(case: Case, model: nn.Module, setting: Setting | None, adapter: str | None) -> nn.Module:
    config = None if setting is None else setting.config()
    if adapter in ("s2a", "s2a-bias"):
        targets = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        s2a = S2AConfig(
            structures=("bias", "side") if adapter == "s2a" else ("bias",), target_modules=targets, modules_to_save=[], init_weights=False, side_rank=2,
            activation_quantization=config,
        )  # fmt: skip
        return get_peft_model(model, s2a)
    if adapter == "lora":
        targets = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    else:
        case.train_what(model)
    return model if config is None else quantize_activations(model, config)


def _step(case: Case, model: nn.Module, index: int, batch: int, seed: int, dtype: torch.dtype) -> Step:
    step = Step()
    generator = torch.Generator().manual_seed(seed + 100 + index)
    args, kwargs = case.inputs(index, batch, generator)
    args, kwargs = tree_map(lambda leaf: _cast(leaf, dtype), (args, kwargs))
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    leaf = inputs[0]
    if case.input_requires_grad:
        leaf.requires_grad_()
        args = tree_map(lambda x: x * 1.0 if x is leaf else x, args)
    _seed(seed + 1000 + index)
    try:
        model.zero_grad()
        case.before(model, index)
        result = case.call(model, *args, **kwargs)
        step.seen["results"] = _snapshot(result)
        step.seen["arguments"] = _snapshot((args, kwargs))
        step.seen["state after forward"] = _state(case, model)
        terms = case.loss_terms(model, result)
        weights = [torch.randn(term.shape, generator=generator).to(term.dtype) for term in terms]
        if terms:
            sum((term * weight).sum() for term, weight in zip(terms, weights)).backward()
        step.seen["state after backward"] = _state(case, model)
    except Exception as error:
        step.error = _described(error)
        return step
    step.seen["random generators"] = _snapshot(
        [torch.get_rng_state(), str(random.getstate()), str(np.random.get_state())]
    )
    step.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if case.input_requires_grad and leaf.grad is not None:
        step.gradients["(the input)"] = leaf.grad.clone()
    return step


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _update(model: nn.Module, gradients: dict[str, Tensor | None]) -> None:
    for name, parameter in model.named_parameters():
        gradient = gradients.get(name)
        if gradient is not None and parameter.requires_grad:
            size = gradient.norm() / gradient.numel() ** 0.5
            parameter.data.add_((gradient / (size + 1e-12)).to(parameter.dtype), alpha=-LEARNING_RATE)


_ORDINARY = set(vars(nn.Module()))


def _state(case: Case, model: nn.Module) -> dict[str, Any]:
    state = {"watched": _snapshot(case.watched(model))}
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            state[f"{name}.{key}"] = _snapshot(buffer)
        for key, value in vars(module).items():
            if key not in _ORDINARY and not key.startswith(OWN_ATTRIBUTES):
                if _is_under_mode(value):  # a forward method of the module's own is quantised in its place
                    value = value.args[1]
                state[f"{name}.{key}"] = _snapshot(value)
    return state


def _snapshot(value: Any) -> Any:
    """A copy that later changes in place cannot reach: tensors detached, other objects by their type."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return [_snapshot(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _snapshot(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype, torch.device)):
        return value
    if hasattr(value, "_asdict") or hasattr(value, "to_tuple"):
        return _snapshot(dict(value))
    return f"<{type(value).__name__}>"


def differences(make: Any, setting: Setting, seed: int = 0) -> Iterator[str]:
    """In words, where a run in ``setting`` of the case that ``make()`` gives differs from the stock model's."""
    expected = run(make(), None, setting.adapter, seed)
    if expected[-1].error is not None:
        raise StockFails(f"the stock model fails: {expected[-1].error}")
    updates = [step.gradients for step in expected]
    exact = None
    if make().dtype == torch.float32:
        with suppress(Exception):
            exact = run(make(), None, setting.adapter, seed, True, updates)
    actual = run(make(), setting, setting.adapter, seed, updates=updates)
    case = make()
    tolerance = case.output_error or OUTPUT_ERROR[case.dtype]
    for index, (stock, ours) in enumerate(zip(expected, actual)):
        if ours.error is not None:
            yield f"step {index}: {ours.error}"
            return
        for what, value in stock.seen.items():
            if difference := _difference(value, ours.seen[what], tolerance):
                yield f"step {index}, {what}: {difference}"
        if case.bits_matter:
            reference = (
                exact[index].gradients if exact is not None and case.has_float64 and index < len(exact) else None
            )
            found = _gradients(stock.gradients, ours.gradients, reference, case)
            yield from (f"step {index}, gradients: {d}" for d in found)


def _difference(expected: Any, actual: Any, tolerance: float) -> str | None:
    if isinstance(expected, Tensor) and isinstance(actual, Tensor):
        if expected.shape != actual.shape or expected.dtype != actual.dtype:
            return f"{tuple(actual.shape)} of {actual.dtype} instead of {tuple(expected.shape)} of {expected.dtype}"
        if torch.equal(expected, actual) or not expected.numel():
            return None
        if not expected.is_floating_point():
            return "other numbers"
        same = expected == actual  # infinite ones too
        one, other = (torch.where(same, 0, t.double()) for t in (expected, actual))
        size = expected.double()[expected.isfinite()].abs().max() if expected.isfinite().any() else torch.tensor(1.0)
        if not expected.isfinite().equal(actual.isfinite()):
            return "not finite where stock is, or the other way round"
        error = ((one - other).nan_to_num().abs().max() / size.clamp_min(1e-30)).item()
        return f"off by {error:.2%}" if error > tolerance else None
    if type(expected) is not type(actual):
        return f"{_short(actual)} instead of {_short(expected)}"
    if isinstance(expected, dict):
        if expected.keys() != actual.keys():
            return f"only one has {sorted(expected.keys() ^ actual.keys())}"
        pairs = [(key, expected[key], actual[key]) for key in expected]
    elif isinstance(expected, list):
        if len(expected) != len(actual):
            return f"{len(actual)} entries instead of {len(expected)}"
        pairs = [(index, *both) for index, both in enumerate(zip(expected, actual))]
    elif isinstance(expected, float):
        return (
            None if abs(expected - actual) <= tolerance * abs(expected) + 1e-12 else f"{actual} instead of {expected}"
        )
    else:
        return None if expected == actual else f"{_short(actual)} instead of {_short(expected)}"
    for key, one, other in pairs:
        if inner := _difference(one, other, tolerance):
            return f"{key}: {inner}"
    return None


def _short(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else str(value)[:60]


def _gradients(expected: dict, actual: dict, exact: dict | None, case: Case) -> Iterator[str]:
    numel = sum(g.numel() for g in expected.values())
    if not numel:
        return
    if exact is not None and exact.keys() == expected.keys():
        off = sum((g.double() - exact[name].double()).pow(2).sum().item() for name, g in expected.items())
        if off > UNDETERMINED**2 * sum(g.double().pow(2).sum().item() for g in exact.values()):
            return
    typical = (sum(g.double().pow(2).sum().item() for g in expected.values()) / numel) ** 0.5
    for name in sorted(expected.keys() | actual.keys()):
        one, other = expected.get(name), actual.get(name)
        like = other if one is None else one
        one, other = (torch.zeros_like(like) if g is None else g for g in (one, other))
        one, other = one.double(), other.double()
        error, size = (one - other).norm().item(), one.norm().item()
        noise = 0.0
        if exact is not None and name in exact:
            noise = min((one - exact[name]).norm().item() * ROUNDING, LARGEST_NOISE * typical * one.numel() ** 0.5)
        elif one.numel():
            noise = LARGEST_NOISE * typical * one.numel() ** 0.5
        if not error <= case.error * size + noise + NEGLIGIBLE * typical * one.numel() ** 0.5:
            yield f"{name} off by {error / max(size, 1e-30):.1%} (norm {other.norm().item():.3g}, stock {size:.3g})"
    one, other = (
        torch.cat([d.get(name, torch.zeros_like(g)).double().flatten() for name, g in expected.items()])
        for d in (expected, actual)
    )
    cosine = torch.cosine_similarity(one, other, dim=0).item()
    ratio = (other.norm() / one.norm().clamp_min(1e-30)).item()
    if one.norm() > 0 and not (cosine >= case.cosine and abs(ratio - 1) <= case.norm):
        yield f"all together: cosine {cosine:.4f}, norm {ratio:.3f} of stock's"
