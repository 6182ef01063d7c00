"""Numbers that are not finite: where results are NaN or infinite in every backend, as `docs/code-format.md` says, and that
steps which stock training would notice as overflown are noticed here too."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from kernel_paths import PATHS, Case, tensors
from test_faults import WIDTH, Block
from torch import nn

from peft_s2a import ActivationQuantizationConfig, quantize_activations
from peft_s2a.activations import operators
from peft_s2a.activations.ops import _declared, op_set
from peft_s2a.activations.quantizer import Quantizer


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


BACKENDS = ["compiled"] + ["triton"] * sys.platform.startswith("linux")
EXTREMES = (float("nan"), -float("nan"), float("inf"), -float("inf"), 1e-42, 1e30, -6e4, 65504.0)


def _walk(backend, name, case, dtype, values=EXTREMES, places=(0.4,)):
    """Every tensor of a path with each of ``values`` at each of ``places``: results are finite in the same elements."""
    path, spoiled = PATHS[name], 0
    for key, value, place in itertools.product(path.shapes(case), values, places):
        if name == "batch norm, live" and key in ("mean", "rstd") and math.isfinite(value):
            # The batch's own statistics are not huge beside ordinary values. If they were, those would come back from their
            # group as the last bits of huge numbers, which differ, and whose squares overflow or not.
            continue
        given = tensors(name, case, dtype)
        given[key].view(-1)[int(place * given[key].numel())] = value
        ours, theirs = (path.run(op_set(each), case, **given) for each in (backend, "reference"))
        for our, their in zip(ours, theirs):
            finite = their.isfinite()
            assert torch.equal(our.isfinite(), finite), (key, value, place)
            spoiled += not finite.all()
    assert spoiled


def test_every_op_lies_on_a_path():
    class Ops:
        def __getattr__(self, op):
            seen.add(op)
            return getattr(op_set("reference"), op)

    seen = set()
    for name, path in PATHS.items():
        path.run(Ops(), Case(), **tensors(name, Case(), torch.float32))
    assert seen == _declared.keys()


@pytest.mark.parametrize("name", PATHS)
def test_backends_agree_on_what_is_finite(name):
    _walk("compiled", name, Case(), torch.float32)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is installed on Linux only")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["steps", "levels", "groups", "heads", "layer norm, by column"])
def test_triton_agrees_on_what_is_finite(name):
    _walk("triton", name, Case(), torch.float32, EXTREMES[:1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree_on_what_is_finite_in_every_setting(dtype, backend, name):
    sizes = ({}, {"count": 70, "dim": 33, "value_dim": 48, "tokens": 20, "keys": 17})
    groups = (8, 16, 12, 128)
    settings = list(zip((1, 2, 3, 4, 8), itertools.cycle(groups), itertools.cycle((None, 5))))
    values, places = EXTREMES, (0, 0.4, 0.99)
    if backend == "triton":  # a launch takes a second in its interpreter
        settings, values, places = settings[1:3], (float("nan"), float("inf")), places[1:2]
    for (bits, group, rounding), size in itertools.product(settings, sizes):
        _walk(backend, name, Case(bits, group, rounding, **size), dtype, values, places)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_group_with_a_value_that_is_not_finite_is_nan_and_no_other(backend, bits):
    """Codes and scales of the others are what they are without it, but for the unit, which it does not share in."""
    case, ops = Case(bits, 8), op_set(backend)
    plain = tensors("groups", case, torch.float32)["x"]
    plain[:, 8:16] = 0  # of no influence on the unit
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        x = plain.clone()
        x[1, 11] = value
        ours, theirs = (PATHS["groups"].run(ops, case, each) for each in (x, plain))
        expected = torch.zeros(3, 40, dtype=torch.bool)
        expected[1, 8:16] = True
        assert torch.equal(ours[2].isnan(), expected)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[2][~expected], theirs[2][~expected])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_largest_numbers_come_back_finite(backend, dtype):
    """Within a step and the rounding of bounds, whatever their signs."""
    largest, case = torch.finfo(dtype).max, Case(4, 8)
    x = torch.linspace(-1, 1, 40).repeat(3, 1)
    x[1] = x[1].abs()
    decoded = PATHS["groups"].run(op_set(backend), case, (x * largest).to(dtype))[2]
    assert (decoded.double() / largest - x).abs().max() < 0.5 * 0.4 / 15 + 1.5 / 127


def test_nan_lies_above_no_threshold():
    x = torch.tensor([float("nan"), -float("nan"), -9.0, 9.0])
    for backend in ("reference", *BACKENDS):
        codes = op_set(backend).encode_steps(x, [-1.0, 1.0], [3, 5, 9], 8)
        levels = op_set(backend).encode_levels(x, [0.0, 0.1, 0.5, 1.0], 8, torch.tensor(3))
        assert codes.tolist() == [3, 3, 3, 9] and levels.tolist() == [0, 0, 0, 3]


# stock function, how many tensors it takes, whether what is not finite reaches the rest of its group of codes
LINE = (3, 24)
STOCK = {
    **{name: (getattr(F, name), 1, False) for name in ("gelu", "silu", "relu", "mish", "hardswish", "sigmoid", "elu")},
    "tanh": (torch.tanh, 1, False),
    "layer_norm": (lambda x: F.layer_norm(x, (24,)), 1, False),
    "rms_norm": (lambda x: F.rms_norm(x, (24,)), 1, False),
    "softmax": (lambda x: F.softmax(x, -1), 1, False),
    "normalize": (lambda x: F.normalize(x, dim=-1), 1, False),
    "multiply": (torch.mul, 2, True),
    "matmul": (lambda a, b: a @ b.mT, 2, True),
}


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("backend", ["reference", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_are_not_finite_where_stocks_are_and_at_most_in_their_group(dtype, backend, name):
    function, count, in_groups = STOCK[name]
    quantizer = Quantizer(backend=backend, group_size=8)
    ours = {
        "layer_norm": lambda x: operators.layer_norm(x, (24,), quantizer=quantizer),
        "rms_norm": lambda x: operators.rms_norm(x, (24,), quantizer=quantizer),
        "softmax": lambda x: operators.softmax(x, -1, quantizer=quantizer),
        "normalize": lambda x: operators.normalize(x, quantizer=quantizer),
        "multiply": lambda a, b: operators.multiply(a, b, quantizer=quantizer),
        "matmul": lambda a, b: operators.matmul(a, b.mT, quantizer=quantizer),
    }.get(name, lambda x: operators.activation(x, name, quantizer=quantizer))
    # products of a number that is nearly too large are too large or not, as codes are rounded
    for value in EXTREMES[:6] if name == "matmul" else EXTREMES:
        found = []
        for each in (function, ours):
            generator = torch.Generator().manual_seed(0)
            inputs = [torch.randn(LINE, generator=generator).to(dtype) for _ in range(count)]
            inputs[0][1, 11] = value
            inputs = [x.requires_grad_() for x in inputs]
            # computed from something trained, as codes are kept of activations alone
            y = each(*(x * 1.0 for x in inputs)) * 2
            y.square().sum().backward()
            found.append([~x.grad.isfinite() for x in inputs])
        for stock, own in zip(*found):
            spread = stock.view(3, 3, 8).any(-1, keepdim=True).expand(3, 3, 8).reshape(LINE) if in_groups else stock
            if name == "hardswish":  # stock writes a 0 where the slope is 0, whatever arrives
                spread = spread | ~y.isfinite()
            assert (own | ~stock).all() and (spread | ~own).all(), value
