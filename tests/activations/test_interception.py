"""Whatever way a module calls an operator, it is computed with codes when autograd records, and left alone
otherwise."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_s2a import quantize_activations
from peft_s2a.activations import operators
from peft_s2a.activations.config import ActivationQuantizationConfig
from peft_s2a.activations.interception import OperatorMode
from peft_s2a.activations.operators.einsum import split_equation
from peft_s2a.activations.quantizer import Quantizer


BATCH, TOKENS, WIDTH = 3, 8, 16
WEIGHT = nn.Parameter(torch.randn(WIDTH, dtype=torch.double, generator=torch.Generator().manual_seed(2)), False)
STATISTICS = torch.zeros(TOKENS, dtype=torch.double), torch.ones(TOKENS, dtype=torch.double)


def mode(**options):
    return OperatorMode(ActivationQuantizationConfig(backend="reference", **options), "module")


def inputs(*shape, seed=0):
    """Activations: tensors computed from a leaf that requires grad."""
    leaf = torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    return leaf, leaf * 1.0


def heads(x):
    return x.view(BATCH, TOKENS, 2, WIDTH // 2).transpose(1, 2)


def cosine_attention(x):
    q = k = v = heads(x)
    p = (F.normalize(q, dim=-1) @ F.normalize(k + 1, dim=-1).transpose(-2, -1)).softmax(-1)
    return p @ v


def windows(x):
    return x.view(BATCH, 1, TOKENS, WIDTH)


def kernel(*shape):
    return nn.Parameter(torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(3)), False)


def standardised(weight):
    return F.batch_norm(weight.reshape(1, len(weight), -1), None, None, training=True).reshape_as(weight)


OPERATORS = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "GELU module": nn.GELU("tanh"),
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x, inplace=True),
    "Mish module": nn.Mish(),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "relu": F.relu,
    "torch.relu": torch.relu,
    "x.relu()": lambda x: x.relu(),
    "x.relu_()": lambda x: x.relu_(),
    "F.relu_": lambda x: F.relu_(x),
    "ReLU module in place": nn.ReLU(inplace=True),
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky_relu keyword": lambda x: F.leaky_relu(x, negative_slope=0.3, inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.7),
    "elu": lambda x: F.elu(x, 0.7),
    "celu": lambda x: F.celu(x, alpha=0.7),
    "selu": F.selu,
    "softplus": lambda x: F.softplus(x, 2.0, 10.0),
    "logsigmoid": F.logsigmoid,
    "tanh": torch.tanh,
    "x.tanh()": lambda x: x.tanh(),
    "x.tanh_()": lambda x: x.tanh_(),
    "x.sigmoid()": lambda x: x.sigmoid(),
    "Sigmoid module": nn.Sigmoid(),
    "layer_norm": lambda x: F.layer_norm(x, (WIDTH,), WEIGHT),
    "torch.layer_norm": lambda x: torch.layer_norm(x, (WIDTH,), WEIGHT),
    "rms_norm": lambda x: F.rms_norm(x, (WIDTH,), WEIGHT),
    "group_norm": lambda x: F.group_norm(x, 2),
    "batch_norm live": lambda x: F.batch_norm(x, None, None, training=True),
    "batch_norm frozen": lambda x: F.batch_norm(x, *STATISTICS),
    "softmax": lambda x: F.softmax(x, dim=-1),
    "softmax dtype": lambda x: F.softmax(x, dim=1, dtype=torch.float64),
    "torch.softmax": lambda x: torch.softmax(x, 1),
    "x.softmax()": lambda x: x.softmax(dim=-1),
    "Softmax module": nn.Softmax(-1),
    "attention": lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x)),
    "attention mask": lambda x: F.scaled_dot_product_attention(
        heads(x), heads(x), heads(x), attn_mask=STATISTICS[0].view(1, TOKENS), scale=0.3
    ),
    "attention grouped": lambda x: F.scaled_dot_product_attention(
        heads(x), heads(x)[:, :1], heads(x)[:, 1:], enable_gqa=True
    ),
    "attention inline": lambda x: (heads(x) @ heads(x).transpose(-2, -1)).softmax(-1) @ heads(x),
    "attention bmm": lambda x: torch.bmm(torch.bmm(x, x.mT).softmax(-1), x),
    "attention cosine": cosine_attention,
    "attention einsum": lambda x: torch.einsum(
        "bhlt,bhtd->bhld", torch.einsum("bhld, bhtd -> bhlt", heads(x), heads(x) + 1).softmax(-1), heads(x)
    ),
    "einsum of a list": lambda x: 0.1 * torch.einsum("bnc,bmc->bmn", [x, x * 2]),
    "einsum over samples": lambda x: 0.1 * torch.einsum("bnc,bnd->cd", x, x + 1),
    "gate": lambda x: F.silu(x) * (x + 1),
    "addcmul": lambda x: torch.addcmul(x, x + 1, x.mean(1, keepdim=True), value=0.1),
    "x.addcmul": lambda x: x.addcmul(WEIGHT, x.square(), value=0.1),
    "x.amax": lambda x: x * x.amax((1, 2), keepdim=True),
    "torch.amax": lambda x: torch.amax(heads(x), dim=3),
    "amax of everything": torch.amax,
    "grid_sample": lambda x: F.grid_sample(
        windows(x), x[..., :2].tanh().unsqueeze(1), padding_mode="border", align_corners=False
    ),
    "gate broadcast": lambda x: torch.mul(x, x.mean(1, keepdim=True).sigmoid()),
    "norms": lambda x: x * torch.linalg.vector_norm(x, ord=2, dim=(1, 2), keepdim=True),
    "global response norm": lambda x: x * x.norm(p=2, dim=(1, 2), keepdim=True),
    "norm of everything": torch.linalg.vector_norm,
    "frozen conv1d": lambda x: F.conv1d(x, kernel(4, TOKENS, 3), padding=1),
    "frozen conv2d": lambda x: F.conv2d(windows(x), kernel(4, 1, 3, 2), stride=(2, 3), padding=(1, 0), dilation=2),
    "frozen conv2d same": lambda x: F.conv2d(windows(x), kernel(4, 1, 3, 5), padding="same"),
    "frozen conv2d valid": lambda x: F.conv2d(windows(x), kernel(4, 1, 3, 2), padding="valid", dilation=(1, 2)),
    "frozen depthwise conv2d": lambda x: F.conv2d(
        x.unsqueeze(-1), kernel(TOKENS, 1, 3, 1), None, 2, (1, 0), 1, TOKENS
    ),
    "frozen conv3d": lambda x: F.conv3d(windows(x).unsqueeze(1), kernel(2, 1, 1, 3, 3), stride=2),
    "frozen conv_transpose2d": lambda x: F.conv_transpose2d(
        windows(x), kernel(1, 3, 3, 3), stride=2, padding=1, output_padding=1, dilation=2
    ),
    "standardised conv2d": lambda x: F.conv2d(windows(x), standardised(kernel(4, 1, 3, 2)), padding=1),
    "Conv2d module": nn.Sequential(
        nn.Unflatten(1, (4, TOKENS // 4)),
        nn.Conv2d(4, 2, 3, 2, 1).double().requires_grad_(False),
    ),
    "avg_pool2d": lambda x: F.avg_pool2d(windows(x), (2, 3), 2, (1, 0), ceil_mode=True, count_include_pad=False),
    "AvgPool2d module": nn.AvgPool2d(2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(windows(x), (3, None)),
    "max_pool2d": lambda x: F.max_pool2d(windows(x), 3, 2, 1),
    "MaxPool2d module": nn.Sequential(nn.Unflatten(1, (1, TOKENS)), nn.MaxPool2d(2)),
}


def full_precision_bytes(function, x, parameters=()):
    """Floating-point bytes that autograd keeps, apart from parameters and from tensors that are small or one value a
    row."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    sizes = []

    def pack(t):
        is_parameter = isinstance(t, nn.Parameter) or t.untyped_storage().data_ptr() in own
        if t.dtype == torch.double and t.numel() > BATCH * TOKENS and not is_parameter:
            sizes.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(x)
    return sum(sizes)


