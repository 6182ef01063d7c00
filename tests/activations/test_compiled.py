"""The fused CPU kernels against the reference, on fresh random inputs of odd shapes, strides, dtypes and widths."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_s2a.activations.backends import compiled, reference, select
from peft_s2a.activations.codec import WIDTHS
from peft_s2a.activations.levels import code_table


pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C compiler")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {
    "dtype": st.sampled_from(DTYPES),
    "bits": st.sampled_from(WIDTHS),
    "seed": st.integers(0, 2**31),
}
ROWS = {
    **CASES,
    "rows": st.integers(0, 9),
    "count": st.one_of(st.integers(1, 150), st.sampled_from((64, 128))),
    "group": st.sampled_from((1, 16, 64)),
    "rounding": st.sampled_from((None, 3, 2**62 + 12345)),
}


def random(shape, dtype, seed) -> Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_same_codes(ours: Tensor, theirs: Tensor, bits: int) -> None:
    """Equal bytes, but for values that rounding of intermediate results puts on the other side of a threshold."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.uint8
    assert (ours != theirs).sum() <= 1 + ours.numel() // 500


def assert_same_scales(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.uint8
    assert (ours != theirs).sum() <= 1 + ours.numel() // 200


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    tolerance = 2e-6 if theirs.dtype == torch.float32 else 1e-2
    assert torch.allclose(ours.double(), theirs.double(), rtol=tolerance, atol=10 * tolerance)


class TestActivationCodes:
    @settings(max_examples=20, deadline=None)
    @given(**CASES, count=st.integers(0, 3000), name=st.sampled_from(("gelu", "silu", "tanh", "relu")))
    def test_codes_and_gradients_are_the_references(self, dtype, bits, seed, count, name):
        table = code_table(name, (), bits, None, False)
        x, grad = random(count, dtype, seed), random(count, dtype, seed + 1)
        theirs = reference.encode_steps(x, table.thresholds, table.codes, table.bits)
        assert torch.equal(compiled.encode_steps(x, table.thresholds, table.codes, table.bits), theirs)
        scaled = [backend.scale_by_levels(grad, theirs, table.levels, table.bits) for backend in (compiled, reference)]
        assert_close(*scaled)

    def test_strided_input_is_read_in_its_own_order(self):
        table = code_table("gelu", (), 4, None, False)
        x = torch.randn(64, 30)[:, ::2].t().reshape(-1)[::3]
        theirs = reference.encode_steps(x, table.thresholds, table.codes, 4)
        assert torch.equal(compiled.encode_steps(x, table.thresholds, table.codes, 4), theirs)


class TestRows:
    @settings(max_examples=25, deadline=None)
    @given(**ROWS)
    def test_groups(self, dtype, bits, seed, rows, count, group, rounding):
        x = random((rows, count), dtype, seed)
        theirs = reference.encode_groups(x, bits, group, rounding)
        ours = compiled.encode_groups(x, bits, group, rounding)
        assert_same_codes(ours[0], theirs[0], bits)
        assert_same_scales(ours[1], theirs[1])
        decoded = [backend.decode_groups(*theirs, bits, group, count, dtype) for backend in (compiled, reference)]
        assert_close(*decoded)

    @settings(max_examples=25, deadline=None)
    @given(
        **ROWS,
        center=st.booleans(),
        by_column=st.booleans(),
        weighted=st.booleans(),
        wanted=st.tuples(*[st.booleans()] * 3),
    )
    def test_norms(self, dtype, bits, seed, rows, count, group, rounding, center, by_column, weighted, wanted):
        x, grad = random((rows, count), dtype, seed), random((rows, count), dtype, seed + 1)
        weight = random(count, dtype, seed + 2) if weighted else None
        by_column = by_column and rows > 0
        theirs = reference.encode_norm(x, 1e-5, center, by_column, bits, group, rounding)
        ours = compiled.encode_norm(x, 1e-5, center, by_column, bits, group, rounding)
        assert_same_codes(ours[0], theirs[0], bits)
        assert torch.allclose(ours[2], theirs[2], rtol=1e-4)
        gradients = [
            backend.norm_backward(grad, *theirs, weight, center, bits, group, list(wanted))
            for backend in (compiled, reference)
        ]
        for our, their, want in zip(*gradients, wanted):
            assert our.shape == their.shape
            if want:
                bound = 1e-4 if dtype == torch.float32 else 2e-2
                assert torch.allclose(
                    our.double(), their.double(), rtol=bound, atol=bound * (1 + their.double().norm())
                )

    @settings(max_examples=25, deadline=None)
    @given(**ROWS, center=st.booleans(), keep_mean=st.booleans())
    def test_heads_of_any_strides(self, dtype, bits, seed, rows, count, group, rounding, center, keep_mean):
        x = random((2, rows, 3, count), dtype, seed).transpose(1, 2)
        theirs = reference.encode_heads(x, bits, group, center, keep_mean, rounding)
        ours = compiled.encode_heads(x, bits, group, center, keep_mean, rounding)
        assert ours[2].shape == theirs[2].shape
        assert torch.allclose(ours[2].float(), theirs[2].float(), rtol=1e-2, atol=1e-2)
        if not center:  # the mean's last bit in bfloat16 shifts all values of a head
            assert_same_codes(ours[0], theirs[0], bits)


class TestAttention:
    @settings(max_examples=60, deadline=None)
    @given(
        **CASES,
        samples=st.integers(0, 2),
        heads=st.integers(1, 3),
        length=st.integers(0, 40),
        keys=st.integers(0, 40),
        dim=st.integers(1, 70),
        value_dim=st.integers(1, 70),
        masked=st.sampled_from((None, "bool", "float", "row", "column")),
        causal=st.booleans(),
    )
    def test_gradients_are_the_references(
        self, dtype, bits, seed, samples, heads, length, keys, dim, value_dim, masked, causal
    ):
        sizes = ((length, dim), (keys, dim), (keys, value_dim))
        tensors = [random((samples, n, heads, d), dtype, seed + i).transpose(1, 2) for i, (n, d) in enumerate(sizes)]
        coded = [list(reference.encode_heads(x, bits, 16, True, i == 0, None)) for i, x in enumerate(tensors)]
        grad = random((samples, heads, length, value_dim), dtype, seed + 3)
        shapes = {"row": (1, 1, 1, keys), "column": (samples, heads, length, 1)}
        mask = random(shapes.get(masked, (1, heads, length, keys)), dtype, seed + 4) if masked else None
        mask = mask > -1 if masked == "bool" else mask
        mask = mask.float() if masked and masked != "bool" else mask
        arguments = (*coded, mask, causal, 0.1, bits, 16, dim, False)
        ours = compiled.attention_backward(grad, *arguments)
        theirs = reference.attention_backward(grad.float(), *arguments)  # in bfloat16 its scores would be rounded
        for our, their in zip(ours[:3], theirs[:3]):
            assert our.shape == their.shape and our.dtype == dtype
            bound = 1e-4 if dtype == torch.float32 else 1e-2
            size = their.abs().amax().item() if their.numel() else 0
            assert torch.allclose(our.float(), their, rtol=bound, atol=bound * (1 + size))

    @settings(max_examples=40, deadline=None)
    @given(
        **CASES,
        samples=st.integers(0, 2),
        heads=st.integers(1, 3),
        length=st.integers(0, 210),
        prompts=st.integers(1, 20),
        dim=st.integers(1, 70),
        value_dim=st.integers(1, 70),
    )
    def test_prompts(self, dtype, bits, seed, samples, heads, length, prompts, dim, value_dim):
        query = random((samples, length, heads, dim), dtype, seed).transpose(1, 2)
        attended, grad = (random((samples, length, heads * value_dim), dtype, seed + i) for i in (1, 2))
        key, value = (
            random((heads, prompts, dim), dtype, seed + 3),
            random((heads, prompts, value_dim), dtype, seed + 4),
        )
        wide = [x.float() for x in (attended, query, key, value)]
        our, their = (
            compiled.prompt_attention(attended, query, key, value, 0.1),
            reference.prompt_attention(*wide, 0.1),
        )
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        assert our.dtype == dtype and torch.allclose(our.float(), their, rtol=bound, atol=bound)
        coded = list(reference.encode_heads(query, bits, 16, True, True, None))
        ours = compiled.prompt_attention_backward(grad, coded, key, value, 0.1, bits, 16)
        theirs = reference.prompt_attention_backward(grad.float(), coded, *wide[2:], 0.1, bits, 16)
        for our, their in zip(ours, theirs):
            size = their.abs().amax().item() if their.numel() else 0
            assert our.shape == their.shape
            assert torch.allclose(our.float(), their, rtol=10 * bound, atol=10 * bound * (1 + size))

    def test_long_sequences_are_taken_in_tiles_of_queries(self):
        tensors = [random((1, 2, 700, d), torch.float32, d) for d in (24, 24, 48)]
        coded = [list(reference.encode_heads(x, 4, 16, True, i == 0, None)) for i, x in enumerate(tensors)]
        arguments = (random((1, 2, 700, 48), torch.float32, 9), *coded, None, False, 0.2, 4, 16, 24, False)
        pairs = zip(compiled.attention_backward(*arguments)[:3], reference.attention_backward(*arguments)[:3])
        for ours, theirs in pairs:
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().amax().item())


class TestSelection:
    def test_auto_takes_the_kernels_on_cpu_and_the_reference_for_what_they_lack(self):
        cpu = torch.device("cpu")
        assert select("auto", cpu, "encode_norm") is compiled
        assert select("compiled", cpu, "encode_norm") is compiled
        assert select("reference", cpu, "encode_norm") is reference
        assert (
            compiled.encode_norm(torch.randn(2, 8).double(), 1e-5, True, False, 4, 8, None)[2].dtype == torch.float64
        )

    def test_without_a_compiler_one_warning_and_the_reference(self, tmp_path):
        script = """
            import warnings, torch
            from peft_s2a.activations.backends import reference, select
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                chosen = [select("auto", torch.device("cpu"), "encode_norm") for _ in range(3)]
            assert all(module is reference for module in chosen)
            messages = [str(w.message) for w in caught if "fused CPU kernels" in str(w.message)]
            assert len(messages) == 1 and "C compiler" in messages[0], messages
        """
        environment = {**os.environ, "CC": str(tmp_path / "no-such-compiler"), "XDG_CACHE_HOME": str(tmp_path)}
        subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment)
