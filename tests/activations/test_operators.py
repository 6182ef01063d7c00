"""Every quantised operator against the stock one."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_s2a.activations import codec, operators
from peft_s2a.activations.activation_functions import ACTIVATION_FUNCTIONS
from peft_s2a.activations.quantizer import ROUNDINGS, Quantizer


def randn(*shape: int, dtype=torch.float32, grad: bool = True) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def attention_inputs(dtype, batch=2, length=7, keys=9, dim=16):
    return [randn(batch, n, 3, dim, dtype=dtype).transpose(1, 2) for n in (length, keys, keys)]


class Case:
    """One operator: its inputs, the quantised call and the stock call."""

    def __init__(self, inputs, quantized, stock):
        self.inputs, self.quantized, self.stock = inputs, quantized, stock


def _gated(dtype, batch):
    inputs = [randn(batch, 7, 20, dtype=dtype), randn(batch, 7, 20, dtype=dtype)]
    return Case(
        inputs, lambda g, u, q: operators.gated_activation(g, u, "silu", quantizer=q), lambda g, u: F.silu(g) * u
    )


def _norm(name, x_shape, parameter_shape, *middle, bias=True):
    def case(dtype, batch):
        parameters = [randn(*parameter_shape, dtype=dtype) for _ in range(2 if bias else 1)]
        x = randn(batch, *x_shape, dtype=dtype)
        quantized, stock = getattr(operators, name), getattr(F, name)
        return Case(
            [x, *parameters], lambda *a: quantized(a[0], *middle, *a[1:-1], quantizer=a[-1]),
            lambda *a: stock(a[0], *middle, *a[1:]),
        )  # fmt: skip

    return case


def _batch_norm(live):
    def case(dtype, batch):
        statistics = [torch.randn(5, dtype=dtype), torch.rand(5, dtype=dtype) + 0.5]

        def call(function):
            return lambda x, w, b, **k: function(x, *(s.clone() for s in statistics), w, b, live, **k)

        inputs = [randn(batch, 5, 6, 3, dtype=dtype), randn(5, dtype=dtype), randn(5, dtype=dtype)]
        return Case(inputs, lambda *a: call(operators.batch_norm)(*a[:3], quantizer=a[3]), call(F.batch_norm))

    return case


def _attention(mask=None, **options):
    def case(dtype, batch):
        inputs = attention_inputs(dtype, batch)
        if mask == "boolean":
            options["attn_mask"] = torch.rand(batch, 1, 7, 9) > 0.3
        elif mask == "additive":
            inputs.append(randn(3, 7, 9, dtype=dtype))
        elif mask == "per sample":
            inputs.append(randn(batch, 1, 1, 9, dtype=dtype))
        return Case(
            inputs,
            lambda *a: operators.scaled_dot_product_attention(*a[:-1], **options, quantizer=a[-1]),
            lambda *a: F.scaled_dot_product_attention(*a, **options),
        )

    return case


def _attention_in_blocks(mask=None, **options):
    """Of [samples, heads, blocks, tokens, channels], as in NesT and MaxViT."""

    def case(dtype, batch):
        inputs = [x[:, :, None] * randn(1, 1, 4, 1, 1, dtype=dtype) for x in attention_inputs(dtype, batch)]
        if mask == "additive":
            inputs.append(randn(4, 7, 9, dtype=dtype))
        return Case(
            inputs,
            lambda *a: operators.scaled_dot_product_attention(*a[:-1], **options, quantizer=a[-1]),
            lambda *a: F.scaled_dot_product_attention(*a, **options),
        )

    return case


def _simple(name, *shapes, **options):
    def case(dtype, batch):
        inputs = [randn(*((batch, *s[1:]) if s[0] == "batch" else s), dtype=dtype) for s in shapes]
        quantized, stock = getattr(operators, name), getattr(F, name)
        return Case(inputs, lambda *a: quantized(*a[:-1], **options, quantizer=a[-1]), lambda *a: stock(*a, **options))

    return case


def _add_product(shape_x, shape_a, shape_b, **options):
    def case(dtype, batch):
        inputs = [
            randn(*(batch if size == "batch" else size for size in s), dtype=dtype)
            for s in (shape_x, shape_a, shape_b)
        ]
        return Case(
            inputs, lambda x, a, b, q: operators.add_product(x, 2 * a, 2 * b, **options, quantizer=q),
            lambda x, a, b: torch.addcmul(x, 2 * a, 2 * b, **options),
        )  # fmt: skip

    return case


def _grid_sample(height=5, width=6, channels_last=False, grid=True, **options):
    def case(dtype, batch):
        x, places = randn(batch, 20, 8, 9, dtype=dtype), randn(batch, height, width, 2, dtype=dtype, grad=grid)

        def read(x, sample, *args):
            x = (2 * x).to(memory_format=torch.channels_last if channels_last else torch.preserve_format)
            return sample(x, args[0] if grid else places, **{"mode": "bilinear", "padding_mode": "zeros", **options})

        def quantized(x, *rest):
            *args, q = rest
            return read(x, functools.partial(operators.grid_sample, quantizer=q), *args)

        return Case([x, places] if grid else [x], quantized, lambda x, *args: read(x, F.grid_sample, *args))

    return case


def _amax(*shape, ties=False, **options):
    def case(dtype, batch):
        x = randn(batch, *shape, dtype=dtype, grad=False)
        x = (x.round() if ties else x).requires_grad_()
        return Case([x], lambda x, q: operators.amax(2 * x, **options), lambda x: torch.amax(2 * x, **options))

    return case


CASES = {
    "layer_norm": _norm("layer_norm", (7, 20), (20,), (20,)),
    "layer_norm over two dimensions": _norm("layer_norm", (7, 20), (7, 20), (7, 20)),
    "rms_norm": _norm("rms_norm", (7, 20), (20,), (20,), bias=False),
    "group_norm": _norm("group_norm", (6, 5, 3), (6,), 2),
    "batch_norm live": _batch_norm(True),
    "batch_norm frozen": _batch_norm(False),
    "softmax": _simple("softmax", ("batch", 5, 9), dim=-1),
    "softmax over another dimension": _simple("softmax", ("batch", 5, 9), dim=1),
    "gated_activation": _gated,
    "attention": _attention(),
    "attention scaled": _attention(scale=0.7),
    "attention boolean mask": _attention("boolean"),
    "attention additive mask": _attention("additive"),
    "attention mask per sample": _attention("per sample"),
    "attention causal": _attention(is_causal=True),
    "attention in blocks": _attention_in_blocks(),
    "attention in blocks, additive mask": _attention_in_blocks("additive"),
    "attention in blocks, causal": _attention_in_blocks(is_causal=True),
    "add_product": _add_product(("batch", 7, 20), ("batch", 7, 20), ("batch", 7, 20)),
    "add_product broadcast": _add_product((20,), (1, 1, 20), ("batch", 7, 20), value=-0.5),
    "grid_sample": _grid_sample(align_corners=False),
    "grid_sample channels last": _grid_sample(channels_last=True, align_corners=True, padding_mode="border"),
    "grid_sample bicubic": _grid_sample(mode="bicubic", align_corners=False, padding_mode="reflection"),
    "linear": _simple("linear", ("batch", 7, 20), (11, 20), (11,)),
    "conv2d": _simple("conv2d", ("batch", 4, 9, 8), (6, 2, 3, 3), (6,), stride=2, padding=1, groups=2),
}
EXACT = {
    "amax": _amax(4, 7, 20, dim=(1, 3)),
    "amax that keeps the dimension": _amax(7, 20, dim=(-2,), keepdim=True),
    "amax of all": _amax(7, 20),
    "amax of ties": _amax(9, 20, dim=(1,), ties=True),
    "grid_sample nearest": _grid_sample(mode="nearest", align_corners=False),
    "grid_sample at fixed places": _grid_sample(grid=False, align_corners=False),
    "max_pool2d": _simple("max_pool2d", ("batch", 3, 9, 8), kernel_size=3, stride=2, padding=1),
    "max_pool2d ceil": _simple("max_pool2d", ("batch", 3, 9, 8), kernel_size=(2, 3), ceil_mode=True),
    "max_pool2d dilated": _simple("max_pool2d", ("batch", 3, 11, 12), kernel_size=3, stride=1, dilation=2),
    "max_pool2d large": _simple("max_pool2d", ("batch", 3, 17, 20), kernel_size=5, padding=2),
    **{
        name: lambda dtype, batch, name=name: Case(
            [randn(batch, 7, 20, dtype=dtype)],
            lambda x, q: operators.activation(4 * x, name, quantizer=q),
            lambda x: ACTIVATION_FUNCTIONS[name].forward(4 * x),
        )
        for name, function in ACTIVATION_FUNCTIONS.items()
        if function.pieces is not None
    },
}
SMOOTH = {
    name: lambda dtype, batch, name=name: Case(
        [randn(batch, 7, 20, dtype=dtype)],
        lambda x, q: operators.activation(x, name, quantizer=q),
        ACTIVATION_FUNCTIONS[name].forward,
    )
    for name, function in ACTIVATION_FUNCTIONS.items()
    if function.pieces is None
}
ALL = {**CASES, **EXACT, **SMOOTH}


def gradients(output: Tensor, inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output.dtype)
    return torch.autograd.grad(output, inputs, grad, materialize_grads=True)


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    ours, theirs = (torch.cat([t.double().flatten() for t in ts]) for ts in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()


def _norm_scale_cosine(samples: int, tokens: int, backend: str) -> float:
    """How well the gradient of a LayerNorm's scale agrees with the stock one, where the first token of every sample has
    an outlying channel and a level of its own."""
    draw = torch.Generator().manual_seed(1000 * samples + tokens)
    deviations, means = torch.randn(64, generator=draw).exp(), 2 * torch.randn(64, generator=draw)
    x = torch.randn(samples, tokens, 64, generator=draw) * deviations + means
    x[:, 0] += torch.randn(64, generator=draw) * deviations
    x[:, 0, 3] += 60
    weight, grad = torch.ones(64, requires_grad=True), torch.randn(samples, tokens, 64, generator=draw)
    (theirs,) = torch.autograd.grad(F.layer_norm(x, (64,), weight), weight, grad)
    ours = operators.layer_norm(x, (64,), weight, quantizer=Quantizer(backend=backend))
    return F.cosine_similarity(torch.autograd.grad(ours, weight, grad)[0], theirs, 0).item()


@pytest.fixture
def lossless(monkeypatch):
    """Codes that are the values themselves, so that what is left is the operators' own derivative."""
    monkeypatch.setattr(codec, "encode_groups", lambda x, *_: (x.clone(), x.new_empty(x.shape[0], 0)))
    monkeypatch.setattr(codec, "decode_groups", lambda packed, *_: packed.clone())


