"""Side: low-rank branches beside modules of the backbone, of which only tensors of width r are kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from peft_s2a.activations.operators import add_low_rank
from peft_s2a.activations.operators.common import autocasts
from peft_s2a.anatomy import ends, input_width, output_width, projections
from peft_s2a.compat import BufferDict, is_quantized_weight, resident
from peft_s2a.parallelism import is_distributed
from peft_s2a.tuners.bias import BiasLayer
from peft_s2a.tuners.layer import AttachedLayer, as_tensor, first_tensor, with_tensor


DEFAULT_RANK = 32
USUAL_GAIN = 0.2  # of a module's first and last layer together, in trained transformers (DINOv2-small: 0.12 to 0.23)
LEAST_LENGTH = 1 / 16  # of directions: no layer that starts at zero shall silence a branch


def default_rank(width: int) -> int:
    """Rank of a branch that reads features of `width` channels: 32, or as many as there are (our choice)."""
    return min(DEFAULT_RANK, width)


def can_serve(module: nn.Module) -> bool:
    """Whether a side branch can run beside `module`: a Linear, Conv1d, Conv2d, or a module that starts and ends with
    such.

    A module with several layers must have tensors of one layout at both ends: channels last (it starts with a Linear)
    or channels first (it starts with a convolution). Lists of modules, which nobody calls, are none.
    """
    layers = projections(module)
    is_called = type(module).forward is not nn.Module.forward
    return is_called and bool(layers) and not isinstance(layers[0], nn.Conv3d)


def frozen_projection(layer: nn.Module, shape: tuple[int, ...], init: str) -> torch.Tensor:
    """D: `shape[0]` orthonormal directions of the input of `layer`, as a tensor of `shape` in float32.

    Args:
        layer: the Linear or convolution that reads the same input.
        shape: (rank, input width), or (rank, input channels, *kernel size).
        init: "orthogonal": random directions (as in LoRA-FA, Zhang et al. 2023, section 3, where the down-projection
            is frozen at random; orthogonality is our choice). "svd": the top right-singular vectors of the layer's
            weight, the directions it amplifies most (our choice, after PiSSA, Meng et al. 2024); directions that the
            weight lacks are filled up at random.
    """
    rank, width = shape[0], torch.Size(shape[1:]).numel()
    directions = torch.empty(rank, width)
    nn.init.orthogonal_(directions)
    if init == "svd":
        weight = dequantize_module_weight(layer).detach().float().cpu()
        if weight.shape[1:] != shape[1:]:  # a kernel seen through a 1x1 branch: its sum over positions
            weight = weight.flatten(2).sum(-1)
        if weight[0].numel() == width:
            top = torch.linalg.svd(weight.flatten(1), full_matrices=False).Vh[:rank]
            directions[: len(top)] = top
    return directions.reshape(shape)


def gain(layer: nn.Linear) -> torch.Tensor:
    """The root mean square of what `layer` puts out, for white input of variance 1: ``|W|_F / sqrt(outputs)``, a
    scalar."""
    weight = layer.weight.detach()
    dtype = torch.promote_types(weight.dtype, torch.float32)  # without a copy in it
    return torch.linalg.vector_norm(weight, dtype=dtype) / weight.shape[0] ** 0.5


def length_of_directions(first: nn.Module, last: nn.Module) -> torch.Tensor | float:
    """The length of D's directions beside a module that starts with `first` and ends with `last`: 1 beside one whose
    weights are as large as trained ones, less beside one that puts out less.

    AdamW moves every entry of U at the same rate, whatever the gradient, so a branch grows as fast beside a module of
    small outputs as beside one of large ones, and outruns the former: a narrow network whose weights were drawn with a
    fixed deviation puts out little. The change of a module's output should go with the output (Yang et al. 2023,
    arXiv:2310.17813, condition 1). Length 1 from `USUAL_GAIN` on, proportion to the gain below it, and `LEAST_LENGTH`
    are our choices, as is that it acts on D, which is saved: an adapter does not depend on how a weight is summed where
    it is loaded. Convolutions, whose outputs normalisations bring to their size, and weights that are quantised, sharded
    or on the meta device count as trained ones.
    """
    if not all(isinstance(layer, nn.Linear) and _is_plain(layer.weight) for layer in (first, last)):
        return 1.0
    length = gain(first).cpu() * gain(last).cpu() / USUAL_GAIN
    return length.nan_to_num(nan=1.0).clamp(LEAST_LENGTH, 1.0)


def _is_plain(weight: torch.Tensor) -> bool:
    return not (is_quantized_weight(weight) or is_distributed(weight) or weight.is_meta) and weight.is_floating_point()


class _Branch(nn.Module):
    """What a `SideLayer` computes, as a module for the quantiser to find: the host may be called by one that it leaves
    alone, such as a model that computes losses, and the layer itself stands in sequences of modules as the identity."""

    def __init__(self, compute: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, *args: Any) -> torch.Tensor:
        return self.compute(*args)


class SideLayer(AttachedLayer):
    r"""Adds `s * U f(D x)` to the output of its host, `x` being the host's input and `s = side_alpha / side_rank`.

    D's rows are orthogonal, of the length that `length_of_directions` says. D is frozen, so the full-width input is not
    kept for backward: only `D x` and `f(D x)`, of width r, are (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303). U starts at zero. f is GELU or the identity. Scaling by the rank keeps
    training stable when the rank grows (LoRA, Hu et al. 2021, section 4.1). The branch around a whole MLP is the form
    of a parallel adapter (He et al. 2022, arXiv:2110.04366); the paper (section "side") leaves these choices open.

    Layouts: beside a Linear or a module of Linears, x is [..., width]. Beside a convolution, D has the geometry of
    that convolution and U is 1x1. Beside a module that starts with a convolution, x is [batch, width, ...], both are
    1x1, and `D x` is averaged over windows where the module reduces the resolution.

    Args:
        host: the module whose output is added to.
        split: where an MLP is split over two siblings of which the host is the second: (their parent, the first, whose
            input is x). Otherwise x is the host's input.
    """

    attribute = "side_adapter"
    adapter_layer_names = ("s2a_up",)
    other_param_names = ("s2a_down",)

    def __init__(self, host: nn.Module, split: tuple[nn.Module, nn.Module] | None = None) -> None:
        super().__init__(host)
        self._split = split
        self.s2a_up = nn.ParameterDict({})
        self.s2a_down = BufferDict({}, persistent=True)
        self.branch = _Branch(self._branch)
        self.scaling: dict[str, float] = {}
        self.has_activation: dict[str, bool] = {}

    def _hook(self) -> None:
        if self._split is not None:
            parent, entry = self._split
            self._during(parent)
            self._before(entry, self._remember_input)
        self._after(self._host[0], self._add_branch)

    @property
    def is_leaf(self) -> bool:
        """Whether the host is a single linear or convolution layer."""
        return isinstance(self._host[0], BiasLayer)

    @cached_property
    def _ends(self) -> tuple[nn.Module, nn.Module]:
        """(the layer that reads the branch's input, the layer whose output width is the branch's)."""
        return ends(self._host[0], None if self._split is None else self._split[1])

    @property
    def in_features(self) -> int:
        """Width of what the branch reads."""
        return input_width(self._ends[0])

    @property
    def out_features(self) -> int:
        """Width of what the branch is added to."""
        return output_width(self._ends[1])

    def update_layer(
        self, adapter_name: str, *, rank: int | None, alpha: float, activation: str, init: str, init_weights: bool
    ) -> None:
        """Adds an adapter; the arguments are those of [`S2ASideConfig`]."""
        first, last = self._ends
        rank = rank or default_rank(input_width(first))
        like = self.reference_tensor()
        kernel_size = first.kernel_size if self.is_leaf and not isinstance(first, nn.Linear) else ()
        down = frozen_projection(first, (rank, input_width(first), *kernel_size), init)
        if not self.is_leaf:
            down = down * length_of_directions(first, last)
        up = torch.zeros(output_width(last), rank)
        if not init_weights:
            nn.init.normal_(up, std=rank**-0.5)
        self.s2a_down[adapter_name] = down.to(like.device, like.dtype)
        self.s2a_up[adapter_name] = nn.Parameter(up.to(like.device, like.dtype))
        self.scaling[adapter_name] = alpha / rank
        self.has_activation[adapter_name] = activation != "linear"

    def delete_adapter(self, adapter_name: str) -> None:
        self.scaling.pop(adapter_name, None)
        self.has_activation.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _remember_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.adapters_in_use():
            self.in_flight["input"] = first_tensor(args, kwargs)

    def _add_branch(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        adapters = self.adapters_in_use()
        if not adapters:
            return output
        x = first_tensor(args, kwargs) if self._split is None else self.in_flight.pop("input")
        y = as_tensor(output)
        for name in adapters:
            y = self.branch(x, y, name)
        return with_tensor(output, y)

    def _branch(self, x: torch.Tensor, y: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """`y + s * U f(D x)` in the dtype of y. Weights are cast to the input's dtype, never the input to theirs."""
        up, down = resident(self.s2a_up, adapter_name), resident(self.s2a_down, adapter_name)
        if up.is_meta and not y.is_meta:  # torch's products would read memory that is not the tensor's
            raise RuntimeError(
                f"The side branch of {adapter_name!r} is on the meta device and has no values, but its module computes. "
                "Load the adapter's weights first; if accelerate has offloaded them, leave `preload_module_classes` out."
            )
        up, hidden = up.to(y.dtype), self._project_down(x, y, down.to(x.dtype))
        activation = "gelu" if self.has_activation[adapter_name] else None
        # It would round y. Where it is off nothing is entered, or torch.compile would store no graph with the branch in it.
        with torch.autocast(y.device.type, enabled=False) if autocasts(y.device.type) else nullcontext():
            return add_low_rank(
                y, hidden, up, self.scaling[adapter_name], activation, channels_first=not self._channels_last
            )

    @property
    def _channels_last(self) -> bool:
        return isinstance(self._ends[0], nn.Linear)

    def _project_down(self, x: torch.Tensor, y: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        first, _ = self._ends
        if isinstance(first, nn.Linear):
            hidden = F.linear(x, down)
            if hidden.shape[:-1] != y.shape[:-1]:
                self._raise_shape_error(x, y)
            return hidden
        convolution = F.conv1d if y.dim() == 3 else F.conv2d
        if self.is_leaf:
            if first.padding_mode != "zeros":
                x = F.pad(x, first._reversed_padding_repeated_twice, mode=first.padding_mode)
                return convolution(x, down, stride=first.stride, dilation=first.dilation)
            return convolution(x, down, stride=first.stride, padding=first.padding, dilation=first.dilation)
        if x.dim() != y.dim():
            self._raise_shape_error(x, y)
        hidden = convolution(x, down.reshape(*down.shape, *[1] * (x.dim() - 2)))
        if hidden.shape[2:] != y.shape[2:]:
            pool = F.adaptive_avg_pool1d if y.dim() == 3 else F.adaptive_avg_pool2d
            hidden = pool(hidden, y.shape[2:])
        return hidden

    def _raise_shape_error(self, x: torch.Tensor, y: torch.Tensor) -> None:
        raise ValueError(
            f"A side branch cannot run beside this {type(self._host[0]).__name__}: its input has shape "
            f"{tuple(x.shape)} and its output {tuple(y.shape)}, which differ in more than the width. Leave it out "
            "with `exclude_modules`."
        )

    def not_mergeable(self, adapter_name: str) -> str | None:
        if not self.is_leaf:
            return (
                f"Adapter {adapter_name!r} has a side branch around a whole {type(self._host[0]).__name__}, which no "
                "single weight can hold, so it cannot be merged. Keep the adapter separate, or train with "
                "`side_activation='linear'` and `target_modules` that name single linear or convolution layers."
            )
        if self.has_activation[adapter_name]:
            return (
                f"Adapter {adapter_name!r} has a side branch with an activation function, which no weight can hold, "
                "so it cannot be merged. Keep the adapter separate, or train with `side_activation='linear'`."
            )
        if is_quantized_weight(self._ends[0].weight):
            return (
                f"Adapter {adapter_name!r} has a side branch beside a weight that is held quantised "
                f"({type(self._ends[0].weight).__name__}): to merge it the sum would have to be quantised anew, and the "
                "adapter would start from another model than it was trained on. Keep the adapter separate, or load it "
                "onto the unquantised base model and merge there."
            )
        if getattr(self._ends[0], "groups", 1) != 1:
            return (
                f"Adapter {adapter_name!r} has a side branch beside a grouped convolution, whose weight cannot hold "
                "it, so it cannot be merged. Keep the adapter separate, or leave grouped convolutions out with "
                "`exclude_modules`."
            )
        return None

    def merged_into(self, adapter_name: str) -> list[nn.Parameter]:
        return [self._ends[0].weight]

    def _merge_adapter(self, adapter_name: str, sign: int) -> dict[nn.Parameter, torch.Tensor]:
        weight = self._ends[0].weight
        like = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        up, down = self.s2a_up[adapter_name].data.to(**like), self.s2a_down[adapter_name].to(**like)
        delta = (up @ down.flatten(1)).reshape(weight.shape) * self.scaling[adapter_name]
        return {weight: weight.data + sign * delta}
