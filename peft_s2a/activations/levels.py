"""Level tables: which 2^b values stand for the derivative of an activation function, and for which inputs.

The levels minimise the mean squared error of the derivative over the distribution of inputs (Lloyd, "Least squares
quantization in PCM", 1982; Max, "Quantizing for minimum distortion", 1960); fitting them to the function is the idea
of fewbit (Novikov et al., "Few-bit backward", 2022), which cuts the *input* axis into 2^b intervals. Here the
*derivative's* axis is cut, so intervals on both sides of a hump share a level. The forward pass never computes the
derivative: the code is a step function of the input, given by the thresholds at which it changes.

``python -m peft_s2a.activations.levels`` fits the tables shipped in ``levels.json`` anew.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch

from .activation_functions import ACTIVATION_FUNCTIONS, ActivationFunction, activation_function
from .codec import WIDTHS


_SHIPPED = Path(__file__).with_name("levels.json")
_EDGE = 1e4  # beyond it every supported derivative is constant


@dataclass(frozen=True)
class CodeTable:
    """The code of an input x is ``codes[number of thresholds below x]``; its derivative is ``levels[code]``.

    ``bits`` is the width of a code, ``thresholds`` ascend, ``len(codes) == len(thresholds) + 1``.
    """

    bits: int
    thresholds: tuple[float, ...]
    codes: tuple[int, ...]
    levels: tuple[float, ...]


@torch.compiler.assume_constant_result  # tables are data to a compiled graph; their making is not traced
def code_table(
    name: str,
    params: tuple[tuple[str, float], ...],
    bits: int,
    levels: tuple[float, ...] | None,
    double: bool,
    stochastic: bool = False,
) -> CodeTable:
    """The table of activation function ``name`` with ``params`` (name, value) at ``bits`` bits.

    ``levels`` (2^bits derivative values) replace the shipped ones. Piecewise-linear functions are exact at one bit,
    whatever ``bits`` and ``levels`` say. ``double``: inputs are compared in float64, otherwise in float32.
    ``stochastic``: the outermost levels are moved to the extremes of the derivative, without which stochastic rounding
    would be biased there.
    """
    return _code_table(name, params, bits, levels, double, stochastic)


@cache
def _code_table(name, params, bits, levels, double, stochastic) -> CodeTable:
    function = activation_function(name)
    if unknown := set(dict(params)) - set(function.params):
        raise ValueError(
            f"activation function {name!r} takes the parameters {sorted(function.params)}, not {sorted(unknown)}"
        )
    if function.pieces is not None:
        return _exact_table(function, dict(params), np.float64 if double else np.float32)
    if levels is None:
        levels = default_levels(name, params, bits)
    elif len(levels) != 2**bits:
        raise ValueError(f"levels of {name!r} at {bits} bits must be {2**bits} numbers, not {len(levels)}")
    levels = tuple(sorted(levels))
    if stochastic:
        extremes = function.derivative_numpy(_grid(), **dict(params))
        levels = (min(levels[0], float(extremes.min())), *levels[1:-1], max(levels[-1], float(extremes.max())))
    thresholds, codes = _thresholds(lambda x: function.derivative_numpy(x, **dict(params)), levels)
    return CodeTable(bits, thresholds, codes, levels)


def default_levels(name: str, params: tuple[tuple[str, float], ...], bits: int) -> tuple[float, ...]:
    """The shipped levels for the function's default parameters; fitted on the spot for others."""
    function = activation_function(name)
    if all(function.params[key] == value for key, value in params) and (shipped := _shipped().get(name)):
        return tuple(shipped[str(bits)])
    x, weight = _inputs()
    return fit_levels(function.derivative_numpy(x, **dict(params)), weight, bits)