class TestDerivatives:
    @pytest.mark.parametrize("name", CASES)
    def test_are_the_stock_ones_in_float64_when_codes_lose_nothing(self, name, lossless):
        case = CASES[name](torch.float64, 3)
        ours = gradients(case.quantized(*case.inputs, Quantizer(backend="reference")), case.inputs)
        theirs = gradients(case.stock(*case.inputs), case.inputs)
        for a, b in zip(ours, theirs):
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("name", EXACT)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_of_masks_and_indices_are_exact(self, name, dtype):
        case = EXACT[name](dtype, 3)
        ours = gradients(case.quantized(*case.inputs, Quantizer(bits=1)), case.inputs)
        theirs = gradients(case.stock(*case.inputs), case.inputs)
        for a, b in zip(ours, theirs):
            low = dtype == torch.bfloat16  # windows overlap: their sums round
            torch.testing.assert_close(a, b, rtol=2e-2 if low else 1e-6, atol=2e-2 if low else 1e-6)

    @pytest.mark.parametrize("name", {**CASES, **SMOOTH})
    @pytest.mark.parametrize("backend", ["reference", "auto"])
    def test_come_closer_with_more_bits(self, name, backend):
        case = ALL[name](torch.float32, 4)
        theirs = gradients(case.stock(*case.inputs), case.inputs)
        errors = [
            relative_error(
                gradients(
                    case.quantized(*case.inputs, Quantizer(bits=bits, group_size=16, backend=backend)), case.inputs
                ),
                theirs,
            )
            for bits in (1, 2, 4, 8)
        ]
        if name == "batch_norm frozen":  # of its gradients only the weight's comes from codes
            assert errors[2] < 0.1 and errors[3] < 0.01
        else:
            assert errors[3] < 0.02 and errors[3] < 0.3 * errors[2] and errors[2] < 0.3 and errors[2] < errors[1]

    def test_of_breaks_belong_to_the_stock_side(self):
        for name, positions in {
            "relu": [0.0], "relu6": [0.0, 6.0], "hardtanh": [-1.0, 1.0], "hardsigmoid": [-3.0, 3.0], "leaky_relu": [0.0],
            "hardshrink": [-0.5, 0.5], "softshrink": [-0.5, 0.5],
        }.items():  # fmt: skip
            x = torch.tensor(positions, requires_grad=True)
            (ours,) = torch.autograd.grad(operators.activation(x, name, quantizer=Quantizer()).sum(), x)
            (theirs,) = torch.autograd.grad(ACTIVATION_FUNCTIONS[name].forward(x).sum(), x)
            assert torch.equal(ours, theirs), name

    def test_follow_the_parameters_of_the_function(self):
        for name, params in (
            ("elu", {"alpha": 2.0}),
            ("softplus", {"beta": 3.0}),
            ("leaky_relu", {"negative_slope": 0.3}),
        ):
            x = randn(500)
            ours = gradients(operators.activation(x, name, quantizer=Quantizer(bits=8), **params), [x])
            assert relative_error(ours, gradients(getattr(F, name)(x, **params), [x])) < 0.02

    @pytest.mark.parametrize("backend", ["reference", "auto"])
    @pytest.mark.parametrize(
        ("samples", "tokens"), [(1, 197), (2, 49), (3, 50), (64, 50), (127, 197), (128, 49), (128, 50), (128, 197)]
    )
    def test_of_norm_scales_with_a_special_token(self, samples, tokens, backend):
        assert _norm_scale_cosine(samples, tokens, backend) > 0.995

    @pytest.mark.slow
    @pytest.mark.parametrize("tokens", [49, 50, 197])
    def test_of_norm_scales_with_a_special_token_for_every_batch_size(self, tokens):
        for samples in range(1, 257):
            assert _norm_scale_cosine(samples, tokens, "auto") > 0.995, samples

    def test_reach_only_who_needs_them(self):
        x, weight, bias = randn(3, 8), randn(8), randn(8)
        for wanted in ([x], [weight], [bias], [x, bias]):
            for t in (x, weight, bias):
                t.requires_grad_(any(t is w for w in wanted))
            y = operators.layer_norm(x, (8,), weight, bias, quantizer=Quantizer(bits=8))
            stock = F.layer_norm(x, (8,), weight, bias)
            assert relative_error(gradients(y, wanted), gradients(stock, wanted)) < 0.01


