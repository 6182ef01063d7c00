"""The fused CPU kernels against the reference, see `kernel_checks`."""

import os
import subprocess
import sys

import kernel_checks
import pytest
import torch
from forked import run_code
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_s2a.activations.backends import compiled
from peft_s2a.activations.ops import op_set


pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler")


class _Kernels:
    """The registered ops as functions, with seeds as numbers, as the reference has them."""

    def __getattr__(self, name):
        op = getattr(op_set("compiled"), name)

        def call(*args):
            seeded = name.startswith("encode") and isinstance(args[-1], int) and name != "encode_steps"
            return op(*args[:-1], torch.tensor(args[-1])) if seeded else op(*args)

        return call


kernels = _Kernels()

HEAD_SIZES = {"dim": st.integers(1, 70), "value_dim": st.integers(1, 70)}


class TestActivationCodes:
    @settings(max_examples=40, deadline=None)
    @given(**kernel_checks.VALUES)
    def test_codes_and_gradients_are_the_references(self, **case):
        kernel_checks.check_activation_codes(kernels, "cpu", **case)

    @pytest.mark.parametrize("bits", [3, 4])
    def test_strided_input_is_read_in_its_own_order(self, bits):
        kernel_checks.check_strided_values(kernels, "cpu", bits)


class TestRows:
    @settings(max_examples=100, deadline=None)
    @given(**kernel_checks.ROWS)
    def test_groups(self, **case):
        kernel_checks.check_groups(kernels, "cpu", **case)

    @settings(max_examples=100, deadline=None)
    @given(**kernel_checks.NORMS)
    def test_norms(self, **case):
        kernel_checks.check_norms(kernels, "cpu", **case)

    @pytest.mark.parametrize("scale", kernel_checks.MAGNITUDES)
    def test_magnitudes_at_the_ends_of_float32(self, scale):
        kernel_checks.check_magnitude(kernels, "cpu", scale)

    def test_sums_over_many_rows(self):
        kernel_checks.check_sums_over_many_rows(kernels, "cpu")

    @settings(max_examples=60, deadline=None)
    @given(**kernel_checks.CHANNELS)
    def test_channels(self, **case):
        kernel_checks.check_channels(kernels, "cpu", **case)

    @settings(max_examples=60, deadline=None)
    @given(**kernel_checks.ROWS)
    def test_softmax(self, **case):
        kernel_checks.check_softmax(kernels, "cpu", **case)

    @settings(max_examples=60, deadline=None)
    @given(**kernel_checks.GATES)
    def test_gates(self, **case):
        kernel_checks.check_gates(kernels, "cpu", **case)

    @settings(max_examples=50, deadline=None)
    @given(**kernel_checks.HEADS, whole_rows=st.booleans())
    def test_heads_of_any_strides(self, **case):
        kernel_checks.check_heads(kernels, "cpu", **case)


@settings(max_examples=200, deadline=None)
@given(**kernel_checks.POOLS)
def test_max_pooling(**case):
    kernel_checks.check_max_pooling(kernels, "cpu", **case)


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
        kernel_checks.check_attention(kernels, "cpu", group=16, sizes=sizes, mask=additive.get(mask, mask), **case)

    def test_long_sequences_are_taken_in_tiles_of_queries(self):
        kernel_checks.check_attention(kernels, "cpu", torch.float32, 4, 16, (1, 2, 700, 700, 24, 48), None, False)

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
        kernel_checks.check_prompts(kernels, "cpu", group=16, sizes=sizes, **case)


class TestSelection:
    def test_float64_is_the_references(self):
        x = torch.randn(2, 8).double()
        ours, theirs = (
            op_set(backend).encode_norm(x, 1e-5, True, False, 4, 8, None) for backend in ("auto", "reference")
        )
        assert ours[2].dtype == torch.float64 and all(torch.equal(our, their) for our, their in zip(ours, theirs))

    @pytest.mark.parametrize("backend", [pytest.param("auto", marks=pytest.mark.slow), "compiled"])
    def test_without_a_compiler_one_warning_and_the_reference(self, tmp_path, backend):
        script = """
            import sys, warnings, torch
            from peft_s2a.activations.ops import op_set
            x = torch.randn(4, 32)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                codes = [op_set(sys.argv[1]).encode_groups(x, 4, 8, None) for _ in range(3)]
            theirs = op_set("reference").encode_groups(x, 4, 8, None)
            assert all(torch.equal(a, b) for ours in codes for a, b in zip(ours, theirs))
            assert not torch._C._dispatch_has_kernel_for_dispatch_key("s2a::encode_groups", "CPU")
            messages = [str(w.message) for w in caught if "fused CPU kernels" in str(w.message)]
            assert len(messages) == 1 and "C++ compiler" in messages[0], messages
        """
        run_code(script, backend, CXX=str(tmp_path / "no-such-compiler"), XDG_CACHE_HOME=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("capability", compiled.CAPABILITIES)
def test_kernels_of_every_instruction_set_that_runs_here(capability):
    """All tests of this file once more, with the kernels of a lower instruction set."""
    if list(compiled.CAPABILITIES).index(capability) >= list(compiled.CAPABILITIES).index(compiled.capability()):
        pytest.skip("the one that the other tests use, or one that this processor lacks")
    environment = {**os.environ, "PEFT_S2A_CPU_CAPABILITY": capability}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:]


