"""`calibrate_activations`: widths of operators and levels of activation functions, fitted to a model and its data.

Measuring. The model runs a few steps with its stock operators. Where an operator would be quantised, a hook on its
result receives the true upstream gradient, and the operator is run again on the same inputs: once as it is, once
quantised at every width. The error of the gradients it passes on is then sent down the rest of the backward pass by
itself, since that is linear: what arrives at the trained parameters is what this operator at this width adds to the
error of the model's gradient. That serves any operator that `interception.OperatorMode` replaces, without code of its
own.

Choosing. To first order the errors of different operators add up (ActNN, Chen et al. 2021, section 4; GACT, Liu et al.
2022), so the widths are a multiple-choice knapsack: the least sum of squared errors within a number of bytes. S2A
(arXiv:2503.08154) names "gradient-informed precision allocation" without fixing it; the error measured and the solver
are our choice. (The errors where they arise do not compare: those of attention scores, hidden units and residual
streams have different scales.)
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from transformers.utils.logging import tqdm

from ..compat import DisableTorchFunction, tree_flatten, tree_leaves, tree_map, tree_unflatten
from .codec import WIDTHS
from .config import ActivationQuantizationConfig
from .interception import OperatorMode
from .levels import fit_levels
from .wrap import quantize_activations, restore_activations


_REFERENCE_WIDTH = 4  # of which a fractional budget is a fraction
_DERIVATIVE_CELLS = 4096  # cells of unit length in the histogram of an activation function's derivative
_FIT_RESOLUTION = 256


def calibrate_activations(
    model: nn.Module,
    batches: Iterable[Any],
    budget: int | float | None = None,
    *,
    target_error: float | None = None,
    config: ActivationQuantizationConfig | Mapping[str, Any] | None = None,
    widths: Sequence[int] = WIDTHS,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> ActivationQuantizationConfig:
    """Choose the bits of every operator, and fit the levels of every activation function, on a few batches.

    The model is measured as it is going to be trained: with what is trainable now, in train mode, with its stock
    operators. It is left as it was: weights, gradients, buffers, modes, random state, and whether its activations are
    quantised. A measured step takes the memory of a stock step twice, and the time of about as many steps as there are
    quantised operators times widths, so let the batches be few and small. All ``batches`` are used. Activation
    checkpointing has to be off or non-reentrant.

    Apply the result with `quantize_activations`, or give it to a tuner's configuration
    (``activation_quantization=...``), which saves it with the adapter. Names of modules are those in the base model,
    so it fits the bare model, the one inside a `PeftModel`, and the `PeftModel` alike.

    Args:
        model: a model with trainable parameters, possibly a `PeftModel`; not one that `torch.compile` returned.
        batches: batches of training data. Their tensors are moved to the device of the model's first parameter.
        budget: what the quantised operators may keep for backward, codes and scales together: an int is bytes per
            image, a float (above 0, up to 2) is a fraction of what they keep at 4 bits each. What the model keeps
            besides is not counted.
        target_error: instead of ``budget``: the error to stay below with as few bytes as possible. It is the estimate,
            to first order, of the norm of the error of the trained parameters' gradient over the norm of the gradient;
            their cosine is about ``1 - target_error ** 2 / 2``.
        config: all other settings; its ``bits`` remain for operators that are not measured, its ``levels`` are
            replaced. None: the defaults.
        widths: the widths to choose from.
        loss: ``loss(model, batch)``, the scalar to differentiate. None: ``model(**batch).loss``.

    Returns:
        ``config`` with ``bits`` ("module name:operator kind" -> width) and ``levels`` (module name -> ``2 ** bits``
        numbers; None, the shipped ones, with stochastic rounding). Operators whose memory does not depend on the width
        (piecewise-linear functions, frozen batch norms) are not listed.

    Raises:
        ValueError: for arguments that are not allowed, no batches, a loss that is missing or not finite, a model in
            which nothing is to be quantised, and a ``budget`` or ``target_error`` below the smallest possible one.
    """
    config = _check_config(config)
    widths = _check_widths(widths)
    _check_goal(budget, target_error)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("`model` has no trainable parameters; choose what to train before calibrating.")
    study = _Study(config, sorted({*widths, _REFERENCE_WIDTH}), parameters)
    images = 0
    with _left_as_it_was(model), study.measuring(_base_model(model)):
        model.train()
        for batch in tqdm(batches, desc="Calibrating activations", leave=False):
            batch = _to_device(batch, next(model.parameters()).device)
            value = _loss(model, batch, loss)
            images += _count_images(batch)
            study.step(value)
            del value
    if not images:
        raise ValueError("`batches` must hold at least one batch, it was empty.")
    return study.solve(widths, images, budget, target_error)


def pareto_front(
    costs: np.ndarray, errors: np.ndarray, limit: int = 10_000
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All choices of one option an item that no other choice beats in both summed cost and summed error.

    Items are added one by one, and what is dominated is dropped (Nemhauser and Ullmann, "Discrete dynamic programming
    and capital allocation", 1969). Exact as long as there are at most ``limit`` points; beyond, one point is kept in
    each of ``limit`` equal cells of cost. The blocks of a model are alike, so there are far fewer different sums than
    combinations.

    Args:
        costs, errors: ``[items, options]``, integers and floats.
        limit: points to keep.

    Returns:
        Ascending costs ``[points]``, descending errors ``[points]``, and the chosen options ``[points, items]``.
    """
    cost, error = np.zeros(1, np.int64), np.zeros(1)
    choices = np.zeros((1, 0), np.int8)
    for item_costs, item_errors in zip(costs, errors):
        all_costs = (cost[:, None] + item_costs).ravel()
        all_errors = (error[:, None] + item_errors).ravel()
        order = np.lexsort((all_errors, all_costs))
        best = np.minimum.accumulate(all_errors[order])
        order = order[np.r_[True, best[1:] < best[:-1]]]
        if len(order) > limit:
            span = all_costs[order[-1]] - all_costs[order[0]]
            cell = (all_costs[order] - all_costs[order[0]]) * limit // (span + 1)
            order = order[np.r_[True, cell[1:-1] != cell[2:], True]]  # the cheapest, and the last of every cell
        parent, option = np.divmod(order, len(item_costs))
        cost, error = all_costs[order], all_errors[order]
        choices = np.concatenate([choices[parent], option[:, None].astype(np.int8)], axis=1)
    return cost, error, choices


