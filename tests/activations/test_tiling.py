"""Tiled execution gives the results and gradients of whole execution, and keeps only what the operators inside
keep."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from peft_s2a.activations.tiling import certify, inside_tile, run_tiled


class Block(nn.Module):
    """A residual MLP; returns (output, None, hidden) as some blocks do."""

    def __init__(self, width=6, hidden=12):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x, scale=1.0, **ignored):
        hidden = F.gelu(self.fc1(self.norm(x)))
        return x + scale * self.fc2(hidden), None, hidden


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = Block().double()
    block.fc1.weight.requires_grad = block.fc2.weight.requires_grad = False
    return block


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def samples(count=7, **options):
    return torch.randn(count, 5, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1), **options)


def loss(result):
    return result[0].square().sum() + result[2].sin().sum()


class TestResults:
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
    @pytest.mark.parametrize("dim", [0, 1])
    def test_output_and_gradients_equal_those_of_the_whole(self, block, size, dim):
        x = samples(requires_grad=True)
        scale = torch.randn(6, dtype=torch.double, requires_grad=True)
        wanted = [x, scale, *trainable(block)]
        whole = block(x * 2, scale=scale)
        tiled = run_tiled(block.forward, (x * 2,), {"scale": scale}, trainable(block), size, dim)
        assert tiled[1] is None
        for expected, actual in zip((whole[0], whole[2]), (tiled[0], tiled[2])):
            torch.testing.assert_close(actual, expected)
        expected, actual = (torch.autograd.grad(loss(result), wanted) for result in (whole, tiled))
        for one, other in zip(expected, actual):
            torch.testing.assert_close(other, one)

    def test_only_parameters_need_gradients(self, block):
        x = samples()
        expected = torch.autograd.grad(loss(block(x)), trainable(block))
        actual = torch.autograd.grad(loss(run_tiled(block.forward, (x,), {}, trainable(block), 2)), trainable(block))
        for one, other in zip(expected, actual):
            torch.testing.assert_close(other, one)

    def test_one_of_several_outputs_used(self, block):
        x = samples(requires_grad=True)
        (expected,) = torch.autograd.grad(block(x)[0].sum(), x)
        (actual,) = torch.autograd.grad(run_tiled(block.forward, (x,), {}, trainable(block), 3)[0].sum(), x)
        torch.testing.assert_close(actual, expected)

    def test_unused_parameter_gets_no_gradient(self, block):
        unused = nn.Parameter(torch.ones(2, dtype=torch.double))
        result = run_tiled(block.forward, (samples(),), {}, [unused, block.fc1.bias], 2)
        loss(result).backward()
        assert unused.grad is None
        assert block.fc1.bias.grad is not None

    def test_parameters_with_the_same_gradient_are_added_up_apart(self):
        a, b = (nn.Parameter(torch.zeros(6, dtype=torch.double)) for _ in range(2))
        run_tiled(lambda x: x + a + b, (samples(),), {}, [a, b], 1).sum().backward()
        torch.testing.assert_close(a.grad, torch.full((6,), 35.0, dtype=torch.double))
        torch.testing.assert_close(b.grad, a.grad)

    def test_several_rows_of_output_for_one_of_input(self):
        x = samples(requires_grad=True)

        def windows(x):
            return x.tanh().reshape(-1, 3)

        expected, actual = windows(x), run_tiled(windows, (x,), {}, [], 2)
        torch.testing.assert_close(actual, expected)
        weight = torch.randn_like(expected)
        grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (expected, actual)]
        torch.testing.assert_close(*grads)

    def test_masks_are_tiled_alike(self):
        x, mask = samples(requires_grad=True), torch.rand(7, 1, 5, 5, dtype=torch.double)

        def attend(x, mask=None):
            return F.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3, attn_mask=mask).squeeze(1)

        assert certify(nn.Identity(), attend, (x,), {"mask": mask}, masks=[1]).reason is None
        expected, actual = attend(x, mask), run_tiled(attend, (x,), {"mask": mask}, [], 2, masks=[1])
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected)))

    def test_outputs_without_gradient(self):
        x = samples(requires_grad=True)
        y, index = run_tiled(lambda x: (x.exp(), x.argmax(-1)), (x,), {}, [], 2)
        assert y.requires_grad and not index.requires_grad
        torch.testing.assert_close(index, x.argmax(-1))

    @pytest.mark.parametrize("layout", [(0, 2, 1), (0, 1, 2)])
    def test_memory_layout_is_the_stock_one(self, layout):
        x = samples(requires_grad=True)

        def function(x):
            return x.permute(layout).contiguous().permute(layout) * 2

        tiled = run_tiled(function, (x,), {}, [], 2)
        assert tiled.stride() == function(x).stride()

    def test_channels_last_images(self):
        x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
        y = run_tiled(torch.tanh, (x,), {}, [], 1)
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.sum().backward()
        torch.testing.assert_close(x.grad, 1 - x.detach().tanh() ** 2)

    def test_nested_tiles(self, block):
        x = samples(requires_grad=True)

        def inner(x):
            assert inside_tile()
            return run_tiled(block.forward, (x,), {}, trainable(block), 2, 1)

        wanted = [x, *trainable(block)]
        expected = torch.autograd.grad(loss(block(x)), wanted)
        actual = torch.autograd.grad(loss(run_tiled(inner, (x,), {}, trainable(block), 3)), wanted)
        assert not inside_tile()
        for one, other in zip(expected, actual):
            torch.testing.assert_close(other, one)

    def test_autocast(self, block):
        block = block.float()
        x = samples().float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = block(x)
            actual = run_tiled(block.forward, (x,), {}, trainable(block), 2)
        assert actual[2].dtype == expected[2].dtype == torch.bfloat16
        torch.testing.assert_close(actual[0], expected[0])
        wanted = [x, *trainable(block)]
        for one, other in zip(*(torch.autograd.grad(r[0].sum(), wanted) for r in (expected, actual))):
            torch.testing.assert_close(other, one, rtol=2e-2, atol=2e-2)

    def test_error_inside_leaves_no_trace(self):
        def fails(x):
            raise ArithmeticError("inside")

        with pytest.raises(ArithmeticError):
            run_tiled(fails, (samples(),), {}, [], 2)
        assert not inside_tile()


class TestAutograd:
    def test_tensors_that_no_operator_keeps_are_freed(self):
        frozen = nn.Linear(6, 24).double().requires_grad_(False)
        seen = []

        def function(x):
            hidden = frozen(x)
            seen.extend([weakref.ref(hidden), weakref.ref(x)])
            return hidden.sum(-1)

        y = run_tiled(function, (samples(requires_grad=True) * 2,), {}, [], 2)
        gc.collect()
        assert all(reference() is None for reference in seen)
        y.sum().backward()

    def test_input_is_not_kept(self):
        frozen = nn.Linear(6, 6).double().requires_grad_(False)
        leaf = samples(requires_grad=True)
        x = leaf * 2
        reference = weakref.ref(x)
        y = run_tiled(frozen, (x,), {}, [], 2)
        del x
        gc.collect()
        assert reference() is None
        y.sum().backward()
        torch.testing.assert_close(leaf.grad, (2 * frozen.weight.sum(0)).expand_as(leaf))

    def test_graphs_are_freed_as_backward_runs(self, block):
        kept = []

        class Keeper(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(y := x.clone())
                kept.append(weakref.ref(y))
                return x * 2

            @staticmethod
            def backward(ctx, grad):
                alive.append(sum(reference() is not None for reference in kept))
                return grad * 2

        alive = []
        x = samples(6, requires_grad=True)
        run_tiled(Keeper.apply, (x * 1,), {}, [], 2).sum().backward()
        assert alive == [3, 2, 1]

    def test_gradient_hooks_fire_once(self, block):
        calls = []
        block.fc1.bias.register_post_accumulate_grad_hook(lambda p: calls.append(p))
        loss(run_tiled(block.forward, (samples(),), {}, trainable(block), 1)).backward()
        assert len(calls) == 1

    def test_retain_graph(self, block):
        x = samples(requires_grad=True)
        result = loss(run_tiled(block.forward, (x,), {}, trainable(block), 2))
        (first,) = torch.autograd.grad(result, x, retain_graph=True)
        (second,) = torch.autograd.grad(result, x)
        torch.testing.assert_close(first, second)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(result, x)

    def test_double_backward_is_refused(self, block):
        x = samples(requires_grad=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(loss(run_tiled(block.forward, (x,), {}, [], 2)), x, create_graph=True)

    def test_saved_tensor_hooks_see_what_is_kept_inside(self, block):
        packed = []
        x = samples(requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.clone(), lambda t: t):
            result = loss(run_tiled(block.forward, (x,), {}, trainable(block), 2))
        assert (2, 5, 12) in packed
        torch.testing.assert_close(torch.autograd.grad(result, x), torch.autograd.grad(loss(block(x)), x))

    def test_save_on_cpu(self, block):
        x = samples(requires_grad=True)
        with torch.autograd.graph.save_on_cpu():
            result = loss(run_tiled(block.forward, (x,), {}, trainable(block), 2))
        torch.testing.assert_close(torch.autograd.grad(result, x), torch.autograd.grad(loss(block(x)), x))

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_recomputes_once(self, block, use_reentrant):
        calls = []

        def layer(x):
            calls.append(x)
            return run_tiled(block.forward, (x,), {}, trainable(block), 2)[0]

        x = samples(requires_grad=True)
        wanted = [x, *trainable(block)]
        expected = torch.autograd.grad(block(x)[0].square().sum(), wanted)
        checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
        assert len(calls) == 2
        for one, tensor in zip(expected, wanted):
            torch.testing.assert_close(tensor.grad, one)

    def test_checkpointing_inside_a_tile(self, block):
        def layer(x):
            return checkpoint(lambda x: block(x)[0], x, use_reentrant=False)

        x = samples(requires_grad=True)
        expected = torch.autograd.grad(block(x)[0].square().sum(), x)
        actual = torch.autograd.grad(run_tiled(layer, (x,), {}, trainable(block), 2).square().sum(), x)
        torch.testing.assert_close(actual, expected)

    def test_fake_tensors(self):
        with FakeTensorMode():
            block = Block()
            x = torch.randn(4, 5, 6, requires_grad=True)
            assert certify(block, block.forward, (x,), {}).reason is None
            result = run_tiled(block.forward, (x,), {}, trainable(block), 1)
            result[0].sum().backward()
            assert x.grad.shape == x.shape


class StochasticDepth(nn.Module):
    def __init__(self, draw, writes=False):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.draw = draw

    def forward(self, x):
        x = x + self.fc(x) * self.draw(x)
        return x + x.tanh() * self.draw(x)


DRAWS = {
    "rand": lambda x: torch.floor(torch.rand((x.shape[0], 1, 1), dtype=x.dtype, device=x.device) + 0.5),
    "rand sizes": lambda x: torch.rand(x.shape[0], 1, 1, dtype=x.dtype),
    "rand size=": lambda x: torch.rand(size=(x.shape[0], 1, 1), dtype=x.dtype),
    "bernoulli_": lambda x: x.new_empty((x.shape[0], 1, 1)).bernoulli_(0.5).div_(0.5),
}


class TestCertificates:
    def test_independent_samples_and_tokens(self, block):
        for dim in (0, 1):
            certificate = certify(block, block.forward, (samples(),), {}, dim)
            assert certificate.reason is None and not certificate.draws

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: x - x.mean(0),
            lambda x: x + 1e-4 * x.softmax(0),
            lambda x: F.batch_norm(x, None, None, training=True),
            lambda x: x.flip(0) * 2,
        ],
    )
    def test_rows_that_influence_one_another(self, function):
        assert "influence" in certify(nn.Identity(), function, (samples(),), {}).reason

    @pytest.mark.parametrize("function", [lambda x: x[0], lambda x: x.sum(), lambda x: (x, x.shape[0])])
    def test_results_without_rows(self, function):
        assert certify(nn.Identity(), function, (samples(),), {}).reason is not None

    def test_functions_that_fail_on_fewer_rows(self):
        assert "fails" in certify(nn.Identity(), lambda x: x.view(7, 30), (samples(),), {}).reason

    def test_small_contributions_of_other_rows_are_found(self):
        certificate = certify(nn.Identity(), lambda x: x + 1e-6 * x.mean(0), (samples(),), {})
        assert "influence" in certificate.reason

    def test_written_buffers(self):
        norm = nn.BatchNorm1d(5).double()
        before = copy.deepcopy(norm.state_dict())
        assert "buffers" in certify(norm, norm, (samples(),), {}).reason
        assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())
        assert certify(norm.eval(), norm, (samples(),), {}).reason is None

    def test_random_numbers_for_every_value(self):
        assert "random" in certify(nn.Identity(), lambda x: F.dropout(x, 0.5), (samples(),), {}).reason

    def test_trainable_tensors_from_elsewhere(self, block):
        other = torch.ones(6, dtype=torch.double, requires_grad=True)
        assert "not its own" in certify(block, lambda x: x * other, (samples(),), {}).reason

    def test_trial_leaves_nothing_behind(self, block):
        module = StochasticDepth(DRAWS["rand"]).double()
        before = torch.get_rng_state()
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda t: t):
            certify(module, module, (samples(),), {})
        assert torch.equal(before, torch.get_rng_state())
        assert not packed
        assert all(p.grad is None for p in module.parameters())

    @pytest.mark.parametrize("draw", DRAWS)
    def test_stochastic_depth_draws_the_stock_numbers(self, draw):
        module = StochasticDepth(DRAWS[draw]).double()
        x = samples(requires_grad=True)
        certificate = certify(module, module, (x,), {})
        assert certificate.reason is None and certificate.draws
        torch.manual_seed(3)
        expected = module(x)
        following = torch.rand(1)
        torch.manual_seed(3)
        actual = run_tiled(module, (x,), {}, trainable(module), 2, draws=True)
        torch.testing.assert_close(actual, expected)
        assert torch.equal(torch.rand(1), following)
        wanted = [x, *trainable(module)]
        for one, other in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (expected, actual))):
            torch.testing.assert_close(other, one)