class TestArguments:
    """What does not fit raises; nothing reads or writes beyond a tensor."""

    X = torch.randn(4, 32)

    @pytest.mark.parametrize("group_size", [0, -1, 2**31, 10**12, 2**63 - 1])
    def test_group_sizes(self, group_size):
        with pytest.raises(RuntimeError, match="group_size"):
            torch.ops.s2a.encode_groups(self.X, 4, group_size, None)

    def test_a_group_may_be_larger_than_a_row(self):
        for ours, theirs in zip(*(op_set(b).encode_groups(self.X, 4, 2**31 - 1, None) for b in ("auto", "reference"))):
            assert torch.equal(ours, theirs)
        coded = torch.ops.s2a.encode_groups(self.X, 4, 2**31 - 1, None)
        values = [op_set(b).decode_groups(*coded, 4, 2**31 - 1, 32, torch.float32) for b in ("auto", "reference")]
        torch.testing.assert_close(*values)

    @pytest.mark.parametrize("bits", [-1, 0, 5, 7, 16])
    def test_widths(self, bits):
        with pytest.raises(RuntimeError, match="bits"):
            torch.ops.s2a.encode_groups(self.X, bits, 8, None)

    def test_shapes_dtypes_and_sizes(self):
        packed, scales = torch.ops.s2a.encode_groups(self.X, 4, 8, None)
        ops, empty = torch.ops.s2a, torch.empty(0, dtype=torch.bfloat16)
        wrong = {
            "2 dimensions": lambda: ops.encode_groups(self.X.view(-1), 4, 8, None),
            "packed must have": lambda: ops.decode_groups(packed[:, 1:], scales, 4, 8, 32, torch.float32),
            "scales must have": lambda: ops.decode_groups(packed, scales[1:], 4, 8, 32, torch.float32),
            "packed must be uint8": lambda: ops.decode_groups(packed.float(), scales, 4, 8, 32, torch.float32),
            "count": lambda: ops.decode_groups(packed, scales, 4, 8, -1, torch.float32),
            "seed": lambda: ops.encode_groups(self.X, 4, 8, torch.ones(3, dtype=torch.int64)),
            "one code more": lambda: ops.encode_steps(self.X.view(-1), [0.0], [0], 1),
            "fit into": lambda: ops.encode_steps(self.X.view(-1), [0.0], [0, 2], 1),
            "levels": lambda: ops.scale_by_levels(self.X.view(-1), packed.view(-1), [], 4),
            "contiguous": lambda: ops.scale_by_levels_(self.X.t(), packed.view(-1), [0.0] * 16, 4),
            "rstd": lambda: ops.norm_backward(
                self.X, packed, scales, torch.ones(3), empty, None, True, 4, 8, [True] * 3
            ),
            "weight": lambda: ops.norm_backward(
                self.X, packed, scales, torch.ones(4), empty, torch.ones(31), True, 4, 8, [True] * 3
            ),
            "smaller than a window": lambda: ops.max_pool2d(self.X, [5, 5], [1, 1], [0, 0], [1, 1], False, 8),
            "places": lambda: ops.max_pool2d(self.X, [3, 3], [1, 1], [0, 0], [1, 1], False, 2),
        }
        for message, call in wrong.items():
            with pytest.raises(RuntimeError, match=message):
                call()

    @pytest.mark.parametrize("offset", [1, 3])
    def test_memory_that_is_not_aligned(self, offset):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(8 * 33 + offset).to(dtype)[offset:].view(8, 33)
            for ours, theirs in zip(*(op_set(b).encode_groups(x, 4, 8, None) for b in ("auto", "reference"))):
                assert torch.equal(ours, theirs)
