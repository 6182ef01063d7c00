"""Checks of a backend's kernels against the reference, on fresh random inputs of odd shapes, strides, dtypes and widths.

Codes are equal but where a value lies on a rounding boundary: sums of a row run in another order, which moves its mean and deviation
by an ulp of float32. Gradients agree to some ulps of float32 or, since results may be truncated to it, to one or two of a narrower
dtype; attention's, with products on the way, are compared in float64 and may be a few times as far off as the reference's.
"""

from types import ModuleType

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_s2a.activations.backends import reference
from peft_s2a.activations.codec import WIDTHS
from peft_s2a.activations.levels import code_table


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SEEDS = (None, 3, 2**62 + 12345)  # nearest; stochastic, with one word and with two

CASES = {"dtype": st.sampled_from(DTYPES), "bits": st.sampled_from(WIDTHS), "seed": st.integers(0, 2**31)}
VALUES = {**CASES, "count": st.integers(0, 5000), "name": st.sampled_from(("gelu", "silu", "tanh", "relu"))}
ROWS = {
    **CASES,
    "rows": st.integers(0, 9),
    "count": st.one_of(st.integers(1, 150), st.sampled_from((64, 128, 700))),
    "group": st.sampled_from((1, 7, 16, 32, 64)),
    "rounding": st.sampled_from(SEEDS),
}
NORMS = {
    **ROWS,
    "center": st.booleans(),
    "by_column": st.booleans(),
    "weighted": st.booleans(),
    "wanted": st.tuples(*[st.booleans()] * 3),
}
CHANNELS = {
    **ROWS,
    "channels": st.integers(1, 5),
    "weighted": st.booleans(),
    "live": st.booleans(),
    "wanted": st.tuples(*[st.booleans()] * 3),
}
GATES = {**ROWS, "name": st.sampled_from(("gelu", "gelu_tanh", "quick_gelu", "silu", "mish", "relu", "hardswish"))}
JUMPS = {"relu": (0.0,), "hardswish": (-3.0, 3.0)}  # of slopes
POOLS = {
    "dtype": st.sampled_from(DTYPES),
    "bits": st.sampled_from((4, 8)),
    "seed": st.integers(0, 2**31),
    "sizes": st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 20), st.integers(1, 40)),
    "kernel_size": st.tuples(st.integers(1, 3), st.integers(1, 5)),
    **{name: st.tuples(st.integers(1, 3), st.integers(1, 3)) for name in ("stride", "dilation")},
    "padded": st.booleans(),
    "ceil_mode": st.booleans(),
}
HEADS = {**ROWS, "center": st.booleans(), "keep_mean": st.booleans()}


def random(shape, dtype, seed, scale=2.0, device="cpu") -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(device, dtype)


def assert_same_codes(ours: Tensor, theirs: Tensor) -> None:
    """Equal bytes, but for values on a rounding boundary."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.uint8
    assert (ours != theirs).sum() <= 1 + ours.numel() // 500


def assert_close(ours: Tensor, theirs: Tensor, ulps: float = 2, largest: Tensor | None = None) -> None:
    """Within some ulps of the numbers, and of the largest one (or ``largest``) for those that cancel."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if theirs.numel():
        ours, theirs, bound = ours.double(), theirs.double(), ulps * ULP[theirs.dtype]
        assert (
            (ours - theirs).abs() <= bound * (theirs.abs() + (theirs.abs().max() if largest is None else largest))
        ).all()


