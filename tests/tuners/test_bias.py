"""Bias: offsets of linear, convolution and normalisation layers, against the formula in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from kept import Kept
from peft import get_peft_model
from torch import nn
from torch.nn.utils import prune
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

from peft_s2a import S2ABiasConfig
from peft_s2a.anatomy import is_normalisation
from peft_s2a.tuners.bias import BiasLayer, can_serve


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (2, 5, 6), -1),
    "linear, no bias": (lambda: nn.Linear(6, 4, bias=False), (3, 6), -1),
    "linear, vector": (lambda: nn.Linear(6, 4), (6,), -1),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (2, 6, 7), 1),
    "conv1d, no bias, no batch": (lambda: nn.Conv1d(6, 4, 3, bias=False), (6, 7), 0),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding_mode="reflect", padding=1), (2, 6, 8, 9), 1),
    "conv2d, no bias": (lambda: nn.Conv2d(6, 4, 3, bias=False), (2, 6, 8, 9), 1),
    "conv2d, depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 8, 9), 1),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2), (2, 6, 3, 4, 5), 1),
    "conv3d, no bias": (lambda: nn.Conv3d(6, 4, 2, bias=False), (2, 6, 3, 4, 5), 1),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 5, 6), -1),
    "layer norm, two axes": (lambda: nn.LayerNorm((5, 6)), (2, 5, 6), (-2, -1)),
    "layer norm, no bias": (lambda: nn.LayerNorm(6, bias=False), (2, 5, 6), -1),
    "layer norm, not affine": (lambda: nn.LayerNorm(6, elementwise_affine=False), (2, 5, 6), -1),
    "rms norm": (lambda: nn.RMSNorm(6), (2, 5, 6), -1),
    "rms norm, not affine": (lambda: nn.RMSNorm(6, elementwise_affine=False), (2, 5, 6), -1),
    "group norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 5, 4), 1),
    "group norm, not affine": (lambda: nn.GroupNorm(2, 6, affine=False), (2, 6, 5), 1),
    "batch norm 1d": (lambda: nn.BatchNorm1d(6).eval(), (4, 6), 1),
    "batch norm 2d": (lambda: nn.BatchNorm2d(6).eval(), (2, 6, 5, 4), 1),
    "batch norm 3d, not affine": (lambda: nn.BatchNorm3d(6, affine=False).eval(), (2, 6, 3, 4, 2), 1),
    "a model's own norm": (lambda: ConvNextLayerNorm(6, data_format="channels_first"), (2, 6, 5, 4), 1),
}


def on_axes(offset: torch.Tensor, output: torch.Tensor, axes: int | tuple[int, ...]) -> torch.Tensor:
    """`offset` shaped to broadcast along the named axes of `output`."""
    axes = (axes,) if isinstance(axes, int) else axes
    axes = [axis % output.dim() for axis in axes]
    return offset.reshape([output.shape[axis] if axis in axes else 1 for axis in range(output.dim())])


def make(layer: str, **kwargs) -> tuple[BiasLayer, torch.Tensor, int | tuple[int, ...]]:
    torch.manual_seed(0)
    build, shape, axes = LAYERS[layer]
    base = build().double().requires_grad_(False)
    for tensor in (*base.parameters(), *base.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    wrapper = BiasLayer(base)
    wrapper.training = base.training
    wrapper.update_layer("default", **{"train_scale": True, "init_weights": False, **kwargs})
    wrapper.set_adapter("default")
    wrapper.double()  # beside norms without weights offsets start in float32
    return wrapper, torch.randn(shape, dtype=torch.double), axes


@pytest.mark.parametrize("layer", LAYERS)
def test_output_is_the_base_layers_with_offsets(layer):
    wrapper, x, axes = make(layer)
    base = wrapper.get_base_layer()
    plain = base(x)
    bias = base.bias if getattr(base, "bias", None) is not None else torch.zeros(1, dtype=torch.double)
    bias = on_axes(bias, plain, axes) if bias.numel() > 1 else bias
    expected = plain
    if "default" in wrapper.s2a_scale:
        weight = on_axes(base.weight, plain, axes)
        expected = (plain - bias) / weight * (weight + on_axes(wrapper.s2a_scale["default"], plain, axes)) + bias
    expected = expected + on_axes(wrapper.s2a_bias["default"], plain, axes)
    torch.testing.assert_close(wrapper(x), expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_zero_start_gives_the_base_layers_output_exactly(layer):
    wrapper, x, _ = make(layer, init_weights=True)
    assert torch.equal(wrapper(x), wrapper.get_base_layer()(x))


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_those_of_the_formula(layer):
    wrapper, x, _ = make(layer)
    parameters = dict(wrapper.named_parameters())
    trained = {name: p.detach().requires_grad_() for name, p in parameters.items() if p.requires_grad}
    assert set(trained) == {f"s2a_{kind}.default" for kind in ("bias", "scale") if f"s2a_{kind}.default" in parameters}

    def run(*values):
        return torch.func.functional_call(wrapper, dict(zip(trained, values)), (x,))

    torch.autograd.gradcheck(run, tuple(trained.values()))


def hide_parameters(layer: nn.Module) -> None:
    """Put plain tensors over them, as FullyShardedDataParallel does with what it has gathered while the model runs."""
    for name, parameter in list(layer.named_parameters()):
        delattr(layer, name)
        setattr(layer, name, parameter.detach().clone())
        layer._parameters[name] = getattr(layer, name)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_plain_tensor_may_hide_a_parameter(layer):
    wrapper, x, _ = make(layer)
    expected = wrapper(x)
    hide_parameters(wrapper.get_base_layer())
    torch.testing.assert_close(wrapper(x), expected)


@pytest.mark.parametrize("layer", ["linear", "layer norm"])
def test_a_plain_tensor_may_hide_a_parameter_under_compilation(layer):
    wrapper, x, _ = make(layer)
    expected = wrapper(x)
    hide_parameters(wrapper.get_base_layer())
    torch.testing.assert_close(torch.compile(wrapper, backend="eager")(x), expected)


@pytest.mark.parametrize("layer", ["linear", "conv2d", "layer norm", "group norm"])
def test_offsets_are_added_to_pruned_weights(layer):
    """Pruning puts a plain tensor in the parameter's place, anew before every call."""
    wrapper, x, axes = make(layer)
    base = wrapper.get_base_layer()
    for name in ("weight", "bias"):
        prune.random_unstructured(base, name, 0.5)
    plain = copy.deepcopy(base)
    plain(x)  # its hooks write the pruned tensors down
    expected = (
        F.layer_norm(x, (6,)) if layer == "layer norm" else F.group_norm(x, 2) if layer == "group norm" else plain(x)
    )
    if "norm" in layer:
        expected = expected * on_axes(plain.weight + wrapper.s2a_scale["default"], expected, axes)
        expected = expected + on_axes(plain.bias, expected, axes)
    expected = expected + on_axes(wrapper.s2a_bias["default"], expected, axes)
    torch.testing.assert_close(wrapper(x), expected)
    torch.testing.assert_close(wrapper(x), expected)


