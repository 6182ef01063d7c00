"""The Triton kernels against the reference, see `kernel_checks`: on a CUDA device where there is one, else in Triton's interpreter
on the CPU."""

import os
import subprocess
import sys
import textwrap

import kernel_checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, SEEDS, random

from peft_s2a.activations.backends import reference


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if not sys.platform.startswith("linux"):
    pytest.skip("Triton is installed on Linux only", allow_module_level=True)

from peft_s2a.activations.backends import triton, triton_kernels  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _untuned():
    """One block size a kernel: on a device, tuning over all of these shapes would take most of the time."""
    tuned = [kernel for kernel in vars(triton_kernels).values() if hasattr(kernel, "configs")]
    configs = [kernel.configs for kernel in tuned]
    for kernel in tuned:
        kernel.configs = kernel.configs[:1]
    yield
    for kernel, before in zip(tuned, configs):
        kernel.configs = before


def test_the_kernels_run_here():
    assert triton.runs_on(DEVICE)


class TestActivationCodes:
    @settings(max_examples=20, deadline=None)
    @given(**kernel_checks.VALUES)
    def test_codes_and_gradients_are_the_references(self, **case):
        kernel_checks.check_activation_codes(triton, DEVICE, **case)

    @settings(max_examples=20, deadline=None)
    @given(**kernel_checks.CASES, count=st.integers(0, 5000), rounding=st.sampled_from(SEEDS[1:]))
    def test_stochastic_rounding_draws_the_references_numbers(self, dtype, bits, seed, count, rounding):
        levels = torch.linspace(-0.2, 1.2, 2**bits).square().sort().values.tolist()
        values = random(count, dtype, seed, 0.5, DEVICE)
        theirs = reference.encode_levels(values, levels, bits, rounding)
        assert torch.equal(triton.encode_levels(values, levels, bits, rounding), theirs)

    @pytest.mark.parametrize("bits", [3, 4])
    def test_strided_input_is_read_in_its_own_order(self, bits):
        kernel_checks.check_strided_values(triton, DEVICE, bits)


class TestRows:
    @settings(max_examples=25, deadline=None)
    @given(**kernel_checks.ROWS)
    def test_groups(self, **case):
        kernel_checks.check_groups(triton, DEVICE, **case)

    @settings(max_examples=25, deadline=None)
    @given(**kernel_checks.NORMS)
    def test_norms(self, **case):
        kernel_checks.check_norms(triton, DEVICE, **case)

    def test_sums_over_many_rows(self):
        kernel_checks.check_sums_over_many_rows(triton, DEVICE)

    @settings(max_examples=10, deadline=None)
    @given(**kernel_checks.HEADS)
    def test_heads_of_any_strides(self, **case):
        kernel_checks.check_heads(triton, DEVICE, **case, whole_rows=False)

    @settings(max_examples=10, deadline=None)
    @given(**kernel_checks.CHANNELS)
    def test_channels(self, **case):
        kernel_checks.check_channels(triton, DEVICE, **case)

    @settings(max_examples=10, deadline=None)
    @given(**kernel_checks.ROWS)
    def test_softmax(self, **case):
        kernel_checks.check_softmax(triton, DEVICE, **case)

    @settings(max_examples=10, deadline=None)
    @given(**kernel_checks.GATES)
    def test_gates(self, **case):
        kernel_checks.check_gates(triton, DEVICE, **case)

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    def test_what_is_not_finite_stays_visible(self):
        kernel_checks.check_not_finite(triton, DEVICE)

    @pytest.mark.parametrize("scale", kernel_checks.MAGNITUDES)
    def test_magnitudes_at_the_ends_of_float32(self, scale):
        kernel_checks.check_magnitude(triton, DEVICE, scale)

    @pytest.mark.parametrize(("count", "dtype"), [(20000, torch.float32), (40, torch.float64)])
    def test_long_rows_and_double_precision_are_left_to_the_reference(self, count, dtype):
        x = torch.randn(2, count, dtype=dtype, device=DEVICE)
        coded = [backend.encode_norm(x, 1e-5, True, False, 4, 32, None) for backend in (triton, reference)]
        for ours, theirs in zip(*coded):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


class TestAttention:
    @pytest.mark.parametrize(
        ("dtype", "bits", "group", "sizes", "mask", "is_causal", "means"),
        [
            pytest.param(dtype, *case, marks=() if dtype == usual else pytest.mark.slow)
            for usual, *case in [
                (torch.bfloat16, 4, 16, (2, 3, 70, 75, 24, 40), None, False, False),
                (torch.float32, 3, 32, (1, 2, 66, 66, 8, 5), None, True, True),
                (torch.float16, 8, 7, (2, 1, 9, 130, 30, 30), (1, 1, 1, 130), False, False),
                (torch.float32, 2, 32, (2, 2, 66, 20, 16, 16), "boolean", False, True),
                (torch.bfloat16, 1, 32, (1, 1, 5, 70, 32, 32), (1, 1, 1, 70), True, False),
            ]
            for dtype in DTYPES
        ],
    )
    def test_gradients_are_the_references(self, dtype, bits, group, sizes, mask, is_causal, means):
        kernel_checks.check_attention(triton, DEVICE, dtype, bits, group, sizes, mask, is_causal, means)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("bits", "group", "sizes"),
        [(4, 16, (2, 3, 70, 8, 24, 40)), (3, 32, (1, 2, 5, 1, 8, 5)), (8, 7, (2, 1, 33, 20, 30, 30))],
    )
    def test_prompts(self, dtype, bits, group, sizes):
        kernel_checks.check_prompts(triton, DEVICE, dtype, bits, group, sizes)

    def test_a_gradient_of_the_mask_comes_from_the_reference(self):
        query = random((1, 2, 6, 8), torch.float32, 0, device=DEVICE)
        coded = list(reference.encode_heads(query, 4, 8, True, True, None))
        mask = random((1, 2, 6, 6), torch.float32, 1, device=DEVICE)
        arguments = (query, coded, coded, coded, mask, False, 0.3, 4, 8, 8, True)
        for ours, theirs in zip(triton.attention_backward(*arguments), reference.attention_backward(*arguments)):
            assert torch.equal(ours, theirs)


