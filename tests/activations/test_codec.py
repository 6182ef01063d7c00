"""Codes, packing and group scales of the reference codec."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_s2a.activations import codec
from peft_s2a.activations.codec import WIDTHS


class TestPacking:
    @settings(max_examples=50, deadline=None)
    @given(bits=st.sampled_from(WIDTHS), rows=st.integers(0, 5), count=st.integers(0, 70))
    def test_gives_the_codes_back(self, bits, rows, count):
        codes = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8)
        packed = codec.pack(codes, bits)
        assert packed.shape == (rows, codec.packed_width(count, bits)) and packed.dtype == torch.uint8
        assert torch.equal(codec.unpack(packed, bits, count), codes)

    @pytest.mark.parametrize(("bits", "expected"), [(1, 8), (2, 16), (3, 24), (4, 32), (8, 64)])
    def test_takes_bits_times_count(self, bits, expected):
        assert codec.packed_width(64, bits) == expected

    def test_puts_the_second_half_of_a_row_in_the_high_bits(self):
        codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
        assert codec.pack(codes, 4).tolist() == [[1 | 3 << 4, 2 | 4 << 4]]


class TestGroups:
    @settings(max_examples=60, deadline=None)
    @given(
        bits=st.sampled_from(WIDTHS),
        rows=st.integers(1, 4),
        count=st.integers(1, 50),
        group=st.integers(1, 20),
        scale=st.sampled_from((1e-6, 1.0, 1e5)),
        shift=st.sampled_from((0.0, 3.0, -3.0)),
        seed=st.sampled_from((None, 7)),
        dtype=st.sampled_from((torch.float32, torch.float64)),
    )
    def test_errors_are_bounded_by_the_step_and_the_bounds_rounding(
        self, bits, rows, count, group, scale, shift, seed, dtype
    ):
        x = (torch.randn(rows, count, dtype=dtype) + shift) * scale
        packed, scales = codec.encode_groups(x, bits, group, seed)
        assert scales.shape == (rows, codec.scales_width(count, group))
        decoded = codec.decode_groups(packed, scales, bits, group, count, dtype)
        for start in range(0, count, group):
            part, restored = (t[:, start : start + group] for t in (x, decoded))
            spread = part.amax(1) - part.amin(1)
            first = start // (4 * group) * 4 * group
            rounding = x[:, first : first + 4 * group].abs().amax(1) / 127
            bound = (spread + rounding) / (2**bits - 1) * (0.5 if seed is None else 1) + rounding
            assert ((restored - part).abs().amax(1) <= bound * 1.001).all()

    def test_of_equal_values_and_of_zeros_come_back(self):
        x = torch.tensor([[0.0, 0.0, 0.75, 0.75, -2.0, -2.0]])
        packed, scales = codec.encode_groups(x, 4, 2)
        assert torch.equal(codec.decode_groups(packed, scales, 4, 2, 6, torch.float32), x)

    def test_stochastic_rounding_is_unbiased(self):
        x = torch.linspace(-1, 1, 33).view(1, -1)
        runs = [codec.encode_groups(x, 2, 33, seed) for seed in range(600)]
        mean = torch.stack([codec.decode_groups(*run, 2, 33, 33, torch.float32) for run in runs]).mean(0)
        assert (mean - x).abs().max() < 5 * (2 / 3) / 2 / 600**0.5

    def test_huge_and_tiny_values_stay_finite(self):
        x = torch.tensor([[1e30, -1e30, 1e-30, 0.0]])
        decoded = codec.decode_groups(*codec.encode_groups(x, 4, 4), 4, 4, 4, torch.float32)
        assert decoded.isfinite().all()


class TestUniform:
    def test_is_a_function_of_the_seed_and_looks_uniform(self):
        cpu = torch.device("cpu")
        numbers = codec.uniform(2**62 + 5, 100_000, cpu)
        assert torch.equal(numbers, codec.uniform(2**62 + 5, 100_000, cpu))
        assert not torch.equal(numbers, codec.uniform(2**62 + 6, 100_000, cpu))
        assert 0 <= numbers.min() and numbers.max() < 1
        counts = torch.histc(numbers, 10, 0, 1)
        assert (counts - 10_000).abs().max() < 500
        assert abs(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1]) < 0.02


class TestColumnStatistics:
    def test_are_those_of_the_normalised_rows(self):
        x = torch.randn(100, 16, dtype=torch.float64) * torch.linspace(0.5, 4, 16) + torch.arange(16)
        mean, deviation = codec.column_statistics(x, 1e-6, True).double()
        rows = torch.nn.functional.layer_norm(x, (16,), eps=1e-6)
        torch.testing.assert_close(mean, rows.mean(0), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(deviation, rows.std(0, correction=0), rtol=2e-2, atol=1e-2)

    def test_never_divide_by_nothing(self):
        assert (codec.column_statistics(torch.ones(70, 8), 1e-6, True)[1] > 0).all()

    @pytest.mark.parametrize("tokens", [49, 50, 64, 65, 197])
    def test_look_at_all_rows_of_few_and_at_every_token_of_many(self, tokens):
        for samples in range(1, 257):
            rows = codec.sampled_rows(samples * tokens, torch.device("cpu"))
            assert len(rows) == min(samples * tokens, 128)
            assert rows.min() >= 0 and rows.max() < samples * tokens
            assert rows.diff().ge(0).all() and len(rows.unique()) > 0.8 * len(rows)
            if samples * tokens >= 128:
                assert (rows % tokens).bincount(minlength=tokens).max() <= 128 / tokens + 9, samples