def assert_as_close_to(truth: Tensor, ours: Tensor, theirs: Tensor, slack: float = 1e-6) -> None:
    """At most four times as far from the truth (float64) as the reference's, give or take ``slack`` of it: some cancel nearly."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    error, allowed = ((x.double() - truth).norm() for x in (ours, theirs))
    assert error <= 4 * allowed + slack * truth.norm()


def check_activation_codes(backend: ModuleType, device, dtype, bits, seed, count, name) -> None:
    table = code_table(name, (), bits, None, False)
    x, grad = random(count, dtype, seed, device=device), random(count, dtype, seed + 1, device=device)
    _check_values(backend, x, grad, table)


def check_strided_values(backend: ModuleType, device, bits) -> None:
    x = random((64, 30), torch.float32, 0, device=device)[:, ::2].t().reshape(-1)[::3]
    _check_values(backend, x, x, code_table("gelu", (), bits, None, False))


def _check_values(backend: ModuleType, x: Tensor, grad: Tensor, table) -> None:
    theirs = reference.encode_steps(x, table.thresholds, table.codes, table.bits)
    assert torch.equal(backend.encode_steps(x, table.thresholds, table.codes, table.bits), theirs)
    scaled = [each.scale_by_levels(grad, theirs, table.levels, table.bits) for each in (backend, reference)]
    assert_close(*scaled, ulps=1)
    over = grad.clone()
    assert backend.scale_by_levels_(over, theirs, table.levels, table.bits) is None
    torch.testing.assert_close(over, scaled[0], rtol=0, atol=0, equal_nan=True)


def check_groups(backend: ModuleType, device, dtype, bits, seed, rows, count, group, rounding) -> None:
    x = random((count, rows), dtype, seed, device=device).t()
    theirs = reference.encode_groups(x, bits, group, rounding)
    for ours, expected in zip(backend.encode_groups(x, bits, group, rounding), theirs):
        assert_same_codes(ours, expected)
    decoded = [each.decode_groups(*theirs, bits, group, count, dtype) for each in (backend, reference)]
    assert_close(*decoded, ulps=2 if dtype == torch.float32 else 1)


def check_not_finite(backend: ModuleType, device) -> None:
    x = torch.randn(3, 64, device=device)
    x[1, 3], x[2, 40] = torch.nan, torch.inf
    ours, theirs = (
        each.decode_groups(*each.encode_groups(x, 4, 8, None), 4, 8, 64, torch.float32)
        for each in (backend, reference)
    )
    expected = torch.zeros(3, 8, dtype=torch.bool, device=device)
    expected[1, 0] = expected[2, 5] = True  # the groups, and no other
    for decoded in (ours, theirs):
        assert torch.equal(decoded.isnan(), expected.repeat_interleave(8, 1))


MAGNITUDES = (1e-42, 1e-36, 1e-12, 1e36)


def check_magnitude(backend: ModuleType, device, scale) -> None:
    x = random((40, 64), torch.float32, 5, 1.0, device) * scale
    for ours, theirs in zip(backend.encode_groups(x, 4, 8, None), reference.encode_groups(x, 4, 8, None)):
        assert torch.equal(ours, theirs)


def check_norms(
    backend: ModuleType, device, dtype, bits, seed, rows, count, group, rounding, center, by_column, weighted, wanted
) -> None:
    x, grad = (random((rows, count), dtype, seed + i, device=device) for i in range(2))
    weight = random(count, dtype, seed + 2, device=device) if weighted else None
    # one row and its column means cancel, as do normalised rows of one or two values
    by_column = by_column and rows > 1 and count > 1 + center
    ours, theirs = (
        each.encode_norm(x, 1e-5, center, by_column, bits, group, rounding) for each in (backend, reference)
    )
    if torch.equal(ours[3], theirs[3]):  # a column's statistic, one bfloat16 further, shifts all of its values
        assert_same_codes(ours[0], theirs[0])
        assert_same_codes(ours[1], theirs[1])
    # A sum of positive terms is off by the square root of their number, in roundings, whatever the order (Higham and Mary 2019);
    # compilers choose it. Its root is off by half of that.
    assert_close(ours[2], theirs[2], ulps=2 + count**0.5 / 4)
    assert_close(ours[3], theirs[3], ulps=1)
    _check_norm_gradients(backend, grad, theirs, weight, center, bits, group, list(wanted), ulps=16)


def check_sums_over_many_rows(backend: ModuleType, device) -> None:
    shapes = (200, 96), (200, 96), (96,)
    x, grad, weight = (random(shape, torch.float32, i, device=device) for i, shape in enumerate(shapes))
    coded = reference.encode_norm(x, 1e-5, True, True, 4, 96, None)
    _check_norm_gradients(backend, grad, coded, weight, True, 4, 96, [True] * 3, ulps=32)


def _check_norm_gradients(backend: ModuleType, grad, coded, weight, center, bits, group, wanted, ulps) -> None:
    packed, scales, rstd, columns = coded
    x_hat = reference.decode_groups(packed, scales, bits, group, grad.shape[1], torch.float32)
    if columns.numel():
        mean, deviation = columns.float()
        x_hat = x_hat * deviation + mean
    scale = rstd[:, None] if weight is None else rstd[:, None] * weight
    arguments = grad, *coded, weight, center, bits, group, wanted
    gradients = backend.norm_backward(*arguments), reference.norm_backward(*arguments)
    _check_gradients(*gradients, wanted, grad, x_hat, scale, 0, ulps)


def _check_gradients(ours, theirs, wanted, grad: Tensor, x_hat: Tensor, scale: Tensor, dims, ulps) -> None:
    """Of input, weight and bias: differences, and sums over ``dims``, are as right as the size of their terms allows."""
    sizes = (grad * scale).abs(), *(terms.float().square().sum(dims).sqrt() for terms in (grad * x_hat, grad))
    for our, their, want, size in zip(ours, theirs, wanted, sizes):
        assert our.shape == their.shape
        if want and size.numel():
            assert_close(our, their, ulps if their.dtype == torch.float32 else 2, size.max())


def check_heads(
    backend: ModuleType, device, dtype, bits, seed, rows, count, group, rounding, center, keep_mean, whole_rows
) -> None:
    """``whole_rows``: heads whose values lie beside each other, as in models; otherwise any strides."""
    if whole_rows:
        x = random((2, rows, 3, count), dtype, seed, device=device).transpose(1, 2)
    else:
        x = random((count, 2, rows, 3), dtype, seed, device=device).permute(1, 3, 2, 0)
    theirs = reference.encode_heads(x, bits, group, center, keep_mean, rounding)
    ours = backend.encode_heads(x, bits, group, center, keep_mean, rounding)
    assert_close(ours[2], theirs[2], ulps=1)
    if not center or (
        keep_mean and torch.equal(ours[2], theirs[2])
    ):  # its last bit in bfloat16 shifts all values of a head
        for our, their in zip(ours[:2], theirs[:2]):
            assert_same_codes(our, their)


def check_attention(
    backend: ModuleType, device, dtype, bits, group, sizes, mask, is_causal, means=False, seed=0
) -> None:
    """``sizes``: samples, heads, queries, keys and the sizes of heads. ``mask``: None, "boolean" or the shape of an additive one.
    ``means``: whether those of keys and values are kept."""
    samples, heads, length, keys, dim, value_dim = sizes
    if mask == "boolean":
        mask = random((samples, 1, length, keys), torch.float32, seed + 4, device=device) > 0
        mask[:1, :, 3:4] = False  # a query that sees nothing
    elif mask is not None:
        mask = random(mask, torch.float32, seed + 4, device=device)
    shapes = (length, dim), (keys, dim), (keys, value_dim)
    tensors = (
        random((samples, n, heads, d), torch.float32, seed + i, device=device).transpose(1, 2)
        for i, (n, d) in enumerate(shapes)
    )
    coded = [
        list(reference.encode_heads(x, bits, group, True, kept, None))
        for x, kept in zip(tensors, (True, means, means))
    ]
    grad = random((samples, length, value_dim, heads), dtype, seed + 3, device=device).permute(0, 3, 1, 2)
    arguments = (*coded, mask, is_causal, dim**-0.5, bits, group, dim, False)
    ours, theirs, exact = (
        each.attention_backward(x, *arguments)[:3]
        for each, x in ((backend, grad), (reference, grad), (reference, grad.double()))
    )
    for our, their, truth in zip(ours, theirs, exact):
        assert our.stride() == their.stride()
        # kernels may round what they multiply to the dtype, as stock ones do; the reference does not
        assert_as_close_to(truth, our, their, max(1e-6, 4 * ULP[dtype]))


def check_prompts(backend: ModuleType, device, dtype, bits, group, sizes, seed=0) -> None:
    """``sizes``: samples, heads, queries, prompts and the sizes of heads."""
    samples, heads, length, count, dim, value_dim = sizes
    query = random((samples, length, heads, dim), dtype, seed, device=device).transpose(1, 2)
    attended, grad = (
        random((samples, length, heads * value_dim), dtype, seed + i, device=device) for i in range(1, 3)
    )
    key, value = (random((count, heads * d), torch.float32, seed + 3, device=device) for d in (dim, value_dim))
    gate = random(heads, torch.float32, seed + 4, device=device)
    coded = list(reference.encode_heads(query, bits, group, True, True, None))
    results = []
    for each, kind in ((backend, dtype), (reference, dtype), (reference, torch.float64)):
        tokens = key.to(kind), value.to(kind), gate.to(kind), 0.4
        results.append(
            [
                each.prompt_attention(attended.to(kind), query.to(kind), *tokens),
                *each.prompt_attention_backward(grad.to(kind), coded, *tokens, bits, group),
            ]
        )
    # the reference's gradients are computed in float32, kernels' products perhaps in the gradients' dtype
    slack = 1e-6 if dtype == torch.float32 else 2 * ULP[dtype]
    for ours, theirs, truth in zip(*results):
        assert_as_close_to(truth, ours, theirs, slack)


def check_channels(
    backend: ModuleType, device, dtype, bits, seed, rows, channels, count, group, rounding, weighted, live, wanted
) -> None:
    x, grad = (random((rows, channels, count), dtype, seed + i, device=device) for i in range(2))
    mean, rstd = (random(channels, torch.float32, seed + i, device=device) for i in (2, 4))
    rstd = rstd.abs() + 0.5
    weight = random(channels, dtype, seed + 3, device=device) if weighted else None
    theirs = reference.encode_channels(x, mean, rstd, bits, group, rounding)
    for our, their in zip(backend.encode_channels(x, mean, rstd, bits, group, rounding), theirs):
        assert_same_codes(our, their)
    x_hat = reference.decode_groups(*theirs, bits, group, channels * count, torch.float32).view(grad.shape)
    scale = (rstd if weight is None else rstd * weight)[:, None]
    arguments = *theirs, rstd, weight, live, bits, group, list(wanted)
    gradients = (each.batch_norm_backward(grad, *arguments) for each in (backend, reference))
    _check_gradients(*gradients, wanted, grad, x_hat, scale, (0, 2), ulps=32)


def check_softmax(backend: ModuleType, device, dtype, bits, seed, rows, count, group, rounding) -> None:
    p = random((rows, count), dtype, seed, device=device).softmax(1)
    theirs = reference.encode_roots(p, bits, group, rounding)
    if (
        dtype == torch.float32
    ):  # a root is rounded to a narrower dtype or not, and lies on another side of a boundary then
        for our, their in zip(backend.encode_roots(p, bits, group, rounding), theirs):
            assert_same_codes(our, their)
    grad = random((rows, count), dtype, seed + 1, device=device)
    gradients = (each.softmax_backward(grad, *theirs, bits, group) for each in (backend, reference))
    assert_close(*gradients, ulps=16, largest=(p * grad.abs()).max() if p.numel() else None)


def check_gates(backend: ModuleType, device, dtype, bits, seed, rows, count, group, rounding, name) -> None:
    grad, *factors = (random((rows, count), dtype, seed + i, device=device) for i in range(3))
    coded = [list(reference.encode_groups(x, bits, group, rounding)) for x in factors]
    arguments = *coded, name, [], [], bits, group
    # slopes are right to 1e-7 whatever their size
    largest = (
        torch.cat([x.flatten().double().abs() for x in (grad, *factors)] + [torch.ones(1, device=device)]).max() ** 2
    )
    decoded = reference.decode_groups(*coded[0], bits, group, count, torch.float32)
    # at a jump the last bit of a decoded gate decides
    elsewhere = torch.ones_like(grad)
    for jump in JUMPS.get(name, ()):
        elsewhere[(decoded - jump).abs() < 1e-5] = 0
    gradients = (each.gated_backward(grad, *arguments) for each in (backend, reference))
    for ours, theirs in zip(*((d_gate * elsewhere, d_up) for d_gate, d_up in gradients)):
        assert_close(ours, theirs, ulps=16 if dtype == torch.float32 else 2, largest=largest)


def check_max_pooling(
    backend: ModuleType, device, dtype, sizes, kernel_size, stride, dilation, padded, ceil_mode, bits, seed
) -> None:
    """With ties, infinities and what is not a number among the values."""
    x = random(sizes, dtype, seed, device=device).round().to(dtype)
    x[x >= 5], x[x <= -4] = torch.nan, -torch.inf
    padding = [size // 2 if padded else 0 for size in kernel_size]
    geometry = kernel_size, stride, padding, dilation
    if any(size + 2 * p < d * (k - 1) + 1 for size, p, d, k in zip(sizes[-2:], padding, dilation, kernel_size)):
        return  # no window fits
    if any(d > size for size, d in zip(sizes[-2:], dilation)):
        return  # a window may step over the input, which leaves the stock operator's index undefined
    ours, theirs = (each.max_pool2d(x, *geometry, ceil_mode, bits) for each in (backend, reference))
    assert torch.equal(ours[0].nan_to_num(99), theirs[0].nan_to_num(99)) and torch.equal(ours[1], theirs[1])
    grad = random(theirs[0].shape, dtype, seed + 1, device=device)
    arguments = grad, theirs[1], *geometry, *sizes[-2:], bits
    assert_close(*(each.max_pool2d_backward(*arguments) for each in (backend, reference)))
