"""The fused CPU kernels against the reference, see `kernel_checks`."""

import os
import subprocess
import sys
import textwrap

import kernel_checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_s2a.activations.backends import compiled
from peft_s2a.activations.ops import op_set


pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C compiler")

HEAD_SIZES = {"dim": st.integers(1, 70), "value_dim": st.integers(1, 70)}


class TestActivationCodes:
    @settings(max_examples=40, deadline=None)
    @given(**kernel_checks.VALUES)
    def test_codes_and_gradients_are_the_references(self, **case):
        kernel_checks.check_activation_codes(compiled, "cpu", **case)

    @pytest.mark.parametrize("bits", [3, 4])
    def test_strided_input_is_read_in_its_own_order(self, bits):
        kernel_checks.check_strided_values(compiled, "cpu", bits)


class TestRows:
    @settings(max_examples=100, deadline=None)
    @given(**kernel_checks.ROWS)
    def test_groups(self, **case):
        kernel_checks.check_groups(compiled, "cpu", **case)

    @settings(max_examples=100, deadline=None)
    @given(**kernel_checks.NORMS)
    def test_norms(self, **case):
        kernel_checks.check_norms(compiled, "cpu", **case)

    @pytest.mark.parametrize("scale", kernel_checks.MAGNITUDES)
    def test_magnitudes_at_the_ends_of_float32(self, scale):
        kernel_checks.check_magnitude(compiled, "cpu", scale)

    def test_sums_over_many_rows(self):
        kernel_checks.check_sums_over_many_rows(compiled, "cpu")

    @settings(max_examples=60, deadline=None)
    @given(**kernel_checks.CHANNELS)
    def test_channels(self, **case):
        kernel_checks.check_channels(compiled, "cpu", **case)

    @settings(max_examples=60, deadline=None)
    @given(**kernel_checks.ROWS)
    def test_softmax(self, **case):
        kernel_checks.check_softmax(compiled, "cpu", **case)

    @settings(max_examples=60, deadline=None)
    @given(**kernel_checks.GATES)
    def test_gates(self, **case):
        kernel_checks.check_gates(compiled, "cpu", **case)

    @settings(max_examples=50, deadline=None)
    @given(**kernel_checks.HEADS, whole_rows=st.booleans())
    def test_heads_of_any_strides(self, **case):
        kernel_checks.check_heads(compiled, "cpu", **case)


@settings(max_examples=200, deadline=None)
@given(**kernel_checks.POOLS)
def test_max_pooling(**case):
    kernel_checks.check_max_pooling(compiled, "cpu", **case)


class TestAttention:
    @settings(max_examples=60, deadline=None)
    @given(
        **kernel_checks.CASES,
        **HEAD_SIZES,
        samples=st.integers(0, 2),
        heads=st.integers(1, 3),
        length=st.integers(0, 40),
        keys=st.integers(0, 40),
        mask=st.sampled_from((None, "boolean", "heads", "row", "column")),
        is_causal=st.booleans(),
        means=st.booleans(),
    )
    def test_gradients_are_the_references(self, samples, heads, length, keys, dim, value_dim, mask, **case):
        additive = {"heads": (1, heads, length, keys), "row": (1, 1, 1, keys), "column": (samples, heads, length, 1)}
        sizes = samples, heads, length, keys, dim, value_dim
        kernel_checks.check_attention(compiled, "cpu", group=16, sizes=sizes, mask=additive.get(mask, mask), **case)

    def test_long_sequences_are_taken_in_tiles_of_queries(self):
        kernel_checks.check_attention(compiled, "cpu", torch.float32, 4, 16, (1, 2, 700, 700, 24, 48), None, False)

    @settings(max_examples=40, deadline=None)
    @given(
        **kernel_checks.CASES,
        **HEAD_SIZES,
        samples=st.integers(0, 2),
        heads=st.integers(1, 3),
        length=st.integers(0, 210),
        prompts=st.integers(1, 20),
    )
    def test_prompts(self, samples, heads, length, prompts, dim, value_dim, **case):
        sizes = samples, heads, length, prompts, dim, value_dim
        kernel_checks.check_prompts(compiled, "cpu", group=16, sizes=sizes, **case)


class TestSelection:
    def test_float64_is_the_references(self):
        x = torch.randn(2, 8).double()
        ours, theirs = (
            op_set(backend).encode_norm(x, 1e-5, True, False, 4, 8, None) for backend in ("auto", "reference")
        )
        assert ours[2].dtype == torch.float64 and all(torch.equal(our, their) for our, their in zip(ours, theirs))

    @pytest.mark.parametrize("backend", ["auto", "compiled"])
    def test_without_a_compiler_one_warning_and_the_reference(self, tmp_path, backend):
        script = f"""
            import warnings, torch
            from peft_s2a.activations.ops import op_set
            x = torch.randn(4, 32)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                codes = [op_set("{backend}").encode_groups(x, 4, 8, None) for _ in range(3)]
            theirs = op_set("reference").encode_groups(x, 4, 8, None)
            assert all(torch.equal(a, b) for ours in codes for a, b in zip(ours, theirs))
            assert not torch._C._dispatch_has_kernel_for_dispatch_key("s2a::encode_groups", "CPU")
            messages = [str(w.message) for w in caught if "fused CPU kernels" in str(w.message)]
            assert len(messages) == 1 and "C compiler" in messages[0], messages
        """
        environment = {**os.environ, "CC": str(tmp_path / "no-such-compiler"), "XDG_CACHE_HOME": str(tmp_path)}
        subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment)
