"""All named cases."""

import inspect
from collections.abc import Iterator

from . import numerics, overwriting, tiles
from .cases import Case, differences


def _named(module) -> dict[str, type[Case]]:
    """The cases of a module: those with a description, the others are only derived from."""
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Case)]
    return {c.__name__: c for c in classes if c.__module__ == module.__name__ and c.__doc__ is not None}


GROUPS = {"overwriting": _named(overwriting), "tiles": _named(tiles), "numerics": _named(numerics)}
CORPUS: dict[str, type[Case]] = {name: case for group in GROUPS.values() for name, case in group.items()}


def failures(name: str) -> Iterator[str]:
    """In words, what differs from the stock model in the named case, in any of its settings."""
    case = CORPUS[name]
    for setting in case.settings:
        yield from (f"[{setting.name}] {difference}" for difference in differences(case, setting))