def test_an_offset_of_what_is_computed_anew_is_not_lost_in_silence():
    wrapper, x, _ = make("layer norm")
    nn.utils.parametrize.register_parametrization(wrapper.get_base_layer(), "weight", nn.Softplus(), unsafe=True)
    with pytest.raises(RuntimeError, match="computes it anew at every call"):
        wrapper(x)


@pytest.mark.parametrize("layer", LAYERS)
def test_merging_gives_the_same_output(layer):
    wrapper, x, _ = make(layer)
    base = wrapper.get_base_layer()
    expected, plain = wrapper(x), base(x)
    if getattr(base, "bias", None) is None:
        with pytest.raises(ValueError, match=r"trains a bias on a .* that has none"):
            wrapper.merge()
        return
    wrapper.merge()
    torch.testing.assert_close(base(x), expected)
    assert torch.equal(wrapper(x), base(x))
    wrapper.unmerge()
    torch.testing.assert_close(base(x), plain)


@pytest.mark.parametrize("layer", ["linear", "linear, no bias", "conv2d, no bias"])
def test_training_biases_keeps_no_activation(layer):
    wrapper, x, _ = make(layer, train_scale=False)
    with Kept(wrapper) as kept:
        assert wrapper(x).requires_grad
    assert not [tensor for tensor in kept.tensors if tensor.numel() > 6]


@pytest.mark.parametrize("layer", ["layer norm", "group norm", "a model's own norm"])
def test_training_a_scale_keeps_no_more_than_the_norm_does(layer):
    def kept_bytes(train_scale: bool) -> int:
        wrapper, x, _ = make(layer, train_scale=train_scale)
        x.requires_grad_()
        with Kept(wrapper) as kept:
            assert wrapper(x * 1.0).requires_grad
        return sum(tensor.nbytes for tensor in kept.tensors if tensor.numel() > 60)

    assert kept_bytes(True) <= kept_bytes(False)


def test_scales_belong_to_normalisations_only():
    assert "default" in make("layer norm")[0].s2a_scale
    for layer in ("linear", "conv2d", "layer norm, not affine"):
        assert "default" not in make(layer)[0].s2a_scale
    assert "default" not in make("layer norm", train_scale=False)[0].s2a_scale


def test_frozen_batch_norms_train_no_scale_and_live_ones_do():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    names = [n for n, p in get_peft_model(model, S2ABiasConfig()).named_parameters() if p.requires_grad]
    assert [name.removeprefix("base_model.model.") for name in names] == ["0.s2a_bias.default", "1.s2a_bias.default"]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    live = get_peft_model(model, S2ABiasConfig(freeze_batch_norm_stats=False))
    assert any("1.s2a_scale" in name for name, p in live.named_parameters() if p.requires_grad)


