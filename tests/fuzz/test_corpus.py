"""Every named case does with quantised activations what it does without."""

import pytest

from .corpus import CORPUS, failures
from .known import KNOWN_FAILURES


def _cases():
    for name in CORPUS:
        reason = KNOWN_FAILURES.get(name)
        yield pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason=reason)] if reason else [])


@pytest.mark.parametrize("name", _cases())
def test_named_case_is_stock(name):
    found = list(failures(name))
    assert not found, f"{CORPUS[name].__doc__}\n" + "\n".join(found[:10])


def test_known_failures_are_cases():
    assert KNOWN_FAILURES.keys() <= CORPUS.keys()
