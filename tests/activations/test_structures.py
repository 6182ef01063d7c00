"""The quantised computations of S2A's structures against exact autograd."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from peft_s2a.activations.operators import (
    add_low_rank,
    add_prompt_attention,
    quantized_add_low_rank,
    quantized_add_prompt_attention,
)
from peft_s2a.activations.quantizer import Quantizer


def _leaves(*shapes: tuple[int, ...], dtype=torch.float64) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _gradients(function, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    output = function(*inputs)
    weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(3))
    return output.detach(), list(torch.autograd.grad((output * weights).sum(), inputs))


CASES = {
    "prompt": (
        [(3, 11, 24), (3, 11, 24), (5, 24), (5, 24), (4,)],
        lambda *x: add_prompt_attention(*x, 4),
        lambda quantizer: lambda *x: quantized_add_prompt_attention(*x, 4, quantizer=quantizer),
    ),
    "prompt over windows": (
        [(6, 7, 12), (2, 3, 7, 12), (4, 12), (4, 12), (2,)],
        lambda *x: add_prompt_attention(*x, 2),
        lambda quantizer: lambda *x: quantized_add_prompt_attention(*x, 2, quantizer=quantizer),
    ),
    "side": (
        [(3, 11, 24), (3, 11, 7), (24, 7)],
        lambda *x: add_low_rank(*x, 0.5),
        lambda quantizer: lambda *x: quantized_add_low_rank(*x, 0.5, quantizer=quantizer),
    ),
    "side with activation": (
        [(3, 11, 24), (3, 11, 7), (24, 7)],
        lambda *x: add_low_rank(*x, 0.5, "gelu"),
        lambda quantizer: lambda *x: quantized_add_low_rank(*x, 0.5, "gelu", quantizer=quantizer),
    ),
    "side on sequences, channels first": (
        [(3, 24, 11), (3, 7, 11), (24, 7)],
        lambda *x: add_low_rank(*x, 0.5, channels_first=True),
        lambda quantizer: lambda *x: quantized_add_low_rank(*x, 0.5, channels_first=True, quantizer=quantizer),
    ),
    "side on images, with activation": (
        [(3, 24, 4, 5), (3, 7, 4, 5), (24, 7)],
        lambda *x: add_low_rank(*x, 0.5, "gelu", channels_first=True),
        lambda quantizer: lambda *x: quantized_add_low_rank(*x, 0.5, "gelu", True, quantizer=quantizer),
    ),
}


@pytest.mark.parametrize("case", CASES)
class TestAgainstExactAutograd:
    def test_output_is_the_stock_functions(self, case):
        shapes, stock, quantized = CASES[case]
        inputs = _leaves(*shapes)
        assert torch.equal(stock(*inputs), quantized(Quantizer(backend="reference"))(*inputs))

    @pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.2)])
    def test_gradients_are_close_and_closer_with_more_bits(self, case, bits, error):
        torch.manual_seed(0)
        shapes, stock, quantized = CASES[case]
        inputs = _leaves(*shapes)
        _, exact = _gradients(stock, inputs)
        _, coded = _gradients(quantized(Quantizer(bits=bits)), inputs)
        for ours, theirs in zip(coded, exact):
            assert (ours - theirs).norm() <= error * theirs.norm()
            assert cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 1 - error**2

    def test_only_codes_and_small_tensors_are_kept(self, case):
        shapes, _, quantized = CASES[case]
        inputs = _leaves(*shapes, dtype=torch.float32)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            quantized(Quantizer())(*inputs)
        large = max(inputs[:2], key=torch.Tensor.numel)
        assert not any(x.is_floating_point() and x.numel() >= large.numel() for x in kept)
        assert any(x.dtype == torch.uint8 for x in kept)

    def test_double_backward_is_refused(self, case):
        shapes, _, quantized = CASES[case]
        inputs = _leaves(*shapes)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(quantized(Quantizer())(*inputs).sum(), inputs[0], create_graph=True)


class TestLowRankOnImages:
    """`add_low_rank` with channels first against the convolution that it stands for."""

    @staticmethod
    def _inputs(memory_format=torch.contiguous_format, batch=3):
        base, hidden, up = torch.randn(batch, 24, 4, 5), torch.randn(batch, 7, 4, 5), torch.randn(24, 7)
        return [x.requires_grad_() for x in (base.to(memory_format=memory_format), hidden, up)]

    @staticmethod
    def _convolved(base, hidden, up):
        return base + torch.nn.functional.conv2d(torch.nn.functional.gelu(hidden), 0.5 * up[..., None, None])

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("coded", [False, True])
    def test_output_is_the_convolutions_and_lies_in_memory_as_the_base(self, memory_format, coded):
        inputs = self._inputs(memory_format)
        function = CASES["side on images, with activation"]
        output = (function[2](Quantizer()) if coded else function[1])(*inputs)
        torch.testing.assert_close(output, self._convolved(*inputs), atol=1e-5, rtol=1e-5)
        assert output.is_contiguous(memory_format=memory_format)
        output.add_(1)  # as models do

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_gradients_at_eight_bits_are_the_convolutions(self, memory_format):
        inputs = self._inputs(memory_format)
        function = CASES["side on images, with activation"][2](Quantizer(bits=8))
        _, exact = _gradients(self._convolved, inputs)
        _, coded = _gradients(function, inputs)
        for ours, theirs in zip(coded, exact):
            assert (ours - theirs).norm() <= 0.02 * theirs.norm()

    def test_an_empty_batch_has_gradients_of_zero(self):
        inputs = self._inputs(batch=0)
        _, (_, _, up) = _gradients(CASES["side on images, with activation"][2](Quantizer()), inputs)
        assert torch.equal(up, torch.zeros(24, 7))