def test_several_adapters_add_up():
    wrapper, x, _ = make("linear")
    wrapper.update_layer("second", train_scale=True, init_weights=False)
    wrapper.set_adapter(["default", "second"])
    base = wrapper.get_base_layer()
    bias = base.bias + wrapper.s2a_bias["default"] + wrapper.s2a_bias["second"]
    torch.testing.assert_close(wrapper(x), F.linear(x, base.weight, bias))


def test_what_can_be_served():
    for build, *_ in LAYERS.values():
        assert can_serve(build())
    for module in (nn.ReLU(), nn.Embedding(3, 4), nn.ConvTranspose2d(3, 4, 2), nn.Sequential(nn.Linear(3, 3))):
        assert not can_serve(module)
    assert not is_normalisation(nn.Linear(3, 3))


class OwnRMSNorm(nn.Module):
    """A RMSNorm as language models write it, which notes what it has seen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class PackedLinear(nn.Linear):
    """Holds its weight in another form, as quantised layers do, and changes its bias where it runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.bias.data = self.bias.data.to(x.dtype)
        return F.linear(x, self.weight * 2, self.bias)


WATCHED = {
    "linear": (lambda: nn.Linear(6, 4), (2, 5, 6)),
    "packed linear": (lambda: PackedLinear(6, 4), (2, 5, 6)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3), (2, 6, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 5, 6)),
    "convnext's norm": (lambda: ConvNextLayerNorm(6, data_format="channels_first"), (2, 6, 5, 5)),
    "rms norm": (lambda: OwnRMSNorm(6), (2, 5, 6)),
    "batch norm": (lambda: nn.BatchNorm2d(6), (2, 6, 5, 5)),
}


class TestBaseModulesThatOthersWatch:
    """Hooks and forwards of others on the base module see and run what the base model's would, as under LoRA."""

    @staticmethod
    def wrapped(kind: str) -> tuple[BiasLayer, torch.Tensor]:
        make, shape = WATCHED[kind]
        layer = BiasLayer(make())
        layer.update_layer("default", train_scale=True, init_weights=False)
        layer.set_adapter("default")
        return layer, torch.randn(shape)

    @pytest.mark.parametrize("kind", WATCHED)
    @pytest.mark.parametrize("training", [False, True])
    def test_hooks_see_the_base_module_run(self, kind, training):
        layer, x = self.wrapped(kind)
        base_layer = layer.base_layer
        layer.train(training)
        statistics = {name: buffer.clone() for name, buffer in base_layer.named_buffers()}
        expected = layer(x)
        once = {name: buffer.clone() for name, buffer in base_layer.named_buffers()}
        base_layer.load_state_dict(statistics, strict=False)
        plain = base_layer(x)
        base_layer.load_state_dict(statistics, strict=False)
        seen = []
        hook = base_layer.register_forward_hook(lambda module, args, output: seen.append((module, args, output)))
        torch.testing.assert_close(layer(x), expected)
        [(module, args, output)] = seen
        assert module is base_layer and args[0] is x and torch.equal(output, plain)
        assert all(torch.equal(once[name], buffer) for name, buffer in base_layer.named_buffers())
        hook.remove()

    @pytest.mark.parametrize("kind", WATCHED)
    def test_a_forward_of_the_instance_runs(self, kind):
        layer, x = self.wrapped(kind)
        layer.eval()
        expected, plain = layer(x), layer.base_layer(x)
        layer.base_layer.forward = lambda x, forward=layer.base_layer.forward: 2 * forward(x)
        torch.testing.assert_close(layer(x), expected + plain)

    def test_a_global_hook_sees_the_base_module(self):
        layer, x = self.wrapped("layer norm")
        seen = []
        with nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module)):
            layer(x)
        assert seen == [layer.base_layer, layer]

    def test_gradients_are_the_same_with_hooks(self):
        for kind in WATCHED:
            layer, x = self.wrapped(kind)
            parameters = [layer.s2a_bias["default"], *layer.s2a_scale.values()]
            expected = torch.autograd.grad(layer.eval()(x).square().sum(), parameters)
            layer.base_layer.register_forward_hook(lambda module, args, output: None)
            for gradient, wanted in zip(torch.autograd.grad(layer(x).square().sum(), parameters), expected):
                torch.testing.assert_close(gradient, wanted)

    def test_what_a_norm_notes_on_itself_stays(self):
        layer, x = self.wrapped("rms norm")
        layer(x)
        assert layer.base_layer.calls == 1 and layer.calls == 1

    def test_a_layer_of_another_class_is_called_with_its_own_weights(self):
        layer, x = self.wrapped("packed linear")
        bias = layer.base_layer.bias
        expected = F.linear(x, 2 * layer.base_layer.weight, bias) + layer.s2a_bias["default"]
        torch.testing.assert_close(layer(x), expected)
        assert layer.base_layer.bias is bias and isinstance(bias, nn.Parameter)
