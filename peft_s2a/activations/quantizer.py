"""`Quantizer`: how one operator is quantised."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import BACKENDS
from .codec import LARGEST_GROUP, WIDTHS
from .ops import op_set_name


ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class Quantizer:
    """How one operator is quantised.

    Attributes:
        bits: width of a code: 1, 2, 3, 4 or 8.
        group_size: values that share a scale, where the operator's codes have scales.
        rounding: "nearest", or "stochastic" (unbiased; seeded by torch's default CPU generator).
        center_attention: subtract their mean over tokens from queries, keys and values before coding them.
        levels: derivative levels of an activation function, ``2 ** bits`` numbers; None for the shipped ones.
        backend: "auto", "reference", "compiled" or "triton".
    """

    bits: int = 4
    group_size: int = 32
    rounding: str = "nearest"
    center_attention: bool = True
    levels: tuple[float, ...] | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (("bits", WIDTHS), ("rounding", ROUNDINGS), ("backend", BACKENDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        if not 1 <= self.group_size <= LARGEST_GROUP:
            raise ValueError(f"group_size must be between 1 and {LARGEST_GROUP}, not {self.group_size!r}")
        if self.levels is not None:
            object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))
            if len(self.levels) != 2**self.bits or not all(map(math.isfinite, self.levels)):
                raise ValueError(
                    f"levels must be {2**self.bits} finite numbers at {self.bits} bits, not {self.levels}"
                )

        object.__setattr__(self, "_op_set", op_set_name(self.backend))

    @property
    def ops(self):
        """The ops, as attributes, that ``backend`` stands for; see `ops.op_set`."""
        return getattr(torch.ops, self._op_set)

    def draw_seed(self) -> Tensor | None:
        """A fresh seed for stochastic rounding, None for rounding to nearest."""
        if self.rounding == "nearest":
            return None
        return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device="cpu")
