"""Attention masks: gradients are the stock operator's for any values, and what is kept of masks is what they are made
of."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_s2a.activations.config import ActivationQuantizationConfig
from peft_s2a.activations.interception import OperatorMode


SAMPLES, HEADS, TOKENS, WIDTH = 4, 3, 16, 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mode(backend: str = "auto") -> OperatorMode:
    return OperatorMode(ActivationQuantizationConfig(bits=8, backend=backend), "module")


def attend(mask, operators=None, dtype=torch.float32, shape=(SAMPLES, HEADS, TOKENS, WIDTH), **options):
    """Gradients of attention for queries, keys and values, and the tensors that autograd kept; ``mask()`` is called
    under the mode."""
    inputs = [draw(*shape, seed=seed).to(dtype).requires_grad_() for seed in (1, 2, 3)]
    kept = []
    with operators or mode() if operators != "stock" else torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = F.scaled_dot_product_attention(*inputs, attn_mask=mask(), **options)
    return torch.autograd.grad(y, inputs, draw(*y.shape, seed=4).to(dtype)), kept


def assert_close(ours, theirs):
    for one, other in zip(ours, theirs):
        one, other = one.double(), other.double()
        assert (one - other).norm() < 0.03 * other.norm()


def hidden_rows(value: float, *shape: int) -> Tensor:
    mask = torch.zeros(shape)
    mask[1] = value
    mask[2, ..., -3:] = value
    return mask


def with_infinities() -> Tensor:
    mask = draw(1, HEADS, TOKENS, TOKENS)
    mask[..., 5:9] = -torch.inf
    return mask


def far_alibi() -> Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125]).view(1, HEADS, 1, 1)
    return (-slopes * torch.arange(1500 + TOKENS, 1500, -1)).expand(1, HEADS, TOKENS, TOKENS)


MASKS = {
    "rows hidden by the minimum": lambda: hidden_rows(torch.finfo(torch.float32).min, SAMPLES, 1, TOKENS, TOKENS),
    "rows hidden by -1e9": lambda: hidden_rows(-1e9, SAMPLES, 1, TOKENS, TOKENS),
    "samples hidden by -1e9": lambda: hidden_rows(-1e9, SAMPLES, 1, 1, TOKENS),
    "rows hidden by minus infinity": lambda: hidden_rows(-torch.inf, SAMPLES, 1, TOKENS, TOKENS),
    "rows hidden by a boolean": lambda: hidden_rows(1.0, SAMPLES, 1, TOKENS, TOKENS) == 0,
    "two values": lambda: hidden_rows(-100.0, SAMPLES, 1, TOKENS, TOKENS),
    "minus infinity for every head": with_infinities,
    "ALiBi from position 1500": far_alibi,
    "noise far from zero": lambda: 3000 + draw(1, HEADS, TOKENS, TOKENS),
    "noise at 1e5": lambda: 1e5 + draw(1, HEADS, TOKENS, TOKENS),
    "every value": lambda: 5 * draw(SAMPLES, HEADS, TOKENS, TOKENS),
}


class TestGradients:
    @pytest.mark.parametrize("backend", ["reference", "compiled"])
    @pytest.mark.parametrize("name", MASKS)
    def test_are_the_stock_ones(self, name, backend):
        assert_close(attend(MASKS[name], mode(backend))[0], attend(MASKS[name], "stock")[0])

    @pytest.mark.parametrize("shape", [(SAMPLES, TOKENS, WIDTH), (TOKENS, WIDTH)])
    def test_are_those_of_the_composite_form_where_stock_computes_it(self, shape):
        def mask():
            return torch.full((TOKENS, TOKENS), -1e9)

        assert_close(attend(mask, shape=shape)[0], attend(mask, "stock", shape=shape)[0])

    def test_are_the_stock_ones_where_the_mask_is_trained(self):
        bias = hidden_rows(-1e9, SAMPLES, 1, TOKENS, TOKENS).requires_grad_()
        assert_close(attend(lambda: bias)[0], attend(lambda: bias, "stock")[0])

    @pytest.mark.parametrize("backend", ["reference", "compiled"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("scale", [None, 3.0])
    def test_are_those_of_wide_computations_in_half_precision(self, dtype, backend, scale):
        ours, _ = attend(lambda: None, mode(backend), dtype, scale=scale)
        theirs, _ = attend(lambda: None, "stock", scale=scale)
        for one, other in zip(ours, theirs):
            assert (one.float() - other).norm() < 0.06 * other.norm()

    @pytest.mark.parametrize("which", ["the sum", "a term", "a view of the sum"])
    def test_are_right_after_a_change_in_place(self, which):
        def mask():
            bias, windows = draw(1, HEADS, TOKENS, TOKENS), draw(SAMPLES, 1, TOKENS, TOKENS, seed=5)
            total = bias + windows
            changed = {"the sum": total, "a term": windows, "a view of the sum": total[:, 1]}[which]
            changed[..., :3] = -1e4
            return total

        assert_close(attend(mask)[0], attend(mask, "stock")[0])

    def test_refuse_terms_that_change_before_backward(self):
        windows = draw(SAMPLES, 1, TOKENS, TOKENS)
        x = draw(SAMPLES, HEADS, TOKENS, WIDTH).requires_grad_()
        with mode():
            y = F.scaled_dot_product_attention(x, x, x, attn_mask=draw(1, HEADS, TOKENS, TOKENS) + windows)
        windows += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class TestKept:
    def test_the_terms_of_a_sum(self):
        bias, windows = draw(1, HEADS, TOKENS, TOKENS), draw(SAMPLES, 1, TOKENS, TOKENS)
        ours, kept = attend(lambda: bias + windows)
        assert any(t is bias for t in kept) and any(t is windows for t in kept)
        assert not any(t.numel() == SAMPLES * HEADS * TOKENS * TOKENS for t in kept)
        assert_close(ours, attend(lambda: bias + windows, "stock")[0])

    def test_one_mask_for_all_samples_of_a_repeated_one(self):
        windows = torch.where(draw(2, TOKENS, TOKENS) > 0.5, 0.0, -100.0)

        def mask():
            repeated = windows.unsqueeze(1).unsqueeze(0).expand(2, -1, -1, -1, -1).reshape(-1, 1, TOKENS, TOKENS)
            return draw(1, HEADS, TOKENS, TOKENS) + repeated

        ours, kept = attend(mask)
        assert max(t.numel() for t in kept if t.is_floating_point()) <= HEADS * TOKENS * TOKENS
        assert_close(ours, attend(mask, "stock")[0])

    def test_nothing_of_a_bias_that_a_frozen_table_gives(self):
        table = nn.Parameter(draw(20, HEADS), requires_grad=False)
        index = torch.arange(TOKENS * TOKENS).view(TOKENS, TOKENS) % 20

        def mask():
            bias = table[index].view(TOKENS, TOKENS, -1)
            return bias.permute(2, 0, 1).contiguous().unsqueeze(0)

        ours, kept = attend(mask)
        assert [t for t in kept if t.is_floating_point() and t.dtype != torch.bfloat16] == [table]
        assert_close(ours, attend(mask, "stock")[0])

    def test_nothing_of_a_mask_made_of_numbers(self):
        def mask():
            position = torch.arange(TOKENS)
            causal = position[None, :] - position[:, None]
            return causal.to(torch.float32).masked_fill(causal > 0, -torch.inf)[None, None]

        ours, kept = attend(mask)
        assert not any(t.dtype == torch.float32 for t in kept)
        assert_close(ours, attend(mask, "stock")[0])

    def test_the_mask_itself_once_for_all_layers(self):
        mask = draw(SAMPLES, 1, TOKENS, TOKENS)
        operators = [mode(), mode()]
        kept = [attend(lambda: mask, which)[1] for which in operators]
        assert all(any(t is mask for t in of_one) for of_one in kept)

    def test_the_trained_table_gets_its_gradient(self):
        table = nn.Parameter(draw(TOKENS * TOKENS, HEADS))
        x = draw(SAMPLES, HEADS, TOKENS, WIDTH).requires_grad_()

        def loss():
            bias = table[torch.arange(TOKENS * TOKENS)].view(TOKENS, TOKENS, -1).permute(2, 0, 1).unsqueeze(0)
            return F.scaled_dot_product_attention(x, x, x, attn_mask=bias).square().sum()

        with mode():
            ours = torch.autograd.grad(loss(), table)
        assert_close(ours, torch.autograd.grad(loss(), table))
