"""Checkpoints, offloading, copies and function transforms of models with quantised activations."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kept import Kept
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from peft_s2a.activations.config import ActivationQuantizationConfig
from peft_s2a.activations.wrap import quantize_activations, restore_activations, unplanned


_PRODUCTS = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]


def _codes(context, operator, *args, **kwargs):
    saved = operator.namespace == "s2a" or "layer_norm" in operator.name() or "gelu" in operator.name()
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


KINDS = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "selective: products": {
        "use_reentrant": False,
        "context_fn": partial(create_selective_checkpoint_contexts, _PRODUCTS),
    },
    "selective: codes": {
        "use_reentrant": False,
        "context_fn": partial(create_selective_checkpoint_contexts, _codes),
    },
}


class Block(nn.Module):
    """A block that computes its halves in checkpoints of its own, if ``options`` are given."""

    def __init__(self, dropout=0.0, options=None):
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.norm2, self.fc1, self.act, self.fc2 = nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)
        self.dropout = nn.Dropout(dropout)
        self.options = options

    def attend(self, x):
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        p = self.dropout.p if self.training else 0.0
        return self.out(F.scaled_dot_product_attention(query, key, value, dropout_p=p).transpose(1, 2).flatten(2))

    def mlp(self, x):
        return self.dropout(self.fc2(self.act(self.fc1(self.norm2(x)))))

    def forward(self, x):
        for half in (self.attend, self.mlp):
            x = x + (half(x) if self.options is None else checkpoint(half, x, **self.options))
        return x


class Model(nn.Module):
    """Two blocks, each in a checkpoint if ``options`` are given."""

    def __init__(self, dropout=0.0, options=None, inner_options=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(dropout, inner_options), Block(dropout, inner_options)])
        self.options = options

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.options is None else checkpoint(block, x, **self.options)
        return x


def quantized(model, **options):
    return quantize_activations(model, ActivationQuantizationConfig(bits=8, **options))


def tune(model, everything=False):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = everything or name.endswith("bias")
    return model.train()


def images():
    return torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))


def step(model, x):
    """(result, all gradients, the input's first)."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    result = model(x * 1)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    for tensor in wanted:
        tensor.grad = None
    (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    return result.detach(), torch.cat([tensor.grad.flatten() for tensor in wanted])


def assert_faithful(actual, expected):
    torch.testing.assert_close(actual[0], expected[0])
    assert F.cosine_similarity(actual[1], expected[1], dim=0) > 0.9995


class TestCheckpoints:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("where", ["inside", "outside"])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_gradients_are_those_without(self, kind, where, dropout):
        options = {"inner_options" if where == "inside" else "options": KINDS[kind]}
        expected = step(tune(Model(dropout)), images())
        model = quantized(tune(Model(dropout, **options)))
        for _ in range(2):  # the first of which records
            assert_faithful(step(model, images()), expected)

    @pytest.mark.parametrize("kind", KINDS)
    def test_with_trained_weights(self, kind):
        expected = step(tune(Model(), True), images())
        assert_faithful(step(quantized(tune(Model(inner_options=KINDS[kind]), True)), images()), expected)

    def test_draws_that_are_repeated_are_in_no_plan(self):
        model = quantized(tune(Model(0.3, inner_options=KINDS["non-reentrant"])))
        step(model, images())
        assert set(unplanned(model).values()) == {"it draws random numbers in its backward pass"}

    def test_a_checkpoint_without_draws_is_in_a_plan_and_keeps_its_argument(self):
        model = quantized(tune(Model(inner_options=KINDS["non-reentrant"])))
        step(model, images())
        assert unplanned(model) == {}
        with Kept(model) as kept:
            x = images().requires_grad_()
            model(x)
        assert kept.nbytes == 4 * x.nbytes  # of two halves in two blocks

    @pytest.mark.parametrize("kind", ["selective: products", "selective: codes"])
    def test_plans_come_back_after_a_selective_checkpoint(self, kind):
        model = tune(Model(options=KINDS[kind]))
        quantized(model)
        step(model, images())
        assert all("selective checkpoint" in reason for reason in unplanned(model).values())
        model.options = None
        step(model, images())
        assert unplanned(model) == {}


class TestOffloading:
    def test_save_on_cpu(self):
        model = quantized(tune(Model()))
        expected = step(model, images())

        def offloaded(x):
            with torch.autograd.graph.save_on_cpu():
                return model(x)

        offloaded.parameters = model.parameters
        torch.testing.assert_close(step(offloaded, images()), expected)

    @pytest.mark.parametrize("name", ["cpu_offload", "cpu_offload_with_hook"])
    def test_accelerate(self, name):
        accelerate = pytest.importorskip("accelerate")
        x = images().requires_grad_()
        model = Model().requires_grad_(False)
        (expected,) = torch.autograd.grad(model(x * 1).square().sum(), x)
        quantized(model)
        offloaded = getattr(accelerate, name)(model, torch.device("cpu"))
        for _ in range(2):
            result = (model if name == "cpu_offload" else offloaded[0])(x * 1)
            (found,) = torch.autograd.grad(result.square().sum(), x)
            assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.9995


def _saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved_and_loaded])
    @pytest.mark.parametrize("used", [False, True])
    def test_copies_train_alike_and_apart(self, copied, used):
        model = quantized(tune(Model()))
        if used:
            step(model, images())
        other = copied(model)
        expected = step(model, images())
        for one, two in zip(step(other, images()), expected):
            assert torch.equal(one, two)
        assert unplanned(other) == {}
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
        for one, two in zip(step(model, images()), expected):
            assert torch.equal(one, two)
        restore_activations(other)
        assert type(other) is Model and type(model) is not Model


