"""Prompt: learned tokens that every attention layer also attends to; a learned pattern on the image elsewhere."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft_s2a.activations.operators import add_prompt_attention
from peft_s2a.compat import resident
from peft_s2a.tuners.layer import AttachedLayer, first_tensor, with_first_tensor


class _PromptBase(AttachedLayer):
    attribute = "prompt_adapter"

    def not_mergeable(self, adapter_name: str) -> str:
        return (
            f"Adapter {adapter_name!r} trains prompts, which no weight of the base model can hold, so it cannot be "
            "merged. Keep the adapter separate, or train with `structures=('bias',)`."
        )


class PromptLayer(_PromptBase):
    r"""Gives an attention layer, its host, a second, gated one: `o = attn(q, K, V) + tanh(g) * attn(q, K_p, V_p)`.

    K_p and V_p are P learned tokens per head, g one gate per head that starts at zero, so that the output is the base
    model's at the start (zero-init attention, LLaMA-Adapter, Zhang et al. 2023, arXiv:2303.16199, section 3.2, where
    the prompts pass through the layer's own key and value projections; learned keys and values are our choice, as is
    that the query of the first attention is used before position embeddings rotate it: prompts have no position). Deep
    prompts are from VPT (Jia et al. 2022, arXiv:2203.12119, section 3.2).

    The query is what the query projection puts out, and the result is added to what the output projection reads. So
    token counts, masks, windows, position biases, and whichever implementation computes the first attention are left
    alone.

    Args:
        host: the attention layer.
        query: its query projection, or the fused one whose first third is the query. Output [..., tokens, width].
        output: its output projection. Input [..., tokens, width].
        num_heads: attention heads.
        width: width of all heads together.
    """

    adapter_layer_names = ("s2a_key", "s2a_value", "s2a_gate")

    def __init__(self, host: nn.Module, query: nn.Module, output: nn.Module, num_heads: int, width: int) -> None:
        super().__init__(host)
        self._projections = [query, output]
        self.num_heads = num_heads
        self.width = width
        self.s2a_key = nn.ParameterDict({})
        self.s2a_value = nn.ParameterDict({})
        self.s2a_gate = nn.ParameterDict({})

    def _hook(self) -> None:
        query, output = self._projections
        self._during(self._host[0])
        self._after(query, self._remember_query)
        self._before(output, self._add_attention)

    def update_layer(self, adapter_name: str, *, num_tokens: int, init_weights: bool) -> None:
        """Adds an adapter.

        Args:
            adapter_name: its name.
            num_tokens: prompt tokens.
            init_weights: close the gates; otherwise they start open at random.
        """
        like = self.reference_tensor()
        factory = {"device": like.device, "dtype": like.dtype}
        for tokens in (self.s2a_key, self.s2a_value):
            tokens[adapter_name] = nn.Parameter(torch.empty(num_tokens, self.width, **factory))
            nn.init.trunc_normal_(tokens[adapter_name], std=0.02**0.5)
        self.s2a_gate[adapter_name] = nn.Parameter(torch.zeros(self.num_heads, **factory))
        if not init_weights:
            nn.init.normal_(self.s2a_gate[adapter_name])

    def _remember_query(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        if self.adapters_in_use():
            # a slice of everything would be another tensor to a compiler, which coded the query twice
            self.in_flight["query"] = output if output.shape[-1] == self.width else output[..., : self.width]

    def _add_attention(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        adapters = self.adapters_in_use()
        if not adapters:
            return None
        query = self.in_flight.pop("query", None)
        attended = first_tensor(args, kwargs)
        if query is None or math.prod(query.shape[:-1]) != math.prod(attended.shape[:-1]):
            raise RuntimeError(
                f"Prompts cannot be added to this {type(self._host[0]).__name__}: between its query and its output "
                "projection the tokens do not stay the same, or the query projection is not called. Leave it out with "
                "`exclude_modules`, or train without the 'prompt' structure."
            )
        for name in adapters:
            key, value, gate = (resident(held, name) for held in (self.s2a_key, self.s2a_value, self.s2a_gate))
            attended = add_prompt_attention(attended, query, key, value, gate, self.num_heads)
        return with_first_tensor(args, kwargs, attended)


class InputPromptLayer(_PromptBase):
    """Adds a learned pattern to the image that the first convolution of a network without attention reads.

    The pattern is a small image [channels, P, P], zero at the start, stretched bilinearly to the size of the input, so
    it does not depend on the resolution (visual prompting, Bahng et al. 2022, arXiv:2203.17274, section 3, which pads
    or patches images at a fixed size; stretching is our choice).

    Args:
        host: the layer around the first convolution.
        channels: input channels.
    """

    adapter_layer_names = ("s2a_pattern",)

    def __init__(self, host: nn.Module, channels: int) -> None:
        super().__init__(host)
        self.channels = channels
        self.s2a_pattern = nn.ParameterDict({})

    def _hook(self) -> None:
        self._before(self._host[0], self._add_pattern)

    def update_layer(self, adapter_name: str, *, num_tokens: int, init_weights: bool) -> None:
        """Adds an adapter; `num_tokens` is the side P of the pattern."""
        like = self.reference_tensor()
        pattern = torch.zeros(self.channels, num_tokens, num_tokens, device=like.device, dtype=like.dtype)
        self.s2a_pattern[adapter_name] = nn.Parameter(pattern)
        if not init_weights:
            nn.init.normal_(self.s2a_pattern[adapter_name], std=0.1)

    def _add_pattern(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        adapters = self.adapters_in_use()
        if not adapters:
            return None
        images = first_tensor(args, kwargs)
        for name in adapters:
            pattern = F.interpolate(resident(self.s2a_pattern, name)[None], size=images.shape[-2:], mode="bilinear")
            images = images + pattern.to(images.dtype)
        return with_first_tensor(args, kwargs, images)
