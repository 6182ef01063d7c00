"""The Triton kernels against the reference, on fresh random inputs of odd shapes, strides, dtypes and widths: on a CUDA device where
there is one, else in Triton's interpreter on the CPU.

Codes are equal but where a value lies on a rounding boundary: sums of a row run in another order, which moves its mean and deviation
by an ulp of float32. Gradients agree to some ulps of float32, or to one of the narrower dtype, to which the interpreter truncates;
attention's, with products on the way, are compared in float64 and may be a few times as far off as the reference's.
"""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_s2a.activations.backends import reference, select
from peft_s2a.activations.codec import WIDTHS
from peft_s2a.activations.levels import code_table


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if not sys.platform.startswith("linux"):
    pytest.skip("Triton is installed on Linux only", allow_module_level=True)

from peft_s2a.activations.backends import triton, triton_kernels  # noqa: E402


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SEEDS = (None, 3, 2**62 + 12345)  # nearest; stochastic, with one word and with two
CASES = {"dtype": st.sampled_from(DTYPES), "bits": st.sampled_from(WIDTHS), "seed": st.integers(0, 2**31)}
ROWS = {
    **CASES,
    "rows": st.integers(0, 9),
    "count": st.integers(1, 150),
    "group": st.sampled_from((1, 7, 16, 64)),
    "rounding": st.sampled_from(SEEDS),
}


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


