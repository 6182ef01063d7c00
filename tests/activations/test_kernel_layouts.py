"""The CPU kernels on tensors of any size, strided, or not aligned: results do not depend on where values lie. `make sanitize` runs
this with kernels that notice when something beyond a tensor is read or written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_paths import PATHS, Case, tensors

from peft_s2a.activations.backends import compiled
from peft_s2a.activations.codec import WIDTHS
from peft_s2a.activations.ops import op_set


pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler")

KERNELS = sorted(PATHS.keys() - {"levels", "gate, mish"})  # these are the reference's on a CPU
SIZES = {
    "rows": st.integers(0, 9),
    "count": st.one_of(st.integers(1, 150), st.sampled_from((256, 700, 1037))),
    "samples": st.integers(0, 3),
    "heads": st.integers(1, 3),
    "tokens": st.integers(0, 40),
    "keys": st.integers(1, 40),
    "dim": st.integers(1, 70),
    "value_dim": st.integers(1, 70),
}
CODES = {"bits": st.sampled_from(WIDTHS), "group": st.sampled_from((1, 7, 16, 32, 64, 2**31 - 1))}


def _own(x):
    """In memory of exactly its size, behind whose end a sanitizer notices everything."""
    return x.clone(memory_format=torch.contiguous_format)


def _strided(x):
    return x.new_zeros(*x.shape, 2)[..., 0].copy_(x)


def _transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _not_aligned(x):
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


class _Laid:
    """The ops, which get every tensor, codes too, through a function."""

    def __init__(self, lay):
        self.lay, self.ops = lay, op_set("compiled")

    def __getattr__(self, name):
        def call(*args):
            op, laid = getattr(self.ops, name), [self._laid(x) for x in args]
            if not name.endswith("_"):
                return op(*laid)
            if not laid[0].is_contiguous():  # which what is written over has to be
                laid[0] = args[0]
            op(*laid)
            return args[0].copy_(laid[0])

        return call

    def _laid(self, x):
        if isinstance(x, list):
            return [self._laid(each) for each in x]
        return self.lay(x) if isinstance(x, torch.Tensor) and x.dim() else x


def _bits(x):
    """Which tell one NaN from another number, as numbers do not."""
    return x.nan_to_num(nan=12345.0) if x.is_floating_point() else x


@settings(max_examples=4, deadline=None)
@given(
    case=st.builds(Case, **CODES, rounding=st.sampled_from((None, 2**62 + 12345)), **SIZES),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("name", KERNELS)
def test_results_do_not_depend_on_where_values_lie(name, case, dtype, seed):
    path, inputs = PATHS[name], tensors(name, case, dtype, seed)
    plain = path.run(_Laid(_own), case, **inputs)
    for expected, result in zip(path.run(op_set("reference"), case, **inputs), plain):
        assert result.shape == expected.shape and result.dtype == expected.dtype
    for lay in (_strided, _transposed, _not_aligned):
        for expected, result in zip(plain, path.run(_Laid(lay), case, **inputs)):
            assert torch.equal(_bits(result), _bits(expected)), lay.__name__


@pytest.fixture
def threads():
    """`torch.set_num_threads`; afterwards there are as many as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", KERNELS)
def test_tensors_that_are_taken_in_pieces(name, threads):
    """By several threads, in chunks of groups and tiles of queries."""
    case = Case(4, 16, None, 300, 2100, 3, 4, 230, 240, 64, 48)

    def run(ops, count):
        threads(count)
        return PATHS[name].run(ops, case, **tensors(name, case, torch.float32))

    alone, together, theirs = run(_Laid(_own), 1), run(_Laid(_own), 3), run(op_set("reference"), 1)
    for one, three, expected in zip(alone, together, theirs):
        assert one.shape == three.shape == expected.shape and one.dtype == three.dtype == expected.dtype
        assert torch.equal(one.isfinite(), expected.isfinite())
        torch.testing.assert_close(three, one, rtol=1e-4, atol=1e-4)  # sums of threads are added up in another order