@dataclass
class _Operator:
    """What was measured of the operators of one kind in one module, summed over their calls."""

    errors: dict[int, float] = field(
        default_factory=lambda: defaultdict(float)
    )  # of parameters' gradients, squared, by width
    local_errors: dict[int, float] = field(default_factory=lambda: defaultdict(float))  # of the gradients it passes on
    kept: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # bytes, by width
    # of an activation function's derivative: numbers of cells, and the squared upstream gradient that fell into each
    derivatives: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def fit(self) -> dict[int, list[float]]:
        """Levels for every width, if this is an activation function; ``errors`` become theirs.

        dx = dy f'(x), so its error is the sum of dy^2 (f'(x) - level)^2: what the levels minimise, and what the
        histogram knows. How much of it arrives at the parameters is taken from the levels that were measured.
        """
        if not self.derivatives:
            return {}
        cells, owner = np.unique(np.concatenate([cells for cells, _ in self.derivatives]), return_inverse=True)
        energy = np.bincount(owner, np.concatenate([weights for _, weights in self.derivatives]))
        values = cells / _DERIVATIVE_CELLS
        levels = {}
        for width in self.kept:
            fitted = np.array(fit_levels(values, energy / energy.sum(), width, _FIT_RESOLUTION))
            nearest = fitted[np.searchsorted((fitted[1:] + fitted[:-1]) / 2, values)]
            if self.local_errors[width]:
                self.errors[width] *= float((energy * (values - nearest) ** 2).sum()) / self.local_errors[width]
            levels[width] = [round(level, 6) for level in fitted.tolist()]
        return levels


