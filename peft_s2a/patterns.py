"""Regular expressions from configurations: refused where matching them could take for ever."""

from __future__ import annotations

import re
from typing import Any

from peft_s2a.compat import parse_regular_expression


LONGEST_PATTERN = 10_000
MOST_REPETITIONS = 4
"""Unbounded repetitions one behind another. A name of n characters is matched in at most n^4 / 24 ways."""
MOST_CHOICES = 100_000
"""Ways through alternatives and bounded repetitions, multiplied."""


def check_pattern(what: str, pattern: str) -> None:
    """Refuses a regular expression whose matching backtracks exponentially, or through a high power of the length.

    Python's engine tries all ways to match, of which `(a+)+` has exponentially many. What may be repeated here is
    therefore a character, a set of them, or a fixed sequence; a group that itself holds repetitions or alternatives
    may be optional, not repeated.

    Args:
        what: the argument that the expression was given in, for messages.
        pattern: the expression.

    Raises:
        ValueError: if it is too long, cannot be read, or could take too long.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"`{what}` must be an expression of at most {LONGEST_PATTERN} characters.")
    try:
        parsed = parse_regular_expression(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"`{what}` is no regular expression: {error}.") from None
    repetitions, choices = _ways(what, parsed, repeated=False)
    if repetitions > MOST_REPETITIONS or choices > MOST_CHOICES:
        raise ValueError(
            f"`{what}` could take too long to match: it holds more than {MOST_REPETITIONS} unbounded repetitions one "
            "behind another, or too many alternatives. Pass a list of module names instead."
        )


def _ways(what: str, parsed: Any, repeated: bool) -> tuple[int, int]:
    """(unbounded repetitions, ways through the rest) of a parsed expression; `repeated`: it stands in a repetition."""
    repetitions, choices = 0, 1
    for operator, argument in parsed:
        name = str(operator)
        if name == "BRANCH":
            inner = [_ways(what, branch, repeated) for branch in argument[1]]
            found = max(count for count, _ in inner), sum(ways for _, ways in inner)
        elif name.endswith("REPEAT"):  # MAX_REPEAT, MIN_REPEAT, POSSESSIVE_REPEAT
            low, high, body = argument
            if repeated:
                _raise_nested(what)
            counts, ways = _ways(what, body, repeated=high > 1)
            is_bounded = high <= MOST_CHOICES
            found = (counts, ways + high - low) if is_bounded else (counts + 1, ways)
        else:
            found = (0, 1)
            for group in _groups(argument):
                inner = _ways(what, group, repeated)
                found = found[0] + inner[0], found[1] * inner[1]
        if repeated and found != (0, 1):
            _raise_nested(what)
        repetitions, choices = repetitions + found[0], choices * found[1]
    return repetitions, choices


def _groups(argument: Any) -> list[Any]:
    """The parsed expressions inside the argument of an operator: of groups, look-arounds and conditions."""
    items = argument if isinstance(argument, (list, tuple)) else [argument]
    return [item for item in items if hasattr(item, "getwidth")]


def _raise_nested(what: str) -> None:
    raise ValueError(
        f"`{what}` could take for ever to match: it repeats a group that holds repetitions or alternatives. Repeat "
        "single characters or fixed sequences only, or pass a list of module names."
    )
