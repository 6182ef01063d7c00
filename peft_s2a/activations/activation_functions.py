"""The activation functions that can be quantised: the stock computation, and the derivative that is coded.

Smooth functions have a derivative, coded by level tables (`levels`). Piecewise-linear ones have two slopes and are
coded exactly by one bit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


_NUMPY = SimpleNamespace(
    exp=np.exp, tanh=np.tanh, erf=np.vectorize(math.erf, otypes=[float]), where=np.where, log1p=np.log1p, clip=np.clip
)
_TORCH = SimpleNamespace(
    exp=torch.exp, tanh=torch.tanh, erf=torch.erf, where=torch.where, log1p=torch.log1p, clip=torch.clip
)


@dataclass(frozen=True)
class ActivationFunction:
    """One activation function.

    Attributes:
        forward: the stock computation, ``forward(x, **params)``.
        forward_: the same written over its input, or None when the stock library has no such form.
        params: the parameters and their defaults.
        derivative: ``derivative(x, m, **params)`` with ``m`` a namespace of elementwise functions (NumPy's or
            torch's), or None for piecewise-linear functions.
        pieces: for piecewise-linear functions, ``pieces(**params) -> (breaks, slopes)``: ``slopes[i]`` holds up to
            ``breaks[i]``, each break being ``(position, whether the position belongs to the piece on its right)``.
        backward: the stock library's ``backward(grad, x, **params)`` in one pass, where it has one.
    """

    forward: Callable[..., torch.Tensor]
    forward_: Callable[..., torch.Tensor] | None = None
    params: dict[str, Any] = field(default_factory=dict)
    derivative: Callable[..., Any] | None = None
    pieces: Callable[..., tuple[tuple[tuple[float, bool], ...], tuple[float, ...]]] | None = None
    backward: Callable[..., torch.Tensor] | None = None

    def derivative_numpy(self, x: np.ndarray, **params: Any) -> np.ndarray:
        """f'(x) in float64."""
        with np.errstate(over="ignore"):
            return self.derivative(x, _NUMPY, **{**self.params, **params})

    def derivative_torch(self, x: torch.Tensor, **params: Any) -> torch.Tensor:
        """f'(x) in the dtype of x."""
        return self.derivative(x, _TORCH, **{**self.params, **params})

    def gradient(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """grad * f'(x) of a smooth function with its default parameters."""
        return grad * self.derivative_torch(x) if self.backward is None else self.backward(grad, x)


def _sigmoid(x, m):
    return 0.5 * (1 + m.tanh(0.5 * x))


def _gelu(x, m):
    return 0.5 * (1 + m.erf(x * 0.5**0.5)) + x * m.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh(x, m):
    x = m.clip(x, -30, 30)  # the derivative is constant long before; keeps the cube finite
    slope = math.sqrt(2 / math.pi)
    t = m.tanh(slope * (x + 0.044715 * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope * (1 + 3 * 0.044715 * x * x)


def _scaled_silu(scale):
    def derivative(x, m):
        s = _sigmoid(scale * x, m)
        return s + scale * x * s * (1 - s)

    return derivative


def _mish(x, m):
    x = m.clip(x, -80, 80)
    softplus = m.where(x > 20, x, m.log1p(m.exp(m.clip(x, -80, 20))))
    t = m.tanh(softplus)
    return t + x * (1 - t * t) * _sigmoid(x, m)


def _hardswish(x, m):
    return m.where(x < -3, 0.0 * x, m.where(x <= 3, x / 3 + 0.5, 0.0 * x + 1))


def _tanh(x, m):
    t = m.tanh(x)
    return 1 - t * t


def _sigmoid_derivative(x, m):
    s = _sigmoid(x, m)
    return s * (1 - s)


def _elu(x, m, alpha):
    return m.where(x > 0, 0.0 * x + 1, alpha * m.exp(m.clip(x, -1e4, 0)))


def _selu(x, m):
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return scale * _elu(x, m, alpha)


def _celu(x, m, alpha):
    return m.where(x > 0, 0.0 * x + 1, m.exp(m.clip(x / alpha, -1e4, 0)))


def _softplus(x, m, beta, threshold):
    return m.where(x * beta > threshold, 0.0 * x + 1, _sigmoid(beta * x, m))


def _logsigmoid(x, m):
    return _sigmoid(-x, m)


def _quick_gelu_forward(x):
    return x * torch.sigmoid(1.702 * x)


def _clipped(low, high, slope=1.0):
    return ((low, False), (high, True)), (0.0, slope, 0.0)


def _shrunk(lambd):
    return ((-lambd, True), (lambd, False)), (1.0, 0.0, 1.0)


ACTIVATION_FUNCTIONS: dict[str, ActivationFunction] = {
    "gelu": ActivationFunction(F.gelu, torch.ops.aten.gelu_, derivative=_gelu, backward=torch.ops.aten.gelu_backward),
    "gelu_tanh": ActivationFunction(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
        derivative=_gelu_tanh,
    ),
    "quick_gelu": ActivationFunction(_quick_gelu_forward, derivative=_scaled_silu(1.702)),
    "silu": ActivationFunction(
        F.silu,
        lambda x: F.silu(x, inplace=True),
        derivative=_scaled_silu(1.0),
        backward=torch.ops.aten.silu_backward,
    ),
    "mish": ActivationFunction(F.mish, lambda x: F.mish(x, inplace=True), derivative=_mish),
    "hardswish": ActivationFunction(F.hardswish, lambda x: F.hardswish(x, inplace=True), derivative=_hardswish),
    "tanh": ActivationFunction(torch.tanh, torch.tanh_, derivative=_tanh),
    "sigmoid": ActivationFunction(torch.sigmoid, torch.sigmoid_, derivative=_sigmoid_derivative),
    "elu": ActivationFunction(F.elu, F.elu_, {"alpha": 1.0}, derivative=_elu),
    "selu": ActivationFunction(F.selu, F.selu_, derivative=_selu),
    "celu": ActivationFunction(F.celu, F.celu_, {"alpha": 1.0}, derivative=_celu),
    "softplus": ActivationFunction(F.softplus, None, {"beta": 1.0, "threshold": 20.0}, derivative=_softplus),
    "logsigmoid": ActivationFunction(F.logsigmoid, derivative=_logsigmoid),
    "relu": ActivationFunction(F.relu, F.relu_, pieces=lambda: (((0.0, False),), (0.0, 1.0))),
    "relu6": ActivationFunction(F.relu6, lambda x: F.relu6(x, inplace=True), pieces=lambda: _clipped(0.0, 6.0)),
    "leaky_relu": ActivationFunction(
        F.leaky_relu,
        F.leaky_relu_,
        {"negative_slope": 0.01},
        pieces=lambda negative_slope: (((0.0, False),), (negative_slope, 1.0)),
    ),
    "hardtanh": ActivationFunction(
        F.hardtanh,
        F.hardtanh_,
        {"min_val": -1.0, "max_val": 1.0},
        pieces=lambda min_val, max_val: _clipped(min_val, max_val),
    ),
    "hardsigmoid": ActivationFunction(
        F.hardsigmoid, lambda x: F.hardsigmoid(x, inplace=True), pieces=lambda: _clipped(-3.0, 3.0, 1 / 6)
    ),
    "hardshrink": ActivationFunction(F.hardshrink, None, {"lambd": 0.5}, pieces=lambda lambd: _shrunk(lambd)),
    "softshrink": ActivationFunction(F.softshrink, None, {"lambd": 0.5}, pieces=lambda lambd: _shrunk(lambd)),
}


def activation_function(name: str) -> ActivationFunction:
    """The activation function called ``name``; ValueError when there is none."""
    try:
        return ACTIVATION_FUNCTIONS[name]
    except KeyError:
        raise ValueError(
            f"unknown activation function {name!r}; it can be one of {', '.join(sorted(ACTIVATION_FUNCTIONS))}"
        ) from None
