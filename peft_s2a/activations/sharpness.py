"""Attention that is too sharp for its codes: found in each module's first training call, and said once.

The backward pass of attention recomputes probabilities from coded queries and keys, so an error in a logit is an error
in an exponent. How large it is goes by the logits' spread: codes of b bits are wrong by a share of the values, whatever
these are. It can be told from the codes alone. Rounding to one of evenly spaced steps has a variance of a twelfth of
the step squared, hence for a logit ``l = scale * sum_c q_c k_c``

    var l = scale ** 2 / 12 * sum_c (q_c ** 2 * step_k ** 2 + step_q ** 2 * k_c ** 2).

Where a probability is near 0 or 1 its derivative ``p (1 - p)`` is near zero and the error does no harm; that is the
weight in the mean. On Gaussian queries and keys the gradient's cosine with the exact one is 0.99 at an error of 0.1, 0.98
at 0.3 and 0.95 at 0.5 (`tests/activations/test_precision.py`).
"""

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..compat import DisableTorchFunction, is_fake, no_dispatch_modes, tree_leaves
from .codec import step_sizes
from .config import ActivationQuantizationConfig
from .ops import op_set
from .plans.trace import is_recording


LIMIT = 0.3  # of the error of a logit, beyond which the gradient's cosine falls below 0.98
_ROWS = 64  # queries of a head that are looked at
_LOGITS = 2**20  # looked at in one call
_NAMED = 3  # modules in the warning


class _Looking(threading.local):
    """What is found in the call that is running in this thread; None: nobody looks."""

    errors: list[float] | None = None
    saw_fake = False


_looking = _Looking()


def is_looking() -> bool:
    """Whether the errors of attention are wanted in the call that is running; not in what torch.compile traces, as where a
    block is compiled alone inside a module that looks."""
    return not torch.compiler.is_compiling() and _looking.errors is not None and not is_recording()


def look(
    query: Sequence[Tensor], key: Sequence[Tensor], scale: float, bits: int, group_size: int, channels: int
) -> None:
    """Note the error of the logits of an attention, if `is_looking`.

    Args:
        query, key: the three results of `encode_heads` for each.
        scale: of the logits.
        bits, group_size: of the codes.
        channels: of a head.
    """
    if not is_looking():
        return
    if is_fake(query[0]):  # an estimate from shapes
        _looking.saw_fake = True
    elif query[0].numel() and key[0].numel():
        with torch.no_grad(), no_dispatch_modes(), DisableTorchFunction():
            _looking.errors.append(logit_error(query, key, scale, bits, group_size, channels))


def logit_error(
    query: Sequence[Tensor], key: Sequence[Tensor], scale: float, bits: int, group_size: int, channels: int
) -> float:
    """Standard deviation of what rounding adds to the logits, weighted by the derivative of their softmax; the arguments
    are `look`'s. Masks are left aside, and of many samples and queries a few stand for all."""
    samples, heads, tokens, _ = query[0].shape
    keys = key[0].shape[2]
    rows = slice(None, None, -(-tokens // _ROWS))
    wanted = max(1, _LOGITS // (heads * min(tokens, _ROWS) * keys))
    some = slice(None, None, -(-samples // wanted))
    q, q_steps = _decoded([query[0][some, :, rows], query[1][some, :, rows]], bits, group_size, channels)
    k, k_steps = _decoded([key[0][some], key[1][some]], bits, group_size, channels)
    if query[2].numel():
        q = q + query[2][some]
    probability = torch.softmax(scale * q @ k.mT, -1)
    variance = scale**2 / 12 * (q.square() @ k_steps.square().mT + q_steps.square() @ k.square().mT)
    weight = probability * (1 - probability)
    return float(((weight * variance).sum() / weight.sum().clamp_min(1e-12)).sqrt())


def _decoded(codes: Sequence[Tensor], bits: int, group_size: int, channels: int) -> tuple[Tensor, Tensor]:
    """Values and steps, float32 ``[B, H, N, channels]``."""
    packed, scales = (x.flatten(0, 2) for x in codes)
    values = op_set("reference").decode_groups(packed, scales, bits, group_size, channels, torch.float32)
    steps = step_sizes(scales, bits, group_size, channels)
    shape = *codes[0].shape[:3], channels
    return values.view(shape), steps.view(shape)


class Sharpness:
    """What was found of a model's attention.

    Attributes:
        errors: {name of a module: largest `logit_error` of the attention in it, in its first training call}.
    """

    def __init__(self, config: ActivationQuantizationConfig) -> None:
        self.config = config
        self.errors: dict[str, float] = {}
        self._unsaid: list[str] = []

    def sharp(self) -> dict[str, float]:
        """Of ``errors``, those beyond `LIMIT`."""
        return {name: error for name, error in self.errors.items() if error > LIMIT}

    @contextmanager
    def looking(self, name: str) -> Iterator[None]:
        """Look at the attention that runs meanwhile, in a first call of module ``name``."""
        if _looking.errors is not None:  # on behalf of a module around this one
            yield
            return
        _looking.errors, _looking.saw_fake = [], False
        try:
            yield
        finally:
            found, _looking.errors = _looking.errors, None
        if found:
            # a step of stochastic rounding has twice the variance
            factor = 2**0.5 if self.config.rounding == "stochastic" else 1.0
            self.errors[name] = max(found) * factor
            if self.errors[name] > LIMIT:
                self._unsaid.append(name)

    def say_later(self, result: Any) -> None:
        """Warn of what was found, once for all modules of a step: when the backward pass comes to ``result``."""
        if not self._unsaid:
            return
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.requires_grad and not x.is_leaf:
                x.register_hook(self._say)
                return
        self._say()

    def _say(self, grad: Tensor | None = None) -> None:
        names, self._unsaid = self._unsaid, []
        if names:
            warnings.warn(self.describe({name: self.errors[name] for name in names}), stacklevel=2)

    def describe(self, sharp: dict[str, float]) -> str:
        """A sentence on modules whose attention is too sharp for its codes, and what to set."""
        shown = ", ".join(repr(name) for name in list(sharp)[:_NAMED])
        shown += f" and {len(sharp) - _NAMED} more" if len(sharp) > _NAMED else ""
        coarse = [name for name in sharp if self.config.quantizer("attention", name).bits < 8]
        if not coarse:
            advice = f"Leave it in full precision: `skip_modules={list(sharp)[:_NAMED]}`"
        else:
            one = f", or `bits={{'{coarse[0]}:attention': 8}}` for one module" if coarse[0] else ""
            advice = f'Give attention more bits: `ActivationQuantizationConfig(bits={{"attention": 8}})`{one}'
        return (
            f"Attention is too sharp for its codes in {shown}: they move its logits by up to {max(sharp.values()):.2f} "
            f"(standard deviation; beyond {LIMIT} gradients lose precision). {advice}."
        )


def first_call_is_over() -> bool:
    """Whether the last call that was looked at was a real one, on tensors with values."""
    return not _looking.saw_fake