class TestForward:
    @pytest.mark.parametrize("backend", ["reference", "auto"])
    @pytest.mark.parametrize("name", ALL)
    def test_is_the_stock_operator_bit_for_bit(self, name, backend):
        case = ALL[name](torch.float32, 3)
        assert torch.equal(case.quantized(*case.inputs, Quantizer(backend=backend)), case.stock(*case.inputs))

    @pytest.mark.parametrize("name", ALL)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_and_gradients_work_in_half_precision(self, name, dtype):
        case = ALL[name](dtype, 3)
        y, stock = case.quantized(*case.inputs, Quantizer(bits=8)), case.stock(*case.inputs)
        assert y.dtype == stock.dtype and torch.equal(y, stock)
        ours, theirs = gradients(y, case.inputs), gradients(stock, case.inputs)
        assert all(a.dtype == b.dtype for a, b in zip(ours, theirs)) and relative_error(ours, theirs) < 0.05

    @pytest.mark.parametrize("name", ["layer_norm", "attention", "linear", "gelu", "conv2d", "softmax"])
    def test_and_gradients_work_under_autocast(self, name):
        case = ALL[name](torch.float32, 3)
        with torch.autocast("cpu", torch.bfloat16):
            y, stock = case.quantized(*case.inputs, Quantizer(bits=8)), case.stock(*case.inputs)
        assert y.dtype == stock.dtype and torch.equal(y, stock)
        ours, theirs = gradients(y, case.inputs), gradients(stock, case.inputs)
        assert all(a.dtype == b.dtype for a, b in zip(ours, theirs)) and relative_error(ours, theirs) < 0.05

    @pytest.mark.parametrize("name", sorted(set(ALL) - {"batch_norm live", "amax of all"}))
    def test_and_gradients_work_on_empty_batches(self, name):
        case = ALL[name](torch.float32, 0)
        ours, theirs = (
            gradients(y, case.inputs) for y in (case.quantized(*case.inputs, Quantizer()), case.stock(*case.inputs))
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))

    def test_in_place_writes_over_the_input(self):
        for name, function in ACTIVATION_FUNCTIONS.items():
            if function.forward_ is None:
                continue
            leaf = randn(100)
            x = leaf * 2
            expected = function.forward(leaf * 2)
            y = operators.activation(x, name, quantizer=Quantizer(), inplace=True)
            assert y.data_ptr() == x.data_ptr() and torch.equal(y, expected), name
            assert relative_error(gradients(y, [leaf]), gradients(expected, [leaf])) < 0.2

    def test_in_place_refuses_an_input_that_somebody_kept(self):
        leaf = randn(10)
        x = leaf.exp()  # keeps its result
        y = operators.activation(x, "gelu", quantizer=Quantizer(), inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class TestKept:
    def saved(self, call) -> list[Tensor]:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            call()
        return kept

    @pytest.mark.parametrize("name", ALL)
    def test_is_nothing_when_autograd_does_not_record(self, name):
        case = ALL[name](torch.float32, 3)
        with torch.no_grad():
            assert not self.saved(lambda: case.quantized(*case.inputs, Quantizer()))
        frozen = [t.detach() for t in case.inputs]
        assert not self.saved(lambda: case.quantized(*frozen, Quantizer()))

    @pytest.mark.parametrize(("bits", "expected"), [(1, 128), (2, 256), (3, 384), (4, 512), (8, 1024)])
    def test_is_one_code_a_value_of_an_activation(self, bits, expected):
        x = randn(4, 256)
        (codes,) = self.saved(lambda: operators.activation(x, "gelu", quantizer=Quantizer(bits=bits)))
        assert codes.dtype == torch.uint8 and codes.untyped_storage().nbytes() == expected

    def test_is_never_quadratic_in_tokens(self):
        q, k, v = attention_inputs(torch.float32, 1, 128, 128)
        kept = self.saved(lambda: operators.scaled_dot_product_attention(q, k, v, quantizer=Quantizer()))
        assert sum(t.nbytes for t in kept) < 0.2 * 3 * q.nbytes

    @pytest.mark.parametrize(("mask", "coded"), [((4, 128, 128), True), ((3, 4, 128, 128), False)])
    def test_is_codes_for_attention_in_blocks(self, mask, coded):
        shape = (2, 3, 4, 128, 32)
        q, k, v, mask = (randn(*s) for s in (shape, shape, shape, mask))
        kept = self.saved(lambda: operators.scaled_dot_product_attention(q, k, v, mask, quantizer=Quantizer()))
        size = sum(t.nbytes for t in kept if t.data_ptr() != mask.data_ptr())
        assert (size < 0.2 * 3 * q.nbytes) == coded

    def test_is_bits_for_dropout_and_pooling(self):
        x = randn(4, 8, 32, 32)
        (mask,) = self.saved(lambda: operators.dropout(x, 0.3))
        assert mask.nbytes == x.numel() // 8
        (places,) = self.saved(lambda: operators.max_pool2d(x, 2, quantizer=Quantizer()))
        assert places.nbytes == x.numel() // 4 // 4
        (largest,) = self.saved(lambda: operators.amax(x, (2, 3)))
        assert largest.nbytes == x.numel() // 8

    def test_is_codes_of_what_is_sampled(self):
        x, grid = 2 * randn(4, 8, 32, 32), randn(4, 3, 3, 2)
        kept = self.saved(lambda: operators.grid_sample(x, grid, "bilinear", "zeros", False, quantizer=Quantizer()))
        assert sum(t.nbytes for t in kept) - grid.nbytes < 0.22 * x.nbytes
        (kept,) = self.saved(
            lambda: operators.grid_sample(x, grid.detach(), "bilinear", "zeros", False, quantizer=Quantizer())
        )
        assert kept.nbytes == grid.nbytes

    def test_is_nothing_for_a_frozen_weight_or_for_a_bias_alone(self):
        x = randn(3, 8)
        weight, bias = torch.randn(8), randn(8)
        assert (
            sum(t.nbytes for t in self.saved(lambda: operators.linear(x, torch.randn(8, 8), quantizer=Quantizer())))
            == 256
        )
        kept = self.saved(lambda: operators.layer_norm(x.detach(), (8,), weight, bias, quantizer=Quantizer()))
        assert all(t is weight for t in kept)


class TestRandomness:
    def test_dropout_draws_the_stock_mask_and_replays_it(self):
        x = randn(50, 20)
        x.data[x.data < 0] = 0  # a mask cannot be read off zeros
        torch.manual_seed(1)
        ours = operators.dropout(x, 0.3)
        torch.manual_seed(1)
        theirs = F.dropout(x, 0.3)
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(gradients(ours, [x]), gradients(theirs, [x]))

    def test_drop_path_drops_the_samples_that_transformers_drops(self):
        from transformers.models.swin.modeling_swin import SwinDropPath

        x = randn(50, 3, 2)
        torch.manual_seed(1)
        ours = operators.drop_path(x, 0.4)
        torch.manual_seed(1)
        theirs = SwinDropPath(0.4)(x)
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(gradients(ours, [x]), gradients(theirs, [x]))

    def test_attention_replays_its_dropout(self):
        inputs = attention_inputs(torch.float32)
        torch.manual_seed(1)
        ours = operators.scaled_dot_product_attention(*inputs, dropout_p=0.3, quantizer=Quantizer(bits=8))
        torch.manual_seed(1)
        theirs = F.scaled_dot_product_attention(*inputs, dropout_p=0.3)
        assert torch.equal(ours, theirs)
        state = torch.get_rng_state()
        assert relative_error(gradients(ours, inputs), gradients(theirs, inputs)) < 0.02
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("name", ["gelu", "layer_norm", "attention", "softmax"])
    @pytest.mark.parametrize("backend", ["reference", "auto"])
    def test_stochastic_rounding_is_seeded(self, name, backend):
        case = ALL[name](torch.float32, 3)
        quantizer = Quantizer(bits=2, rounding="stochastic", backend=backend)

        def run(seed):
            torch.manual_seed(seed)
            return gradients(case.quantized(*case.inputs, quantizer), case.inputs)[0]

        assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))

    def test_stochastic_rounding_is_unbiased(self):
        x = randn(2000)
        quantizer = Quantizer(bits=2, rounding="stochastic")
        runs = [gradients(operators.activation(x, "gelu", quantizer=quantizer), [x])[0] for _ in range(200)]
        (exact,) = gradients(F.gelu(x), [x])
        mean = torch.stack(runs).mean(0)
        single = (runs[0] - exact).square().mean().sqrt()
        assert (mean - exact).square().mean().sqrt() < 3 * single / 200**0.5


