"""The operators' benchmark: the versions it times do the same work."""

import kernel_speed
import pytest
import torch
from kernel_speed import OPERATORS, Setting

from peft_s2a.activations.quantizer import Quantizer


@pytest.mark.parametrize("name", OPERATORS)
def test_stock_and_quantised_versions_agree(name):
    operator = OPERATORS[name]
    inputs = tuple(torch.randn(operator.shape(1)).requires_grad_() for _ in range(operator.inputs))
    torch.manual_seed(0)  # of dropout
    expected = operator.stock(*inputs)
    torch.manual_seed(0)
    actual = operator.ours(*inputs, quantizer=Quantizer(bits=8))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    weight = torch.randn_like(expected)
    for ours, exact in zip(torch.autograd.grad(actual, inputs, weight), torch.autograd.grad(expected, inputs, weight)):
        assert torch.cosine_similarity(ours.flatten(), exact.flatten(), 0) > 0.99


def test_rows_hold_times_limits_and_bytes_of_every_version():
    rows = kernel_speed.measure("gelu", 4, Setting(1, 1, "float32"), "cpu", seed=0)
    assert [row["version"] for row in rows] == ["stock", *kernel_speed.backends("cpu")]
    stock, *ours = rows
    assert stock["kept_bytes"] == 4 * 197 * 3072  # the input
    for row in ours:
        assert row["kept_bytes"] == stock["kept_bytes"] / 8
        assert row["forward_seconds"] > 0 and row["backward_seconds"] > 0
        assert row["backward_limit_seconds"] < stock["backward_limit_seconds"]
