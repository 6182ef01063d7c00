"""Computing with quantised activations inside any module: a function mode that replaces the operators it calls.

Modules, functions and methods end in the same few operators, so catching those covers stock layers, activation classes
of other libraries and attention written inline alike, without a patch per model.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import compat
from ..compat import current_function_mode, pop_function_mode, push_function_mode
from ..parallelism import refuse_distributed
from . import masks, notes
from .config import WIDE_HEAD, ActivationQuantizationConfig
from .operators import HANDLERS
from .operators.inline import power
from .operators.vector_norm import norm
from .plans.planner import as_before
from .quantizer import Quantizer


class OperatorMode(TorchFunctionMode):
    """While entered and autograd records, supported operators keep codes instead of full-precision tensors.

    Args:
        config: widths, levels and backend.
        module_name: dotted name of the module whose operators these are, for settings that go by module.
    """

    is_replaced_by_plans = True  # what it does to the modules inside is recorded in their plans

    def __init__(self, config: ActivationQuantizationConfig, module_name: str) -> None:
        super().__init__()
        self.config = config
        self.module_name = module_name
        self._quantizers = config.quantizers(module_name)

    def __reduce__(self):
        return OperatorMode, (self.config, self.module_name)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)`` under this mode in place of the surrounding module's: every mode in force costs time
        at every operator."""
        outer = current_function_mode()
        replaces = isinstance(outer, OperatorMode)
        if replaces:
            pop_function_mode()
        outer_notes, result = notes.begin(), None
        push_function_mode(self)
        try:
            result = function(*args, **kwargs)
            return result
        finally:
            pop_function_mode()
            notes.end(outer_notes, result if replaces else None)
            if replaces:
                push_function_mode(outer)

    def quantizer(self, kind: str, channels: int | None = None) -> Quantizer:
        """The settings of operators of ``kind`` in this module; ``channels``: of an attention head, if known."""
        narrow = kind == "attention" and channels is not None and channels <= WIDE_HEAD
        return self._quantizers["narrow_attention" if narrow else kind]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        notes.before_call(func, args, kwargs)
        # torch.compile finds these in no dict: they are functions that torch has written in Python
        handler = power if func is Tensor.__pow__ else norm if func is Tensor.norm else HANDLERS.get(func)
        if handler is not None and torch.is_grad_enabled() and not _left_to_stock(args, kwargs):
            if kwargs:
                kwargs = {_NUMPY_NAMES.get(name, name): value for name, value in kwargs.items()}
                result = handler(self, *args, **kwargs)
            else:
                result = handler(self, *args)
            if result is not NotImplemented:
                return result
        if torch.compiler.is_compiling():
            if func in _ARRAY_OPERATORS and any(isinstance(arg, np.ndarray) for arg in args):
                return _ARRAY_OPERATORS[func](*args)
            # this one torch has written in Python, with a call of super() that it cannot compile
            if func is Tensor.unflatten:
                func = torch.unflatten
            if func in masks.COMPILED_FUNCTIONS and torch.is_grad_enabled():
                return masks.call_compiled(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))
        if func in masks.FUNCTIONS and torch.is_grad_enabled():
            return masks.call(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@functools.cache
def follow_checkpoints() -> None:
    """Have what a checkpoint recomputes computed as it was before: under the mode of the module it is in, by plans where
    there were plans."""

    def under_its_mode(function: Callable[..., Any]) -> Callable[..., Any]:
        function = as_before(function)
        mode = current_function_mode()
        if not isinstance(mode, OperatorMode):
            return function
        notes.forget_all()  # the second time none of these will be there
        return functools.partial(mode.run, function)

    compat.replace_recomputed(under_its_mode)


def _left_to_stock(args: tuple, kwargs: dict[str, Any] | None) -> bool:
    """Whether a call is one that no operator here takes: of complex numbers, or with ``out=``. Those of a layer that has
    become tensor-parallel meanwhile are refused."""
    if kwargs:
        if kwargs.get("out") is not None:
            return True
        args = (*args, *kwargs.values())
    for x in args:
        if isinstance(x, Tensor):
            if x.is_complex():
                return True
            if type(x) not in _PLAIN:
                refuse_distributed(x)
    return False


_PLAIN = (Tensor, nn.Parameter)

# numpy's names of arguments, which torch's functions take as well
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}


# Under torch.compile function modes are offered numpy's arithmetic as well, as methods of tensors, which arrays lack.
_ARRAY_OPERATORS = {
    Tensor.neg: operator.neg,
    Tensor.abs: operator.abs,
    Tensor.add: operator.add,
    Tensor.sub: operator.sub,
    Tensor.mul: operator.mul,
    Tensor.div: operator.truediv,
    Tensor.pow: operator.pow,
}