def fit_levels(values: np.ndarray, weights: np.ndarray, bits: int, resolution: int = 1024) -> tuple[float, ...]:
    """The 2^bits ascending levels with the least weighted squared error to ``values`` (1-D arrays of equal length).

    Globally optimal on a histogram of ``resolution`` cells (dynamic programming over cell boundaries), then refined on
    the values themselves by Lloyd's iteration.
    """
    values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    count = 2**bits
    low, high = values.min(), values.max()
    if high - low < 1e-12:
        return tuple(low + 1e-6 * np.arange(count))
    cell = np.minimum(((values - low) / (high - low) * resolution).astype(np.int32), resolution - 1)
    sums = [np.concatenate([[0.0], np.cumsum(np.bincount(cell, weights * values**p, resolution))]) for p in range(3)]
    mass, first, second = (s[None, :] - s[:, None] for s in sums)  # of cells i..j-1 at [i, j]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(mass > 0, second - first**2 / mass, 0.0)
    cost = np.where(
        np.arange(resolution + 1)[:, None] <= np.arange(resolution + 1)[None, :], np.maximum(cost, 0), np.inf
    )
    best, cuts = cost[0], []
    for _ in range(count - 1):
        total = best[:, None] + cost
        cuts.append(total.argmin(0))
        best = total.min(0)
    edges = [resolution]
    for cut in reversed(cuts):
        edges.insert(0, cut[edges[0]])
    edges = np.array([0, *edges])
    inside, centres = mass[edges[:-1], edges[1:]], low + (high - low) * (edges[1:] + edges[:-1]) / (2 * resolution)
    levels = np.sort(np.where(inside > 0, first[edges[:-1], edges[1:]] / np.where(inside > 0, inside, 1), centres))
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    mass, first = (np.concatenate([[0.0], np.cumsum(w)]) for w in (weights, weights * values))
    for _ in range(100):
        cut = np.concatenate([[0], np.searchsorted(values, (levels[1:] + levels[:-1]) / 2), [len(values)]])
        inside = np.diff(mass[cut])
        levels = np.where(inside > 0, np.diff(first[cut]) / np.where(inside > 0, inside, 1), levels)
    return tuple(float(level) for level in np.sort(levels))


def _thresholds(derivative, levels: Sequence[float]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The inputs at which the nearest level changes, and the code of every interval between them."""
    midpoints = (np.array(levels[1:]) + np.array(levels[:-1])) / 2

    def code(x):
        return np.searchsorted(midpoints, derivative(x))

    grid = _grid()
    codes = code(grid)
    (changes,) = np.nonzero(codes[1:] != codes[:-1])
    left, right = grid[changes], grid[changes + 1]
    for _ in range(60):
        middle = (left + right) / 2
        is_left = code(middle) == codes[changes]
        left, right = np.where(is_left, middle, left), np.where(is_left, right, middle)
    return tuple(left.tolist()), tuple(int(c) for c in np.concatenate([codes[:1], codes[changes + 1]]))


def _grid() -> np.ndarray:
    positive = np.geomspace(1e-4, _EDGE, 20_000)
    return np.concatenate([-positive[::-1], [0.0], positive])


def _exact_table(function: ActivationFunction, params: dict[str, float], dtype: type) -> CodeTable:
    breaks, slopes = function.pieces(**{**function.params, **params})
    levels = tuple(sorted(set(slopes)))
    if len(levels) == 1:
        return CodeTable(1, (), (0,), levels * 2)
    # "x > threshold" takes the piece on the right; a position that belongs to it is moved down by one float
    thresholds = tuple(
        float(np.nextafter(dtype(position), dtype(-np.inf)) if inclusive else dtype(position))
        for position, inclusive in breaks
    )
    return CodeTable(1, thresholds, tuple(levels.index(slope) for slope in slopes), levels)


def _inputs() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and their weights: the distribution that the shipped levels are fitted to, a normal one with the mean
    (-1) and about the deviation (1.2) of the pre-activations in DINOv2-small's MLPs."""
    x = np.linspace(-8, 8, 16_001)
    return x, np.exp(-0.5 * ((x + 1) / 1.2) ** 2)


@lru_cache(maxsize=1)
def _shipped() -> dict[str, dict[str, list[float]]]:
    return json.loads(_SHIPPED.read_text()) if _SHIPPED.exists() else {}


def main() -> None:
    x, weight = _inputs()
    tables = {
        name: {
            str(bits): [round(level, 6) for level in fit_levels(function.derivative_numpy(x), weight, bits)]
            for bits in WIDTHS
        }
        for name, function in sorted(ACTIVATION_FUNCTIONS.items())
        if function.derivative is not None
    }
    _SHIPPED.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