def random(shape, dtype, seed, scale=2.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def assert_same_codes(ours: Tensor, theirs: Tensor) -> None:
    """Equal bytes, but for values on a rounding boundary."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.uint8
    assert (ours != theirs).sum() <= ours.numel() // 500


def assert_close(ours: Tensor, theirs: Tensor, ulps: float = 2) -> None:
    """Within some ulps of the numbers, and of the largest one for those that cancel."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if theirs.numel():
        ours, theirs, bound = ours.double(), theirs.double(), ulps * ULP[theirs.dtype]
        assert ((ours - theirs).abs() <= bound * (theirs.abs() + theirs.abs().max())).all()


def test_the_kernels_run_here():
    assert triton.runs_on(DEVICE)


class TestActivationCodes:
    @settings(max_examples=20, deadline=None)
    @given(**CASES, count=st.integers(0, 5000), name=st.sampled_from(("gelu", "silu", "tanh", "relu")))
    def test_codes_and_gradients_are_the_references(self, dtype, bits, seed, count, name):
        table = code_table(name, (), bits, None, False)
        x, grad = random(count, dtype, seed), random(count, dtype, seed + 1)
        theirs = reference.encode_steps(x, table.thresholds, table.codes, table.bits)
        assert torch.equal(triton.encode_steps(x, table.thresholds, table.codes, table.bits), theirs)
        scaled = [backend.scale_by_levels(grad, theirs, table.levels, table.bits) for backend in (triton, reference)]
        assert_close(*scaled, ulps=1)

    @settings(max_examples=20, deadline=None)
    @given(**CASES, count=st.integers(0, 5000), rounding=st.sampled_from(SEEDS[1:]))
    def test_stochastic_rounding_draws_the_references_numbers(self, dtype, bits, seed, count, rounding):
        levels = torch.linspace(-0.2, 1.2, 2**bits).square().sort().values.tolist()
        values = random(count, dtype, seed, 0.5)
        theirs = reference.encode_levels(values, levels, bits, rounding)
        assert torch.equal(triton.encode_levels(values, levels, bits, rounding), theirs)

    @pytest.mark.parametrize("bits", [3, 4])
    def test_strided_input_is_read_in_its_own_order(self, bits):
        table = code_table("gelu", (), bits, None, False)
        x = random((64, 30), torch.float32, 0)[:, ::2].t().reshape(-1)[::3]
        packed = triton.encode_steps(x, table.thresholds, table.codes, bits)
        assert torch.equal(packed, reference.encode_steps(x, table.thresholds, table.codes, bits))
        scaled = [backend.scale_by_levels(x, packed, table.levels, bits) for backend in (triton, reference)]
        assert torch.equal(*scaled)


class TestRows:
    @settings(max_examples=25, deadline=None)
    @given(**ROWS)
    def test_groups(self, dtype, bits, seed, rows, count, group, rounding):
        x = random((count, rows), dtype, seed).t()
        theirs = reference.encode_groups(x, bits, group, rounding)
        for ours, expected in zip(triton.encode_groups(x, bits, group, rounding), theirs):
            assert torch.equal(ours, expected)
        decoded = [backend.decode_groups(*theirs, bits, group, count, dtype) for backend in (triton, reference)]
        assert_close(*decoded, ulps=1)

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
        ours = triton.encode_norm(x, 1e-5, center, by_column, bits, group, rounding)
        assert_same_codes(ours[0], theirs[0])
        assert_same_codes(ours[1], theirs[1])
        assert_close(ours[2], theirs[2])
        assert torch.equal(ours[3], theirs[3])
        gradients = [
            backend.norm_backward(grad, *theirs, weight, center, bits, group, list(wanted))
            for backend in (triton, reference)
        ]
        for our, their, want in zip(*gradients, wanted):
            assert our.shape == their.shape
            if want:
                assert_close(our, their, ulps=16 if their.dtype == torch.float32 else 2)

    def test_sums_over_many_rows(self):
        x, grad, weight = (random(shape, torch.float32, i) for i, shape in enumerate(((200, 96), (200, 96), (96,))))
        coded = reference.encode_norm(x, 1e-5, True, True, 4, 96, None)
        gradients = [
            backend.norm_backward(grad, *coded, weight, True, 4, 96, [True] * 3) for backend in (triton, reference)
        ]
        for our, their in zip(*gradients):
            assert_close(our, their, ulps=32)

    @settings(max_examples=25, deadline=None)
    @given(**ROWS, center=st.booleans(), keep_mean=st.booleans())
    def test_heads_of_any_strides(self, dtype, bits, seed, rows, count, group, rounding, center, keep_mean):
        x = random((count, 2, rows, 3), dtype, seed).permute(1, 3, 2, 0)
        theirs = reference.encode_heads(x, bits, group, center, keep_mean, rounding)
        ours = triton.encode_heads(x, bits, group, center, keep_mean, rounding)
        assert_close(ours[2], theirs[2], ulps=1)
        if torch.equal(ours[2], theirs[2]):  # the mean's last bit in bfloat16 shifts all values of a head
            for our, their in zip(ours[:2], theirs[:2]):
                assert_same_codes(our, their)

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    def test_what_is_not_finite_stays_visible(self):
        x = torch.randn(3, 64, device=DEVICE)
        x[1, 3], x[2, 40] = torch.nan, torch.inf
        decoded = [
            backend.decode_groups(*backend.encode_groups(x, 4, 8, None), 4, 8, 64, torch.float32)
            for backend in (triton, reference)
        ]
        assert torch.equal(decoded[0].isnan(), decoded[1].isnan()) and decoded[0].isnan().any(1).tolist() == [0, 1, 1]

    @pytest.mark.parametrize("scale", [1e-42, 1e-36, 1e-12, 1e36])
    def test_magnitudes_at_the_ends_of_float32(self, scale):
        x = random((4, 64), torch.float32, 5, 1.0) * scale
        for ours, theirs in zip(triton.encode_groups(x, 4, 8, None), reference.encode_groups(x, 4, 8, None)):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize(("count", "dtype"), [(20000, torch.float32), (40, torch.float64)])
    def test_long_rows_and_double_precision_are_left_to_the_reference(self, count, dtype):
        x = torch.randn(2, count, dtype=dtype, device=DEVICE)
        coded = [backend.encode_norm(x, 1e-5, True, False, 4, 32, None) for backend in (triton, reference)]
        for ours, theirs in zip(*coded):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


class TestAttention:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("bits", "group", "sizes", "mask", "is_causal", "means"),
        [
            (4, 16, (2, 3, 70, 75, 24, 40), None, False, False),
            (3, 32, (1, 2, 66, 66, 8, 5), None, True, True),
            (8, 7, (2, 1, 9, 130, 30, 30), "additive", False, False),
            (2, 32, (2, 2, 66, 20, 16, 16), "boolean", False, True),
            (1, 32, (1, 1, 5, 70, 32, 32), "additive", True, False),
        ],
    )
    def test_gradients_are_the_references(self, dtype, bits, group, sizes, mask, is_causal, means):
        samples, heads, length, keys, dim, value_dim = sizes
        if mask == "additive":
            mask = random((1, heads, 1, keys), torch.float32, 1)
        elif mask == "boolean":
            mask = random((samples, 1, length, keys), torch.float32, 1) > 0
            mask[0, :, 3] = False  # a query that sees nothing
        shapes = (length, heads, dim), (keys, heads, dim), (keys, heads, value_dim)
        query, key, value = (
            random((samples, *shape), torch.float32, i).transpose(1, 2) for i, shape in enumerate(shapes)
        )
        coded = [
            list(reference.encode_heads(x, bits, group, True, kept, None))
            for x, kept in ((query, True), (key, means), (value, means))
        ]
        grad = random((samples, length, value_dim, heads), dtype, 9).permute(0, 3, 1, 2)
        arguments = (*coded, mask, is_causal, dim**-0.5, bits, group, dim, False)
        ours, theirs, exact = (
            backend.attention_backward(x, *arguments)
            for backend, x in ((triton, grad), (reference, grad), (reference, grad.double()))
        )
        for our, their, truth in zip(ours, theirs, exact):
            assert our.shape == their.shape and our.stride() == their.stride()
            if their.numel():
                assert our.dtype == dtype
                error, allowed = ((x.double() - truth).norm() for x in (our, their))
                assert error <= 4 * allowed + 1e-6 * truth.norm()  # some of them cancel nearly

    def test_a_gradient_of_the_mask_comes_from_the_reference(self):
        query = random((1, 2, 6, 8), torch.float32, 0)
        coded = list(reference.encode_heads(query, 4, 8, True, True, None))
        mask = random((1, 2, 6, 6), torch.float32, 1)
        arguments = (query, coded, coded, coded, mask, False, 0.3, 4, 8, 8, True)
        for ours, theirs in zip(triton.attention_backward(*arguments), reference.attention_backward(*arguments)):
            assert torch.equal(ours, theirs)