class _Study:
    """The measurements of all operators of a model, and the choice that follows from them."""

    def __init__(
        self, config: ActivationQuantizationConfig, widths: Sequence[int], parameters: Sequence[nn.Parameter]
    ) -> None:
        self.config = config
        self.parameters = parameters
        self.energy = 0.0  # squares of their gradients
        self.operators: dict[tuple[str, str], _Operator] = {}  # by module name and kind
        # the operators at every width; the name of the module does not matter where every operator has the same
        # settings
        self.modes = {width: OperatorMode(replace(config, bits=width, levels=None), "") for width in widths}
        self._propagating = False

    @contextmanager
    def measuring(self, model: nn.Module) -> Iterator[None]:
        """Measure every operator that would be quantised; afterwards modules are quantised or not as before."""
        before = {m: m._activation_settings for m in model.modules() if hasattr(m, "_activation_settings")}
        classes = {module: module.__class__ for module in before}
        try:
            quantize_activations(model, replace(self.config, bits=_REFERENCE_WIDTH, levels=None, mlp_tiles=1))
            for module in model.modules():
                if settings := getattr(module, "_activation_settings", None):
                    settings.operators = _MeasuringMode(self, settings.operators.module_name)
            yield
        finally:
            restore_activations(model)
            for module, settings in before.items():
                module.__class__ = classes[module]
                module._activation_settings = settings

    def step(self, loss: Tensor) -> None:
        """Differentiate ``loss`` and measure every operator on the way."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        self.energy += sum(_energy(gradient) for gradient in gradients if gradient is not None)

    def measure(self, module_name: str, kind: str, call: "_Call", grad: Tensor) -> None:
        """Run ``call`` at every width and note the errors of its gradients, given that of its result, ``grad``."""
        if self._propagating:
            return
        operator = self.operators.setdefault((module_name, kind), _Operator())
        exact, _ = call.gradients(grad)
        negligible = 1e-12 * sum(map(_energy, exact))  # exact up to rounding
        for width, mode in self.modes.items():
            actual, kept = call.gradients(grad, mode)
            difference = [a - e for a, e in zip(actual, exact)]
            error = sum(map(_energy, difference))
            operator.kept[width] += kept
            if error > negligible:
                operator.local_errors[width] += error
                operator.errors[width] += self._at_the_parameters(call, difference)
        if kind == "activation" and self.config.rounding == "nearest" and operator.local_errors:
            (derivative,), _ = call.gradients(torch.ones_like(grad))
            if derivative.shape == grad.shape:  # not so for max pooling
                operator.derivatives.append(_histogram(derivative, grad))

    def _at_the_parameters(self, call: "_Call", gradients: Sequence[Tensor]) -> float:
        """Squares of the parameters' gradients that ``gradients`` of the inputs of ``call`` alone amount to."""
        self._propagating = True
        try:
            found = torch.autograd.grad(call.edges, self.parameters, gradients, retain_graph=True, allow_unused=True)
        finally:
            self._propagating = False
        return sum(_energy(gradient) for gradient in found if gradient is not None)

    def solve(
        self, widths: Sequence[int], images: int, budget: int | float | None, target_error: float | None
    ) -> ActivationQuantizationConfig:
        """The configuration with the least error within ``budget``, or the fewest bytes within ``target_error``."""
        # width matters to them
        operators = {key: o for key, o in self.operators.items() if len(set(o.kept.values())) > 1}
        if not operators or not self.energy > 0:
            raise ValueError(
                "No operator of `model` that keeps codes received a gradient; check what is trainable, "
                "`config.skip_modules` and the loss."
            )
        levels = {key: operator.fit() for key, operator in operators.items()}
        fixed = sum(o.kept[_REFERENCE_WIDTH] for key, o in self.operators.items() if key not in operators)
        cost, error, choices = pareto_front(
            np.array([[operator.kept[width] for width in widths] for operator in operators.values()]),
            np.array([[operator.errors[width] for width in widths] for operator in operators.values()]),
        )
        cost = cost + fixed
        relative = np.sqrt(error / self.energy)
        if target_error is not None:
            within = relative <= target_error
            if not within.any():
                raise ValueError(
                    f"`target_error` {target_error} cannot be reached with `widths` {tuple(widths)}: the smallest "
                    f"error is {relative[-1]:.3g}. Allow a larger error or larger widths."
                )
            chosen = choices[within.argmax()]
        else:
            allowed = budget * images
            if isinstance(budget, float):
                allowed = budget * sum(operator.kept[_REFERENCE_WIDTH] for operator in self.operators.values())
            if cost[0] > allowed:
                raise ValueError(
                    f"`budget` {budget} allows {allowed / images:.0f} bytes per image, the smallest of `widths` "
                    f"{tuple(widths)} takes {math.ceil(cost[0] / images)}. Allow more, or smaller widths."
                )
            chosen = choices[np.searchsorted(cost, allowed, side="right") - 1]
        chosen = {key: widths[option] for key, option in zip(operators, chosen)}
        default = self.config.bits if isinstance(self.config.bits, Mapping) else {"default": self.config.bits}
        fitted = {name: levels[name, kind][width] for (name, kind), width in chosen.items() if levels[name, kind]}
        return replace(
            self.config,
            bits={**default, **{f"{name}:{kind}": width for (name, kind), width in chosen.items()}},
            levels=fitted or None,
        )