def run(script: str, **environment: str | None) -> None:
    """Run a script in a fresh process; a variable of None is removed from its environment."""
    environment = {**os.environ, **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


class TestSelection:
    def test_by_device(self):
        from peft_s2a.activations.ops import op_set

        x = torch.randn(4, 32, device=DEVICE)
        for ours, theirs in zip(*(op_set(name).encode_groups(x, 4, 8, None) for name in ("triton", "reference"))):
            assert torch.equal(ours, theirs)
        if DEVICE == "cuda":
            assert op_set("triton") is op_set("auto")
            assert torch._C._dispatch_has_kernel_for_dispatch_key("s2a::encode_groups", "CUDA")

    def test_without_a_device_one_warning_and_the_reference(self):
        run(
            """
            import warnings, torch
            from peft_s2a.activations.ops import op_set
            if not torch.cuda.is_available():
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    chosen = [op_set("triton") for _ in range(3)]
                assert all(ops is op_set("reference") for ops in chosen)
                messages = [str(w.message) for w in caught if "reference backend" in str(w.message)]
                assert len(messages) == 1 and "TRITON_INTERPRET=1" in messages[0], messages
            """,
            TRITON_INTERPRET=None,
        )

    def test_without_triton_one_warning_names_what_to_install(self):
        run(
            """
            import sys, warnings, torch
            from peft_s2a.activations import backends
            sys.modules["triton"] = None  # makes the import fail
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert [backends.triton_on("cuda") for _ in range(3)] == [None] * 3
            messages = [str(w.message) for w in caught if "reference backend" in str(w.message)]
            assert len(messages) == 1 and "pip install triton" in messages[0], messages
            """,
            TRITON_INTERPRET=None,
        )


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_and_not_again_for_a_smaller_batch(tmp_path):
    """The interpreter accepts what the compiler does not. No GPU is needed to compile for one, only to launch."""
    run(
        """
        import torch
        import triton
        from triton.backends.compiler import GPUTarget
        from peft_s2a.activations.backends import reference, triton as ours, triton_kernels

        class Driver:
            def get_current_target(self):
                return GPUTarget("cuda", 90, 32)

            def get_current_device(self):
                return 0

            def get_current_stream(self, device):
                return 0

        triton.runtime.driver.set_active(Driver())
        compiled = {}

        def compile_only(kernel, grid, *args, **constants):
            kernel.configs = kernel.configs[:1]
            (binary,) = kernel.warmup(*args, grid=(1,), **constants, enable_fp_fusion=False)
            assert binary.asm["cubin"]
            compiled.setdefault(kernel.fn.__name__, set()).add(id(binary))

        ours._launch = compile_only

        def step(samples):
            for bits, dtype in ((4, torch.bfloat16), (3, torch.float32)):
                levels = torch.linspace(0, 1, 2**bits).tolist()
                x = torch.randn(samples, 49, 128).to(dtype)
                packed = ours.encode_steps(x, levels, list(range(2**bits + 1)), bits)
                ours.scale_by_levels(x, packed, levels, bits)
                weight = torch.ones(128)
                coded = reference.encode_norm(x, 1e-5, True, True, bits, 128, None)
                ours.encode_norm(x, 1e-5, True, True, bits, 128, None)
                if bits == 3:  # two planes of bits; the rest is as at 4
                    continue
                ours.norm_backward(x, *coded, weight, True, bits, 128, [True, True, True])
                heads = x.view(samples, 49, 4, 32).transpose(1, 2)
                query, key = (list(reference.encode_heads(heads, bits, 16, True, kept, None)) for kept in (True, False))
                ours.encode_heads(heads, bits, 16, True, True, 5 * samples)
                ours.decode_groups(key[0].flatten(0, 2), key[1].flatten(0, 2), bits, 16, 32, dtype)
                mask = torch.randn(1, 4, 49, 49)
                ours.attention_backward(heads, query, key, key, mask, False, 0.2, bits, 16, 32, False)
                key, gate = torch.randn(8, 4 * 32), torch.randn(4)
                ours.prompt_attention(x, heads, key, key, gate, 0.2)
                ours.prompt_attention_backward(x, query, key, key, gate, 0.2, bits, 16)
            ours.encode_levels(torch.rand(128 * samples), levels, bits, samples)

        step(samples=6)
        names = {name for name, kernel in vars(triton_kernels).items() if isinstance(kernel, triton.runtime.Autotuner)}
        assert names == set(compiled), names ^ set(compiled)
        before = {name: len(binaries) for name, binaries in compiled.items()}
        step(samples=1)
        assert before == {name: len(binaries) for name, binaries in compiled.items()}, (before, compiled)
        """,
        TRITON_INTERPRET=None,
        TRITON_CACHE_DIR=str(tmp_path),
    )