class TestOperators:
    @pytest.mark.parametrize("name", OPERATORS)
    def test_same_result_close_gradient_and_codes_instead_of_tensors(self, name):
        function = OPERATORS[name]
        leaf, x = inputs(BATCH, TOKENS, WIDTH)
        expected = function(x.clone())
        weight = torch.randn(expected.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        (d_expected,) = torch.autograd.grad((expected * weight).sum(), leaf, retain_graph=True)
        with mode(bits=8, group_size=16):
            actual = function(x.clone())
        assert torch.equal(actual, expected)
        (d_actual,) = torch.autograd.grad((actual * weight).sum(), leaf)
        torch.testing.assert_close(d_actual, d_expected, rtol=0.05, atol=0.03)
        leaf, x = inputs(BATCH, TOKENS, WIDTH)
        stock = full_precision_bytes(function, x.clone())
        with mode(bits=8, group_size=16):
            assert full_precision_bytes(function, x.clone()) <= stock / 8
            assert stock > 0

    @pytest.mark.parametrize("name", ["gelu", "layer_norm", "attention", "softmax", "gate"])
    def test_left_alone_without_recording(self, name):
        _, x = inputs(BATCH, TOKENS, WIDTH)
        with torch.no_grad(), mode():
            assert not OPERATORS[name](x).requires_grad
        with mode():
            assert not OPERATORS[name](x.detach()).requires_grad

    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("batch_first", [True, False])
    def test_multi_head_attention(self, need_weights, batch_first):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first).double().requires_grad_(False)
        attention.out_proj.bias.requires_grad_(True)

        def function(x):
            return attention(x, x, x, need_weights=need_weights)

        leaf, x = inputs(BATCH, TOKENS, WIDTH)
        expected = function(x)
        stock = full_precision_bytes(function, x, attention.parameters())
        with mode(bits=8, group_size=16):
            actual = function(x)
            quantized = full_precision_bytes(function, x, attention.parameters())
        assert torch.equal(actual[0], expected[0])
        if need_weights:
            assert torch.equal(actual[1], expected[1])
        grads = [
            torch.autograd.grad(result[0].square().sum(), leaf, retain_graph=True)[0] for result in (expected, actual)
        ]
        torch.testing.assert_close(grads[1], grads[0], rtol=0.02, atol=0.02)
        assert quantized < stock / 8

    def test_widths_go_by_kind_and_module(self):
        config = ActivationQuantizationConfig(bits={"activation": 2, "norm": 8, "blocks.0": 1, "default": 3})
        assert OperatorMode(config, "blocks.1").quantizer("activation").bits == 2
        assert OperatorMode(config, "blocks.1").quantizer("norm").bits == 8
        assert OperatorMode(config, "blocks.1").quantizer("softmax").bits == 3
        assert OperatorMode(config, "blocks.0").quantizer("norm").bits == 1

    def test_products_with_constants_and_scalars_stay_exact(self):
        leaf, x = inputs(BATCH, TOKENS, WIDTH)
        constant = torch.rand(WIDTH, dtype=torch.double)
        with mode(bits=1):
            y = (x * constant) * 3 @ torch.eye(WIDTH, dtype=torch.double)
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        torch.testing.assert_close(gradient, (3 * constant).expand_as(leaf))

    def test_bias_of_a_frozen_convolution(self):
        convolution = nn.Conv2d(1, 3, 3).double()
        convolution.weight.requires_grad_(False)
        images = torch.randn(2, 1, 6, 6, dtype=torch.double)
        weight = torch.randn(2, 3, 4, 4, dtype=torch.double)
        (expected,) = torch.autograd.grad((convolution(images) * weight).sum(), convolution.bias)
        kept = []
        with mode(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = convolution(images)
        assert all(t is convolution.weight for t in kept)
        (actual,) = torch.autograd.grad((y * weight).sum(), convolution.bias)
        torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize("input_needed", [True, False])
    @pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(4, 3, 3, padding=1), nn.Conv1d(3, 2, 2)])
    def test_of_frozen_weights_no_copy_is_kept_under_autocast(self, layer, input_needed):
        layer = layer.requires_grad_(False)
        layer.bias.requires_grad_()
        x = torch.randn(2, 4, 3, 6)[:, :, 0] if isinstance(layer, nn.Conv1d) else torch.randn(2, 4, 3, 6)
        x = (x[:, :3] if isinstance(layer, nn.Conv1d) else x).requires_grad_(input_needed)
        wanted = [x, layer.bias] if input_needed else [layer.bias]
        kept, results = [], []
        for how in (nullcontext(), mode()):
            with torch.autocast("cpu", torch.bfloat16), how:
                with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
                    y = layer(x)
            if not isinstance(how, OperatorMode):
                kept.clear()
            results.append((y, *torch.autograd.grad(y.float().square().sum(), wanted)))
        assert kept and all(t is layer.weight for t in kept)
        assert all(ours.dtype == theirs.dtype for ours, theirs in zip(*results))
        assert torch.equal(results[0][0], results[1][0])
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7 * theirs.abs().max().item())

    def test_trained_convolutions_and_uneven_padding_are_left_alone(self):
        for convolution in (nn.Conv2d(1, 3, 3), nn.Conv2d(1, 3, 2, padding="same").requires_grad_(False)):
            x = torch.randn(2, 1, 6, 6, requires_grad=True)
            expected = torch.autograd.grad(convolution(x).sum(), x)
            with mode():
                y = convolution(x)
            assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected[0])
            assert "ConvolutionBackward" in y.grad_fn.name()

    def test_head_that_reads_one_token_keeps_one_token(self):
        head = nn.Linear(WIDTH, 3).double()
        _, x = inputs(BATCH, TOKENS, WIDTH)
        storages = []

        def pack(t):
            storages.append(t.untyped_storage().nbytes())
            return t

        with mode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = head(x[:, 0])
        assert max(storages) < x.nbytes / 4
        (gradient,) = torch.autograd.grad(y.sum(), head.weight)
        torch.testing.assert_close(gradient, x[:, 0].sum(0).expand(3, -1))

    def test_trained_linear_inputs_are_compressed_on_request_only(self):
        linear = nn.Linear(WIDTH, WIDTH).double()
        _, x = inputs(BATCH, TOKENS, WIDTH)
        with mode():
            assert full_precision_bytes(linear, x, linear.parameters()) == x.nbytes
        with mode(compress_linear_inputs=True):
            assert full_precision_bytes(linear, x, linear.parameters()) == 0