def _dual(model, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent


TRANSFORMS = {
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).sum())(x),
    "vmap": lambda model, x: torch.func.vmap(model)(x[:, None]),
    "vjp": lambda model, x: torch.func.vjp(model, x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "jacrev": lambda model, x: torch.func.jacrev(model)(x[:1, :1]),
    "hessian": lambda model, x: torch.func.hessian(lambda x: model(x).sum())(x[:1, :1]),
    "forward mode": _dual,
    "twice": lambda model, x: torch.autograd.functional.hessian(lambda x: model(x).sum(), x[:1, :1]),
}


class TestTransforms:
    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_what_cannot_work_says_what_helps(self, transform):
        mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        model = quantized(tune(mlp))
        step(model, images())
        with pytest.raises(RuntimeError, match=r"restore_activations\(model\)"):
            TRANSFORMS[transform](model, images())
        TRANSFORMS[transform](restore_activations(model), images())

    def test_where_nothing_is_kept_they_work(self):
        model = quantized(tune(Model())).eval()
        with torch.no_grad():
            torch.testing.assert_close(torch.func.vmap(model)(images()[:, None])[:, 0], model(images()))

    def test_parameters_of_a_call(self):
        model = quantized(tune(Model()))
        others = {name: p.detach() * 2 for name, p in model.named_parameters()}
        others = {name: p.requires_grad_(name.endswith("bias")) for name, p in others.items()}
        twice = tune(Model())
        with torch.no_grad():
            for parameter in twice.parameters():
                parameter.mul_(2)
        result = torch.func.functional_call(model, others, (images(),))
        torch.testing.assert_close(result, twice(images()))
        result.sum().backward()
        twice(images()).sum().backward()
        found, expected = (
            torch.cat([p.grad.flatten() for p in tensors if p.grad is not None])
            for tensors in (others.values(), twice.parameters())
        )
        assert F.cosine_similarity(found, expected, dim=0) > 0.9995


def test_selective_checkpoints_in_recorded_blocks_leave_nothing_for_a_compiler():
    from torch.fx import traceback

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            def contexts():
                return create_selective_checkpoint_contexts(lambda *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE)

            inside = lambda x: self.two(F.gelu(self.one(x)))  # noqa: E731
            return x + checkpoint(inside, x, use_reentrant=False, context_fn=contexts)

    before = dict(traceback.current_meta)
    model = quantize_activations(nn.Sequential(Block(), Block()))
    for _ in range(2):
        model(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert traceback.current_meta == before