class TestPrompts:
    """Attention to prompts, close to the reference in float64 as that of other tokens is."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("bits", "group", "sizes"),
        [(4, 16, (2, 3, 70, 8, 24, 40)), (3, 32, (1, 2, 5, 1, 8, 5)), (8, 7, (2, 1, 33, 20, 30, 30))],
    )
    def test_results_and_gradients_are_the_references(self, dtype, bits, group, sizes):
        samples, heads, length, count, dim, value_dim = sizes
        query = random((samples, length, heads, dim), dtype, 0).transpose(1, 2)
        attended, grad = (random((samples, length, heads * value_dim), dtype, seed) for seed in (1, 2))
        key, value = (random((heads, count, d), torch.float32, 3) for d in (dim, value_dim))
        coded = list(reference.encode_heads(query, bits, group, True, True, None))
        results = []
        for backend, kind in ((triton, dtype), (reference, dtype), (reference, torch.float64)):
            tokens = key.to(kind), value.to(kind), 0.4
            results.append(
                [
                    backend.prompt_attention(attended.to(kind), query.to(kind), *tokens),
                    *backend.prompt_attention_backward(grad.to(kind), coded, *tokens, bits, group),
                ]
            )
        for our, their, truth in zip(*results):
            assert our.shape == their.shape and our.dtype == their.dtype
            error, allowed = ((x.double() - truth).norm() for x in (our, their))
            # the reference's gradients are computed in float32, the kernels' products in the gradients' dtype
            assert error <= 4 * allowed + (1e-6 if dtype == torch.float32 else 2 * ULP[dtype]) * truth.norm()


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
        cpu, cuda = torch.device("cpu"), torch.device("cuda")
        assert select("triton", torch.device(DEVICE), "encode_norm") is triton
        assert select("auto", cpu, "encode_norm") is not triton
        assert select("reference", torch.device(DEVICE), "encode_norm") is reference
        assert select("auto", torch.device("meta"), "encode_norm") is reference
        if DEVICE == "cuda":
            assert select("auto", cuda, "encode_norm") is triton

    def test_what_cannot_run_gives_one_warning_and_the_reference(self):
        run(
            """
            import warnings, torch
            from peft_s2a.activations.backends import reference, select
            for backend, device, expected in (
                ("triton", "cpu", "TRITON_INTERPRET=1"), ("triton", "mps", "auto"), ("compiled", "cuda", "auto"),
            ):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    chosen = [select(backend, torch.device(device), op) for op in ("encode_norm", "encode_heads")]
                assert all(module is reference for module in chosen)
                messages = [str(w.message) for w in caught if "reference backend" in str(w.message)]
                assert len(messages) == 1 and expected in messages[0] and device in messages[0], messages
            """,
            TRITON_INTERPRET=None,
        )

    def test_without_triton_one_warning_names_what_to_install(self):
        run(
            """
            import sys, warnings, torch
            from peft_s2a.activations.backends import reference, select
            sys.modules["triton"] = None  # makes the import fail
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                chosen = [select("auto", torch.device("cuda"), "encode_norm") for _ in range(3)]
            assert all(module is reference for module in chosen)
            messages = [str(w.message) for w in caught if "reference backend" in str(w.message)]
            assert len(messages) == 1 and "pip install triton" in messages[0], messages
            """
        )


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
                packed = ours.encode_steps(x.view(-1), levels, list(range(2**bits + 1)), bits)
                ours.scale_by_levels(x.view(-1), packed, levels, bits)
                rows, weight = x.view(-1, 128), torch.ones(128)
                coded = reference.encode_norm(rows, 1e-5, True, True, bits, 128, None)
                ours.encode_norm(rows, 1e-5, True, True, bits, 128, None)
                if bits == 3:  # two planes of bits; the rest is as at 4
                    continue
                ours.norm_backward(rows, *coded, weight, True, bits, 128, [True, True, True])
                heads = x.view(samples, 49, 4, 32).transpose(1, 2)
                query, key = (list(reference.encode_heads(heads, bits, 16, True, kept, None)) for kept in (True, False))
                ours.encode_heads(heads, bits, 16, True, True, 5 * samples)
                ours.decode_groups(key[0].flatten(0, 2), key[1].flatten(0, 2), bits, 16, 32, dtype)
                mask = torch.randn(1, 4, 49, 49)
                ours.attention_backward(heads, query, key, key, mask, False, 0.2, bits, 16, 32, False)
                key = torch.randn(4, 8, 32)
                ours.prompt_attention(x, heads, key, key, 0.2)
                ours.prompt_attention_backward(x, query, key, key, 0.2, bits, 16)
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