class TestAutograd:
    @pytest.mark.parametrize("name", ALL)
    def test_refuses_double_backward(self, name):
        case = ALL[name](torch.float32, 3)
        y = case.quantized(*case.inputs, Quantizer())
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(y.square().sum(), case.inputs, create_graph=True)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("name", ["layer_norm", "attention", "gelu"])
    def test_works_under_checkpointing(self, name, reentrant):
        case = ALL[name](torch.float32, 3)

        def run(*inputs):
            return case.quantized(*inputs, Quantizer())

        plain = gradients(run(*case.inputs), case.inputs)
        leaves = [t.detach().requires_grad_() for t in case.inputs]
        out = checkpoint(run, *leaves, use_reentrant=reentrant)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)))
        for a, leaf in zip(plain, leaves):
            torch.testing.assert_close(a, leaf.grad)

    def test_works_with_save_on_cpu(self):
        case = ALL["attention"](torch.float32, 3)
        plain = gradients(case.quantized(*case.inputs, Quantizer()), case.inputs)
        with torch.autograd.graph.save_on_cpu():
            y = case.quantized(*case.inputs, Quantizer())
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(y, case.inputs)))


class TestQuantizer:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"bits": 5},
            {"rounding": "up"},
            {"backend": "cuda"},
            {"group_size": 0},
            {"group_size": 10**12},
            {"bits": 2, "levels": (0, 1)},
        ],
    )
    def test_names_the_wrong_argument(self, wrong):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            Quantizer(**wrong)

    def test_unknown_activation_functions_and_parameters_are_named(self):
        with pytest.raises(ValueError, match="unknown activation function 'swish2'"):
            operators.activation(randn(3), "swish2", quantizer=Quantizer())
        with pytest.raises((TypeError, ValueError), match="beta"):
            operators.activation(randn(3), "elu", quantizer=Quantizer(), beta=1.0)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(("gelu", "relu", "layer_norm", "rms_norm", "softmax", "linear", "dropout")),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    step=st.sampled_from((1, 2)),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    bits=st.sampled_from(codec.WIDTHS),
    rounding=st.sampled_from(ROUNDINGS),
    backend=st.sampled_from(("reference", "auto")),
)
def test_any_shape_stride_dtype_and_width(name, shape, order, step, dtype, bits, rounding, backend):
    """Results and their layout are the stock operator's, gradients have its shape and dtype, are finite, and near with
    eight bits."""
    torch.manual_seed(1)  # not that of the gradients, which these numbers would then be
    shape[-1] += 1
    permutation = list(range(len(shape)))
    order.shuffle(permutation)
    base = torch.randn([shape[d] * (step if d == permutation[-1] else 1) for d in permutation]).to(dtype)
    base = base[..., ::step] if base.dim() else base
    x = base.permute([permutation.index(d) for d in range(len(shape))]).requires_grad_()
    quantizer = Quantizer(bits=bits, group_size=4, rounding=rounding, backend=backend)
    weight = torch.randn(3, shape[-1]).to(dtype).requires_grad_()
    calls = {
        "layer_norm": (
            lambda: operators.layer_norm(x, shape[-1:], quantizer=quantizer),
            lambda: F.layer_norm(x, shape[-1:]),
        ),
        "rms_norm": (
            lambda: operators.rms_norm(x, shape[-1:], quantizer=quantizer),
            lambda: F.rms_norm(x, shape[-1:]),
        ),
        "softmax": (lambda: operators.softmax(x, -1, quantizer=quantizer), lambda: F.softmax(x, -1)),
        "linear": (lambda: operators.linear(x, weight, quantizer=quantizer), lambda: F.linear(x, weight)),
        "dropout": (lambda: operators.dropout(x, 0.5), lambda: F.dropout(x, 0.5)),
    }
    for activation_name in ("gelu", "relu"):
        calls[activation_name] = (
            lambda name=activation_name: operators.activation(x, name, quantizer=quantizer),
            lambda name=activation_name: getattr(F, name)(x),
        )
    inputs = [x, weight] if name == "linear" else [x]
    results = []
    for call in calls[name]:
        torch.manual_seed(0)
        y = call()
        results.append((y, gradients(y, inputs)))
    (ours, d_ours), (theirs, d_theirs) = results
    assert torch.equal(ours, theirs)
    if min(shape) > 1:  # the stride of a single element means nothing
        assert ours.stride() == theirs.stride()
    for a, b in zip(d_ours, d_theirs):
        assert a.shape == b.shape and a.dtype == b.dtype and a.isfinite().all()
        if bits == 8 and shape[-1] > 4:
            scale = b.double().abs().max() if b.numel() else 0
            assert ((a.double() - b.double()).abs() <= 0.05 * scale + 0.05).all()
