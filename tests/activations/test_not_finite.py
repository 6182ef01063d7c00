"""Numbers that are not finite: steps that stock training would notice as overflown are noticed here too."""

import pytest
import torch
from test_faults import WIDTH, Block
from torch import nn

from peft_s2a import ActivationQuantizationConfig, quantize_activations


VALUES = (float("nan"), float("inf"), -float("inf"), 1e30, 3e38, 1e-42, 0.0)
SETTINGS = {
    "reference": {"backend": "reference"},
    "compiled": {"backend": "compiled"},
    "compiled, tiles": {"backend": "compiled", "mlp_tiles": 2},
}
OPERATORS = {
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "relu": nn.ReLU(),
    "layer norm": nn.LayerNorm(WIDTH, elementwise_affine=False),
    "softmax": nn.Softmax(-1),
    "rms norm": nn.RMSNorm(WIDTH, elementwise_affine=False),
}


def _model(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), Block(), nn.Linear(WIDTH, 3)).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    return model if options is None else quantize_activations(model, options)


def _gradients_are_finite(model, x):
    model.zero_grad()
    model(x).float().square().mean().backward()
    return [p.grad.isfinite().all().item() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_is_skipped_where_stock_skips_it(dtype, setting):
    """As a gradient scaler does: if any gradient is not finite."""
    stock, model = _model(None).to(dtype), _model(SETTINGS[setting]).to(dtype)
    noticed = set()
    for value in VALUES:
        x = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(0))
        x[1, 2, 3] = value
        expected = all(_gradients_are_finite(stock, x.to(dtype)))
        assert all(_gradients_are_finite(model, x.to(dtype))) == expected, value
        noticed.add(expected)
    assert noticed == {True, False}


@pytest.mark.parametrize("setting", ["reference", "compiled"])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_arrives_not_finite_leaves_not_finite(value, name, setting):
    """In the rows where it does in stock, and in no other."""
    found = []
    for options in (None, {**SETTINGS[setting], "bits": 8}):
        operator = nn.Sequential(OPERATORS[name])
        if options is not None:
            quantize_activations(operator, options)
        x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0)).abs().requires_grad_()
        grad = torch.ones(6, WIDTH)
        grad[2, 3] = value
        operator(x * 1.0).backward(grad)
        found.append(x.grad.isfinite().all(-1))
    assert torch.equal(*found) and not found[0][2] and found[0].sum() == 5


@pytest.mark.parametrize("group_size", [10**12, 2**63 - 1, 2**70])
def test_groups_of_absurd_size_are_refused(group_size):
    with pytest.raises(ValueError, match="group_size must be at most"):
        ActivationQuantizationConfig(group_size=group_size)