class TestProducts:
    QUANTIZER = Quantizer(bits=8, group_size=8, backend="reference")

    @pytest.mark.parametrize(
        ("a", "b"),
        [
            ((5, 4), (4, 3)),
            ((2, 5, 4), (2, 4, 3)),
            ((2, 3, 5, 4), (2, 3, 4, 6)),
            ((2, 3, 5, 4), (4, 6)),
            ((5, 4), (2, 3, 4, 6)),
            ((2, 1, 5, 4), (1, 3, 4, 6)),
            ((2, 2, 3, 5, 4), (2, 2, 3, 4, 7)),
        ],
    )
    @pytest.mark.parametrize("transposed", [False, True])
    def test_matmul(self, a, b, transposed):
        leaf_a, a = inputs(*a, seed=1)
        leaf_b, b = inputs(*(b[:-2] + b[:-3:-1] if transposed else b), seed=2)
        self.check(torch.matmul, operators.matmul, a, b.mT if transposed else b, (leaf_a, leaf_b))

    @pytest.mark.parametrize(
        ("a", "b"), [((2, 5, 4), (2, 5, 4)), ((2, 5, 4), (4,)), ((2, 5, 4), (2, 1, 4)), ((1,), (3, 2, 5, 4))]
    )
    def test_multiply(self, a, b):
        (leaf_a, a), (leaf_b, b) = inputs(*a, seed=1), inputs(*b, seed=2)
        self.check(torch.mul, operators.multiply, a, b, (leaf_a, leaf_b))

    @pytest.mark.parametrize("shape", [(5, 4), (2, 3, 5, 4), (3, 2, 1, 7)])
    @pytest.mark.parametrize("order", ["rows", "channels last"])
    def test_square(self, shape, order):
        leaf, x = inputs(*shape)
        x = x if order == "rows" else x.movedim(1, -1).contiguous().movedim(-1, 1)
        expected, actual = x**2, operators.square(x, quantizer=self.QUANTIZER)
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()
        weight = torch.randn_like(expected)
        one, other = (torch.autograd.grad((y * weight).sum(), leaf, retain_graph=True)[0] for y in (expected, actual))
        assert (one - other).norm() < 0.02 * one.norm()

    @pytest.mark.parametrize("write", [lambda x: x**2, lambda x: x.pow(2.0), torch.square, lambda x: torch.pow(x, 2)])
    def test_squares_keep_codes(self, write):
        leaf, x = inputs(6, 40)
        kept = []
        with mode(bits=4), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = write(x)
        assert {t.dtype for t in kept} == {torch.uint8}
        assert sum(t.nbytes for t in kept) < x.numel()
        y.sum().backward()
        assert F.cosine_similarity(leaf.grad.flatten(), 2 * leaf.detach().flatten(), dim=0) > 0.99

    def test_squares_of_parameters_are_kept_exactly(self):
        scale = nn.Parameter(torch.randn(5, 4, dtype=torch.double))
        with mode(bits=1):
            y = scale**2
        torch.testing.assert_close(torch.autograd.grad(y.sum(), scale)[0], 2 * scale.detach())

    @pytest.mark.parametrize(
        ("equation", "a", "b"),
        [
            ("ij,jk->ik", (5, 4), (4, 3)), ("bhlk,bhtk->bhlt", (2, 3, 5, 4), (2, 3, 6, 4)), ("bij,jk->kib", (2, 5, 4), (4, 3)),
            ("bhlt,bhtv->lbhv", (2, 3, 5, 4), (2, 3, 4, 6)), ("i,j->ij", (5,), (4,)), ("bnc,bmc->nm", (2, 5, 4), (2, 6, 4)),
        ],
    )  # fmt: skip
    def test_einsum(self, equation, a, b):
        (leaf_a, a), (leaf_b, b) = inputs(*a, seed=1), inputs(*b, seed=2)
        terms = split_equation(equation, a, b)

        def ours(a, b, quantizer):
            return operators.einsum(terms, a, b, quantizer=quantizer)

        self.check(lambda a, b: torch.einsum(equation, a, b), ours, a, b, (leaf_a, leaf_b))

    @pytest.mark.parametrize(
        ("equation", "a", "b"),
        [
            ("ij,jk", (5, 4), (4, 3)), ("...ij,jk->...ik", (2, 5, 4), (4, 3)), ("ii,ij->j", (4, 4), (4, 3)),
            ("ij,k->k", (5, 4), (3,)), ("ij,ij->ij", (5, 1), (5, 4)), ("ij,ij->", (5, 4), (5, 4)),
        ],
    )  # fmt: skip
    def test_other_forms_of_einsum_are_stock(self, equation, a, b):
        (leaf_a, a), (leaf_b, b) = inputs(*a, seed=1), inputs(*b, seed=2)
        assert split_equation(equation, a, b) is None
        with mode(bits=1):
            y = torch.einsum(equation, a, b)
        exact = torch.autograd.grad(torch.einsum(equation, a, b).sum(), (leaf_a, leaf_b), retain_graph=True)
        for one, other in zip(torch.autograd.grad(y.sum(), (leaf_a, leaf_b)), exact):
            torch.testing.assert_close(one, other)

    def check(self, stock, ours, a, b, leaves):
        expected, actual = stock(a, b), ours(a, b, quantizer=self.QUANTIZER)
        assert torch.equal(actual, expected)
        weight = torch.randn_like(expected)
        for one, other in zip(
            *(torch.autograd.grad((y * weight).sum(), leaves, retain_graph=True) for y in (expected, actual))
        ):
            assert one.shape == other.shape
            assert (one - other).norm() < 0.02 * one.norm()

    def test_parameters_are_kept_exactly(self):
        leaf, a = inputs(5, 4)
        scale = nn.Parameter(torch.randn(4, dtype=torch.double))
        y = operators.multiply(a, scale, quantizer=Quantizer(bits=1, backend="reference"))
        weight = torch.randn_like(y)
        (gradient,) = torch.autograd.grad((y * weight).sum(), leaf)
        torch.testing.assert_close(gradient, weight * scale)

    def test_one_side_without_gradient(self):
        leaf, a = inputs(5, 4)
        b = torch.randn(4, 3, dtype=torch.double)
        y = operators.matmul(a, b, quantizer=Quantizer(bits=1, backend="reference"))
        torch.testing.assert_close(torch.autograd.grad(y.sum(), leaf)[0], b.sum(1).expand_as(a))

    def test_large_common_offsets_do_not_cost_precision(self):
        leaves, factors = zip(inputs(2, 3, 9, 8, seed=1), inputs(2, 3, 9, 8, seed=2))
        offset = torch.zeros(8, dtype=torch.double)
        offset[2] = 100.0
        a, b = factors[0] + offset, (factors[1] + offset).mT
        y = operators.matmul(a, b, quantizer=Quantizer(bits=4, group_size=8, backend="reference"))
        weight = torch.randn_like(y)
        for leaf, other in zip(leaves, (b, a)):
            (actual,) = torch.autograd.grad((y * weight).sum(), leaf, retain_graph=True)
            expected = weight @ other.mT if leaf is leaves[0] else (other.mT @ weight).mT
            assert (actual - expected).norm() < 0.02 * expected.norm()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_low_precision(self, dtype):
        leaf = torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
        a = leaf * 1
        y = operators.matmul(a, a.mT, quantizer=self.QUANTIZER)
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        assert gradient.dtype == dtype
        assert torch.equal(y, a @ a.mT)

    def test_autocast(self):
        leaf = torch.randn(2, 5, 8, requires_grad=True)
        a = leaf * 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = operators.matmul(a, a.mT, quantizer=self.QUANTIZER)
            assert torch.equal(y, a @ a.mT)
        assert torch.autograd.grad(y.float().sum(), leaf)[0].dtype == torch.float32

    def test_empty_batch(self):
        leaf, a = inputs(0, 5, 8)
        y = operators.matmul(a, a.mT, quantizer=self.QUANTIZER)
        assert torch.autograd.grad(y.sum(), leaf)[0].shape == (0, 5, 8)

    def test_double_backward_is_refused(self):
        leaf, a = inputs(5, 4)
        y = operators.multiply(a, a + 1, quantizer=self.QUANTIZER)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(y.sum(), leaf, create_graph=True)

    @pytest.mark.parametrize("shape", [(3, 7), (2, 3, 5, 8), (4, 2)])
    def test_normalize(self, shape):
        leaf, x = inputs(*shape)
        expected, actual = F.normalize(x, dim=-1), operators.normalize(x, quantizer=self.QUANTIZER)
        assert torch.equal(actual, expected)
        weight = torch.randn_like(expected)
        one, other = (torch.autograd.grad((y * weight).sum(), leaf, retain_graph=True)[0] for y in (expected, actual))
        assert (one - other).norm() <= 0.02 * one.norm() + 1e-9

    def test_normalize_zero_rows(self):
        leaf = torch.zeros(2, 4, dtype=torch.double, requires_grad=True)
        y = operators.normalize(leaf * 1, 1e-3, quantizer=self.QUANTIZER)
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        torch.testing.assert_close(gradient, torch.full((2, 4), 1e3, dtype=torch.double))


def test_torch_compile_finds_norms_written_in_python():
    class Response(nn.Module):
        def forward(self, x):
            return x * (x * 1).norm(p=2, dim=1, keepdim=True)

    gradients = []
    for compiles in (False, True):
        module = quantize_activations(Response(), ActivationQuantizationConfig(bits=8))
        compute = torch.compile(module, backend="aot_eager", fullgraph=True) if compiles else module
        leaf, _ = inputs(BATCH, TOKENS, WIDTH)
        gradients.append(torch.autograd.grad(compute(leaf).sum(), leaf)[0])
    torch.testing.assert_close(*gradients)
