"""Every named case does with quantised activations what it does without."""

import pytest

from .corpus import CORPUS, failures
from .known import KNOWN_FAILURES


def _case(name: str, index: int):
    """Of neighbours, which are variations of one cause for the most part, the usual run takes every third."""
    reason = KNOWN_FAILURES.get(name)
    marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
    return pytest.param(name, marks=[*marks, pytest.mark.slow] if index % 3 else marks)


@pytest.mark.parametrize("name", [_case(name, index) for index, name in enumerate(CORPUS)])
def test_named_case_is_stock(name):
    found = list(failures(name))
    assert not found, f"{CORPUS[name].__doc__}\n" + "\n".join(found[:10])


def test_known_failures_are_cases():
    assert KNOWN_FAILURES.keys() <= CORPUS.keys()
