"""Operators that keep b-bit codes for backward instead of full-precision tensors, one a file.

Each computes the stock operator's result with the stock operator, keeps codes of what its *derivative* needs, and only
does so when autograd records and some input needs them; otherwise it is the stock call. Everything kept goes through
``ctx.save_for_backward``, so saved-tensor hooks, ``save_on_cpu`` and activation checkpointing see it. Double backward
is refused.

A file holds the operator (a function that takes a `Quantizer`, and its autograd function) and, at its end, the handlers
by which it stands in for functions of torch's (`HANDLERS`).
"""

from .activation import activation, self_gated
from .amax import amax
from .attention import scaled_dot_product_attention
from .average_pool import adaptive_avg_pool2d, avg_pool2d
from .batch_norm import batch_norm
from .common import is_activation
from .convolution import conv2d, frozen_convolution
from .dropout import drop_path, dropout
from .einsum import einsum
from .gated_activation import gated_activation
from .grid_sample import grid_sample
from .group_norm import group_norm
from .linear import frozen_linear, linear
from .low_rank import add_low_rank, quantized_add_low_rank
from .max_pool2d import max_pool2d
from .normalize import normalize
from .products import add_product, matmul, multiply
from .prompt_attention import add_prompt_attention, quantized_add_prompt_attention
from .registry import HANDLERS
from .row_norm import layer_norm, rms_norm, rms_normalized
from .softmax import softmax
from .square import square
from .vector_norm import vector_norm


__all__ = [
    "HANDLERS", "activation", "adaptive_avg_pool2d", "add_low_rank", "add_product", "add_prompt_attention", "amax",
    "avg_pool2d", "batch_norm", "conv2d", "drop_path", "dropout", "einsum", "frozen_convolution", "frozen_linear",
    "gated_activation", "grid_sample", "group_norm", "is_activation", "layer_norm", "linear", "matmul", "max_pool2d",
    "multiply", "normalize", "quantized_add_low_rank", "quantized_add_prompt_attention", "rms_norm", "rms_normalized",
    "scaled_dot_product_attention", "self_gated", "softmax", "square", "vector_norm",
]  # fmt: skip