class _Asked(Exception):
    """A handler asked for the settings of operators of ``kind``, which it does before it computes."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class _MeasuringMode(OperatorMode):
    """Runs the stock operators, and has those measured that keep codes otherwise."""

    def __init__(self, study: _Study, module_name: str) -> None:
        # in tiles, what follows a tile could not be reached
        super().__init__(replace(study.config, mlp_tiles=1), module_name)
        self.study = study

    def quantizer(self, kind: str, channels: int | None = None):
        raise _Asked(kind)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except _Asked as asked:
            kind = asked.kind
        kwargs = kwargs or {}
        call = _Call(func, args, kwargs) if _needs_gradient(args, kwargs) else None
        with DisableTorchFunction():  # the modes of the modules around would measure it again
            result = func(*args, **kwargs)
        if call is not None and result.requires_grad:
            result.register_hook(partial(self._measure, kind, call))
        return result

    def _measure(self, kind: str, call: "_Call", grad: Tensor) -> None:
        self.study.measure(self.module_name, kind, call, grad)


class _Call:
    """A call of an operator that can be repeated: the same values, random numbers and autocast settings.

    Values are copied, since operators and what follows them may write over their arguments.
    """

    def __init__(self, function: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.function = function
        leaves, self.spec = tree_flatten((tuple(args), dict(kwargs)))
        self.places = [id(leaf) for leaf in leaves]  # an argument given twice is one input
        trained = {id(leaf): leaf for leaf in leaves if _needs_gradient(leaf)}
        self.parameters = {key for key, leaf in trained.items() if leaf.is_leaf}
        self.inputs = {k: x.detach() if k in self.parameters else x.detach().clone() for k, x in trained.items()}
        self.edges = [get_gradient_edge(x) for x in trained.values()]
        self.constants = [None if id(leaf) in trained else leaf for leaf in leaves]
        device = next(iter(trained.values())).device
        self.devices = [device] if device.type == "cuda" else []
        self.random_state = torch.cuda.get_rng_state(device) if self.devices else torch.get_rng_state()
        enabled = torch.is_autocast_enabled(device.type)
        self.autocast = (device.type, torch.get_autocast_dtype(device.type) if enabled else None, enabled)

    def gradients(self, grad: Tensor, mode: OperatorMode | None = None) -> tuple[list[Tensor], int]:
        """Gradients of the inputs given that of the result, under ``mode``, and the bytes kept beside arguments."""
        inputs = {key: x.detach().requires_grad_() for key, x in self.inputs.items()}
        with torch.random.fork_rng(self.devices), torch.enable_grad(), torch.autocast(*self.autocast):
            if self.devices:
                torch.cuda.set_rng_state(self.random_state, self.devices[0])
            else:
                torch.set_rng_state(self.random_state)
            # computed, not leaves: operators may write over them, and treat them as activations
            entered = {key: x if key in self.parameters else x.clone() for key, x in inputs.items()}
            leaves = [entered.get(place, constant) for place, constant in zip(self.places, self.constants)]
            args, kwargs = tree_unflatten(leaves, self.spec)
            kept = _Kept(leaves)
            run = self.function if mode is None else partial(mode.run, self.function)
            with kept.counting():
                result = run(*args, **kwargs)
        gradients = torch.autograd.grad(result, list(inputs.values()), grad, allow_unused=True)
        found = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs.values())]
        return found, kept.bytes


class _Kept:
    """Bytes of the tensors that autograd saves, each storage once, without those of ``arguments``."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        self._seen = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, Tensor)}
        self._held: list[Tensor] = []  # so that no address is used twice
        self.bytes = 0

    def counting(self):
        return torch.autograd.graph.saved_tensors_hooks(self._count, lambda x: x)

    def _count(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._held.append(x.detach())
            self.bytes += storage.nbytes()
        return x


def _needs_gradient(*values: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(values))


def _energy(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2


def _histogram(derivative: Tensor, grad: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The cells that values of ``derivative`` fall into, and the sum of ``grad ** 2`` in each."""
    cell = (derivative.double() * _DERIVATIVE_CELLS).round().long().flatten()
    lowest = cell.min()
    energy = torch.bincount(cell - lowest, grad.double().square().flatten()).cpu().numpy()
    (occupied,) = energy.nonzero()
    return occupied + lowest.item(), energy[occupied]


def _base_model(model: nn.Module) -> nn.Module:
    """The model whose module names the result uses, as the tuners do."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(list(devices)):
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def _to_device(batch: Any, device: torch.device) -> Any:
    batch = dict(batch) if isinstance(batch, Mapping) else batch  # what processors return is no plain dict
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def _count_images(batch: Any) -> int:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return len(leaf)
    raise ValueError(f"`batches` must hold tensors whose first dimension is the images, got a {type(batch).__name__}.")


def _loss(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor] | None) -> Tensor:
    if loss is not None:
        value, source = loss(model, batch), "`loss(model, batch)`"
    elif isinstance(batch, Mapping):
        value, source = getattr(model(**batch), "loss", None), "`model(**batch).loss`"
    else:
        raise ValueError(
            f"`batches` must hold dicts of the model's arguments, got a {type(batch).__name__}; for others give "
            "`loss`, a function of the model and a batch."
        )
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ValueError(
            f"{source} must be a scalar tensor that depends on trained parameters, got {_described(value)}; give "
            "`labels` in `batches`, or `loss`, a function of the model and a batch."
        )
    if not torch.isfinite(value):
        raise ValueError(f"{source} must be finite, got {value.item()}; check `batches` and the model's dtype.")
    return value


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"one of shape {tuple(value.shape)} and requires_grad={value.requires_grad}"


def _check_config(config: Any) -> ActivationQuantizationConfig:
    if config is None:
        return ActivationQuantizationConfig()
    if isinstance(config, Mapping):
        return ActivationQuantizationConfig.from_dict(config)
    if not isinstance(config, ActivationQuantizationConfig):
        raise ValueError(
            "`config` must be an ActivationQuantizationConfig, a dict of its arguments or None, got "
            f"{type(config).__name__}."
        )
    return config


def _check_widths(widths: Sequence[int]) -> list[int]:
    chosen = list(widths) if isinstance(widths, Iterable) else []
    if not chosen or any(isinstance(width, bool) or width not in WIDTHS for width in chosen):
        raise ValueError(f"`widths` must be some of {WIDTHS}, got {widths!r}.")
    return sorted(set(chosen))


def _check_goal(budget: Any, target_error: Any) -> None:
    if (budget is None) == (target_error is None):
        raise ValueError(
            f"Exactly one of `budget` and `target_error` must be given, got budget={budget!r} and "
            f"target_error={target_error!r}."
        )
    if target_error is not None:
        if isinstance(target_error, bool) or not isinstance(target_error, (int, float)) or not target_error > 0:
            raise ValueError(f"`target_error` must be a positive number, got {target_error!r}.")
    elif isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise ValueError(
            f"`budget` must be a positive int (bytes per image) or float (fraction of 4 bits), got {budget!r}."
        )
    elif isinstance(budget, float) and budget > 2:
        raise ValueError(
            f"`budget` as a float is a fraction of what 4 bits keep, at most 2, got {budget!r}; give bytes per image "
            "as an int."
        )
