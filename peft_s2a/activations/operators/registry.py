"""Which operator stands in for which of torch's functions."""

from collections.abc import Callable
from typing import Any


HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {}


def handles(*stock: Callable[..., Any]):
    """Register a handler for stock functions: it takes the mode and the stock arguments, and returns the result, or
    NotImplemented to leave the call as it is."""

    def register(handler):
        HANDLERS.update(dict.fromkeys(stock, handler))
        return handler

    return register
