"""The backward pass of attention from coded queries, keys and values, in tiles of bounded size.

Per tile: probabilities are recomputed, ``P = softmax(scale Q K^T + mask)``, then (Dao et al., "FlashAttention", 2022,
appendix B) ``dV = P^T dO``, ``dP = dO V^T``, ``dS = P * (dP - rowsum(P * dP))``, ``dQ = scale dS K``, ``dK = scale
dS^T Q``. A tile is some samples, or some heads of one sample, or some query rows of one head: whatever keeps its
probabilities within a budget.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..codec import math_dtype


# bytes of one tile's probabilities: few enough to stay in a CPU's cache, many enough to fill a GPU
_TILE_BYTES = 1 << 20
_TILE_BYTES_CUDA = 128 << 20


def attention_backward(
    grad: Tensor,
    decode: Callable[[int, slice, slice], Tensor],
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    mask_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for query, key, value (dtype of grad) and mask (float32 or float64; empty unless ``mask_wanted``).

    Args:
        grad: ``[B, H, L, Ev]``, the output's gradient.
        decode: ``decode(which, samples, heads)`` gives a fresh slice of the query (0), key (1) or value (2), float32 or
            float64.
        shapes: of query ``[B, H, L, E]``, key ``[B, H, S, E]`` and value ``[B, H, S, Ev]``.
        mask: boolean (True: take part) or additive; four dimensions, broadcastable to ``[B, H, L, S]``.
        is_causal: query i sees keys 0..i.
    """
    (samples, heads, length, _), (_, _, keys, _), _ = shapes
    wide = math_dtype(grad.dtype)
    # [B, N, H, E] in memory, so that merging the heads again costs no copy
    d_query, d_key, d_value = (
        grad.new_zeros(shape[0], shape[2], shape[1], shape[3], dtype=wide).transpose(1, 2) for shape in shapes
    )
    d_mask = torch.zeros(mask.shape if mask_wanted else 0, dtype=wide, device=grad.device)
    for b, h, row_tiles in _tiles(samples, heads, length, keys, grad):
        q, k, v = decode(0, b, h).mul_(scale), decode(1, b, h), decode(2, b, h)
        for rows in row_tiles:
            q_rows, d_out = q[:, :, rows], grad[b, h, rows].to(wide)
            scores = q_rows @ k.transpose(-1, -2)
            if is_causal:
                _hide_later_keys(scores, rows.start)
            if mask is not None:
                tile_mask = _narrow(mask, b, h, rows)
                # added, as in stock: a hidden key that is not a number still spoils its rows
                scores += torch.where(tile_mask, 0, -torch.inf) if mask.dtype == torch.bool else tile_mask
            p = torch._safe_softmax(scores, -1)
            d_s = torch._softmax_backward_data(d_out @ v.transpose(-1, -2), p, -1, wide)
            if not mask_wanted and keys:
                factor = _rounding_of_fused_kernels(scores)
                p, d_s = p.mul_(factor), d_s.mul_(factor)
            if mask_wanted:
                reduced = [d for d in range(4) if mask.shape[d] == 1]
                _narrow(d_mask, b, h, rows).add_(d_s.sum(reduced, keepdim=True) if reduced else d_s)
            d_query[b, h, rows] = (d_s @ k).mul_(scale)
            d_key[b, h] += d_s.transpose(-1, -2) @ q_rows
            d_value[b, h] += p.transpose(-1, -2) @ d_out
    return d_query.to(grad.dtype), d_key.to(grad.dtype), d_value.to(grad.dtype), d_mask


def _rounding_of_fused_kernels(scores: Tensor) -> Tensor:
    """By how much the probabilities that PyTorch's fused kernels recompute in backward differ from softmax, per row.

    They keep the logarithm of the sum of exponentials as one number, in which the sum is lost where scores are huge:
    in rows that a mask of -1e9 or of the dtype's minimum hides altogether every probability is 1. What
    `torch.nn.functional.scaled_dot_product_attention` does is the reference here too; its composite form, which it
    takes if the mask needs a gradient, does not round so.
    """
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    exponent = (scores - top).exp_().sum(-1, keepdim=True).clamp_min_(1).log_()
    return ((exponent + top).sub_(top).sub_(exponent)).neg_().exp_()


def _tiles(
    samples: int, heads: int, length: int, keys: int, like: Tensor
) -> Iterator[tuple[slice, slice, list[slice]]]:
    """Slices of samples and heads, and the slices of query rows to take each in."""
    budget = _TILE_BYTES_CUDA if like.is_cuda else _TILE_BYTES
    size = max(budget // (keys * math_dtype(like.dtype).itemsize), 1) if keys else length  # query rows in a tile
    row_step = max(min(size, length), 1)
    head_step = max(min(size // max(length, 1), heads), 1)
    sample_step = max(size // max(length * heads, 1), 1) if head_step == heads else 1
    rows = [slice(r, min(r + row_step, length)) for r in range(0, length, row_step)]
    for b in range(0, samples, sample_step):
        for h in range(0, heads, head_step):
            yield slice(b, b + sample_step), slice(h, h + head_step), rows


def _narrow(mask: Tensor, *slices: slice) -> Tensor:
    return mask[tuple(s if size > 1 else slice(None) for s, size in zip(slices, mask.shape))]


def _hide_later_keys(scores: Tensor, first_row: int) -> None:
    length, keys = scores.shape[-2:]
    rows = torch.arange(first_row, first_row + length, device=scores.device)
    scores.masked_fill_(torch.arange(keys, device=scores.device) > rows[:, None], -torch.inf)
