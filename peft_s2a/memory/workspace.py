"""What CPU kernels allocate within themselves, for estimates.

Most kernels allocate their outputs only. The exceptions here were found by comparing the operators of training steps
with the events of PyTorch's allocator (2.13, oneDNN on x86-64 with AVX-512 and AMX):

* oneDNN computes convolutions on copies in blocked layouts and copies the result back, in half precision twice. Images
  (up to 4 channels) are not copied, nor is anything for pointwise convolutions in float32 on a single thread. Gradients
  of images take about a sample of the input more for each thread. Tensors that are channels-last are not copied,
  weights are. Gradients of half-precision weights are accumulated in float32.
* Kernels that work on contiguous tensors copy inputs that are not.

* The backward pass of quantised attention decodes and recomputes, one head a thread at a time. The other quantised
  operators are taken to be fused; the reference backend allocates more than is estimated.

All sizes are in bytes, and come on top of what is live once the operator has returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def workspace_bytes(function: Any, args: tuple, output: Any) -> int:
    """Highest bytes that the kernel of an operator holds beside its inputs and outputs, 0 for kernels not listed.

    Args:
        function: The operator, such as `torch.ops.aten.convolution.default`.
        args: Its arguments.
        output: What it returned.
    """
    kernel = _attention_backward if function._schema.name.endswith("::attention_backward") else _KERNELS.get(function)
    return kernel(args, output) if kernel is not None else 0


def _bytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _is_pointwise(weight: torch.Tensor, stride: list[int]) -> bool:
    return all(size == 1 for size in weight.shape[2:]) and all(step == 1 for step in stride)


def _uses_onednn(inputs: torch.Tensor, weight: torch.Tensor, stride: list[int]) -> bool:
    """Whether a convolution takes oneDNN's kernels, on blocked copies."""
    if not torch.backends.mkldnn.is_available() or inputs.dtype is torch.float64:
        return False
    alone = inputs.dtype is torch.float32 and torch.get_num_threads() == 1
    return not (alone and _is_pointwise(weight, stride))


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _convolution(args: tuple, output: torch.Tensor) -> int:
    inputs, weight, _, stride, _, _, is_transposed = args[:7]
    if not _uses_onednn(inputs, weight, stride):
        return _bytes(output) if is_transposed else 0
    if _is_channels_last(inputs):
        return 2 * _bytes(weight)
    copied = _bytes(weight) + (_bytes(inputs) if inputs.shape[1] > 4 else 0)
    if is_transposed and output.shape[1] <= 4:  # the gradient of images
        copied += int((0.3 + 1.2 * torch.get_num_threads()) * _bytes(inputs) / max(len(inputs), 1))
    results = 2 if inputs.dtype is not torch.float32 or (is_transposed and max(stride) > 1) else 1
    return max(copied, results * _bytes(output))


def _convolution_backward(args: tuple, output: tuple) -> int:
    grad_output, inputs, weight, _, stride = args[:5]
    grad_input, grad_weight, grad_bias = output
    if not _uses_onednn(inputs, weight, stride):
        return 0
    half = inputs.dtype is not torch.float32
    channels_last = _is_channels_last(inputs)
    grad, value, kernel = _bytes(grad_output), _bytes(inputs), _bytes(weight)
    workspace = 0
    if grad_input is not None:
        results = 2 if half or max(stride) > 1 else 1
        workspace = 2 * kernel if channels_last else max(grad + kernel, results * value)
        if grad_weight is not None:
            workspace -= kernel  # whose gradient comes later
    if grad_weight is not None or grad_bias is not None:  # computed together
        depthwise = weight.shape[1] == 1 and inputs.shape[1] > 1
        is_image = inputs.shape[1] <= 4
        if channels_last:
            own = 257 * kernel if depthwise and weight.shape[-1] > 3 else 3 * kernel  # wide: groups become 16 x 16
        elif is_image and weight.shape[-1] > 14:
            own = torch.get_num_threads() * (4 * kernel + value // inputs.shape[0])
        else:
            own = 0 if depthwise else grad + (0 if is_image else value)
        workspace = max(workspace, own + (2 * kernel if half else 0), kernel)
    return workspace


def _attention_backward(args: tuple, output: tuple) -> int:
    """The fused kernel's room for a head a thread; a tile of `backends.attention` where the mask wants a gradient."""
    from peft_s2a.activations.backends import compiled
    from peft_s2a.activations.backends.attention import _tiles

    grad, _, key = args[:3]
    dim, mask_wanted = args[9:11]
    samples, heads, length, width = grad.shape
    keys = key[0].shape[2]
    if 0 in (samples, heads, length, keys):
        return 0
    if not mask_wanted and grad.dtype is not torch.float64 and compiled.library() is not None:
        return 4 * torch.get_num_threads() * compiled.attention_workspace(length, keys, dim, width)
    tile_samples, tile_heads, rows = next(_tiles(samples, heads, length, keys, grad))
    tiles = min(tile_samples.stop, samples) * min(tile_heads.stop, heads)
    probabilities = tiles * (rows[0].stop - rows[0].start) * keys
    operands = tiles * (length + 2 * keys + length) * width  # query, key, value and one product
    return 4 * (4 * probabilities) + probabilities + operands * grad.element_size()


def _copies(*positions: int) -> Callable[[tuple, Any], int]:
    """For kernels that make the arguments at `positions` contiguous."""

    def workspace(args: tuple, output: Any) -> int:
        tensors = (args[position] for position in positions)
        return _bytes(*(t for t in tensors if t is not None and not t.is_contiguous()))

    return workspace


_KERNELS: dict[Any, Callable[[tuple, Any], int]] = {
    torch.ops.aten.convolution.default: _convolution,
    torch.ops.aten.convolution_backward.default: _convolution_backward,
    torch.ops.aten.native_layer_norm.default: _copies(0),
    torch.ops.aten.native_layer_norm_backward.default: _copies(0, 1),
    torch.ops.aten.native_batch_norm_backward.default: _copies(0, 1),
    torch.ops.aten.roll.default: _copies(0),
    torch.ops.aten._safe_softmax.default: lambda args, output: output.numel(),
}
