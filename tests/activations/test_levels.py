"""Level tables: the derivatives themselves, and the codes that stand for them."""

import numpy as np
import pytest
import torch

from peft_s2a.activations.activation_functions import ACTIVATION_FUNCTIONS
from peft_s2a.activations.codec import WIDTHS
from peft_s2a.activations.levels import code_table, default_levels, fit_levels


SMOOTH = [name for name, function in ACTIVATION_FUNCTIONS.items() if function.pieces is None]
X = np.random.default_rng(0).normal(-0.5, 2, 4000)


@pytest.mark.parametrize("name", SMOOTH)
class TestSmooth:
    def test_derivatives_are_those_of_the_stock_function(self, name):
        function = ACTIVATION_FUNCTIONS[name]
        x = torch.tensor(np.concatenate([X, [-50.0, 50.0, 300.0, -300.0]]), requires_grad=True)
        (expected,) = torch.autograd.grad(function.forward(x).sum(), x)
        np.testing.assert_allclose(function.derivative_numpy(x.detach().numpy()), expected.numpy(), atol=1e-12)
        np.testing.assert_allclose(function.derivative_torch(x.detach()).numpy(), expected.numpy(), atol=1e-12)

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_codes_choose_the_nearest_level(self, name, bits):
        table = code_table(name, (), bits, None, True)
        assert len(table.levels) == 2**bits and len(table.codes) == len(table.thresholds) + 1
        derivative = ACTIVATION_FUNCTIONS[name].derivative_numpy(X)
        levels = np.array(table.levels)
        chosen = levels[np.array(table.codes)[np.searchsorted(table.thresholds, X)]]
        nearest = np.abs(derivative[:, None] - levels).min(1)
        np.testing.assert_allclose(np.abs(chosen - derivative), nearest, atol=1e-6)

    def test_shipped_levels_beat_even_ones(self, name):
        x = np.random.default_rng(1).normal(-1, 1.2, 4000)
        derivative = ACTIVATION_FUNCTIONS[name].derivative_numpy(x)
        for bits in (2, 4):
            even = np.linspace(derivative.min(), derivative.max(), 2**bits)
            errors = [
                np.square(derivative[:, None] - np.array(levels)).min(1).mean()
                for levels in (default_levels(name, (), bits), even)
            ]
            assert errors[0] < errors[1]


class TestTables:
    def test_given_levels_replace_the_shipped_ones(self):
        assert code_table("gelu", (), 1, (0.9, 0.1), False).levels == (0.1, 0.9)
        with pytest.raises(ValueError, match="levels of 'gelu' at 2 bits must be 4 numbers"):
            code_table("gelu", (), 2, (0.0, 1.0), False)

    def test_of_piecewise_linear_functions_are_exact_at_one_bit(self):
        table = code_table("leaky_relu", (("negative_slope", 0.2),), 4, None, False)
        assert (table.bits, table.levels, table.thresholds, table.codes) == (1, (0.2, 1.0), (0.0,), (0, 1))

    def test_for_stochastic_rounding_reach_the_extremes(self):
        derivative = ACTIVATION_FUNCTIONS["gelu"].derivative_numpy(np.linspace(-10, 10, 10_001))
        levels = code_table("gelu", (), 2, None, False, True).levels
        assert levels[0] <= derivative.min() + 1e-6 and levels[-1] >= derivative.max() - 1e-6


class TestFit:
    def test_finds_clusters(self):
        values = np.concatenate([np.full(100, 0.1), np.full(10, 0.5), np.full(50, 0.9), np.full(5, 0.7)])
        np.testing.assert_allclose(fit_levels(values, np.ones_like(values), 2), (0.1, 0.5, 0.7, 0.9), atol=1e-9)

    def test_weights_count(self):
        values, weights = np.array([0.0, 1.0, 2.0, 10.0]), np.array([1.0, 1.0, 100.0, 1.0])
        low, high = fit_levels(values, weights, 1)
        assert abs(low - 201 / 102) < 1e-9 and high == 10

    def test_beats_lloyds_iteration_from_quantiles(self):
        values = np.random.default_rng(0).standard_cauchy(5000).clip(-50, 50)
        ones = np.ones_like(values)
        levels = np.quantile(values, (np.arange(8) + 0.5) / 8)
        for _ in range(200):
            nearest = np.abs(values[:, None] - levels).argmin(1)
            levels = np.array([values[nearest == i].mean() for i in range(8)])
        errors = [
            np.square(values[:, None] - np.array(ls)).min(1).mean() for ls in (fit_levels(values, ones, 3), levels)
        ]
        assert errors[0] <= errors[1] * 1.001
