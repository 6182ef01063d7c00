"""Side: low-rank branches beside layers, MLPs and stages, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kept import Kept
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_s2a import S2AConfig, S2ASideConfig
from peft_s2a.tuners.side import LEAST_LENGTH, USUAL_GAIN, SideLayer, can_serve, frozen_projection


RANK, ALPHA = 3, 6.0


class Mlp(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TupleMlp(Mlp):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(x), None


class Wrapper(nn.Module):
    """Gives a module a name, and the model an output that is a tensor."""

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.target = target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.target(x)
        return output[0] if isinstance(output, tuple) else output


LEAVES = {
    "linear": (lambda: nn.Linear(6, 4), (2, 5, 6)),
    "linear, no bias, no batch": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (2, 6, 7)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, padding=1, bias=False), (2, 6, 8, 7)),
    "conv2d, 1x1": (lambda: nn.Conv2d(6, 4, 1), (2, 6, 8, 7)),
    "conv2d, strided": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, dilation=2), (2, 6, 9, 8)),
    "conv2d, reflecting": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (2, 6, 8, 7)),
    "conv2d, padded by name": (lambda: nn.Conv2d(6, 4, 3, padding="same"), (2, 6, 8, 7)),
    "conv2d, patches": (lambda: nn.Conv2d(6, 4, 4, stride=4), (2, 6, 8, 8)),
}
GROUPED = {
    "conv2d, depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 8, 7)),
    "conv2d, grouped": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (2, 6, 8, 7)),
}
MODULES = {
    "mlp": (Mlp, (2, 5, 6)),
    "mlp that returns a tuple": (TupleMlp, (2, 5, 6)),
    "sequential mlp": (lambda: nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)), (2, 5, 6)),
    "stage": (lambda: nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, 1, 1)), (2, 6, 8, 8)),
    "stage, 1d": (lambda: nn.Sequential(nn.Conv1d(6, 8, 3, 1, 1), nn.Conv1d(8, 4, 3, 2, 1)), (2, 6, 8)),
}


def make(
    layer: str, activation: str = "gelu", init: str = "orthogonal"
) -> tuple[PeftModel, SideLayer, torch.Tensor, torch.Tensor]:
    """(model, its side layer, input, the base module's output)."""
    torch.manual_seed(0)
    build, shape = {**LEAVES, **GROUPED, **MODULES}[layer]
    base = Wrapper(build()).double().requires_grad_(False)
    x = torch.randn(shape, dtype=torch.double)
    plain = base(x)
    config = S2ASideConfig(
        target_modules=["target"],
        side_rank=RANK,
        side_alpha=ALPHA,
        side_activation=activation,
        side_init=init,
        init_weights=False,
        activation_quantization=None,
    )
    model = get_peft_model(base, config)
    (side,) = [module for module in model.modules() if isinstance(module, SideLayer)]
    return model, side, x, plain


def branch(layer: str, side: SideLayer, x: torch.Tensor, plain: torch.Tensor, activation: str) -> torch.Tensor:
    """`s * U f(D x)`, written out."""
    down, up = side.s2a_down["default"], side.s2a_up["default"]
    base = LEAVES.get(layer, GROUPED.get(layer, MODULES.get(layer)))[0]()
    if isinstance(base, (nn.Linear, Mlp)) or layer == "sequential mlp":
        hidden = torch.einsum("...i,ri->...r", x, down)
    elif layer in MODULES:
        hidden = torch.einsum("bi...,ri->br...", x, down)
        if hidden.shape[2:] != plain.shape[2:]:  # every window of two is averaged
            hidden = F.avg_pool2d(hidden, 2) if x.dim() == 4 else F.avg_pool1d(hidden, 2)
    else:
        kind = type(base)
        low_rank = kind(
            base.in_channels,
            RANK,
            base.kernel_size,
            base.stride,
            base.padding,
            base.dilation,
            bias=False,
            padding_mode=base.padding_mode,
        )
        low_rank.weight.data = down
        hidden = low_rank(x)
    if activation == "gelu":
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    if hidden.shape[-1] == RANK and hidden.shape[:-1] == plain.shape[:-1]:
        return ALPHA / RANK * torch.einsum("...r,or->...o", hidden, up)
    return ALPHA / RANK * torch.einsum("br...,or->bo...", hidden, up)


@pytest.mark.parametrize("activation", ["gelu", "linear"])
@pytest.mark.parametrize("layer", [*LEAVES, *GROUPED, *MODULES])
def test_output_is_the_base_modules_plus_the_branch(layer, activation):
    model, side, x, plain = make(layer, activation)
    plain = plain[0] if isinstance(plain, tuple) else plain
    torch.testing.assert_close(model(x), plain + branch(layer, side, x, plain, activation))


@pytest.mark.parametrize("layer", [*LEAVES, *MODULES])
def test_gradients_reach_the_branch_and_its_input(layer):
    model, side, x, _ = make(layer)
    (name,) = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    up = side.s2a_up["default"].detach().requires_grad_()
    x.requires_grad_()
    torch.autograd.gradcheck(
        lambda x, up: torch.func.functional_call(model, {name: up}, (x,)), (x, up), fast_mode=True
    )


@pytest.mark.parametrize("layer", LEAVES)
@pytest.mark.parametrize("init", ["orthogonal", "svd"])
def test_linear_branches_beside_one_layer_merge(layer, init):
    model, _, x, _ = make(layer, activation="linear", init=init)
    expected = model(x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    assert type(merged.target) is type(LEAVES[layer][0]())


@pytest.mark.parametrize("layer", GROUPED)
def test_branches_beside_grouped_convolutions_do_not_merge(layer):
    with pytest.raises(ValueError, match=r"beside a grouped convolution.*leave grouped convolutions out"):
        make(layer, activation="linear")[0].merge_and_unload()


@pytest.mark.parametrize("layer", MODULES)
def test_branches_around_several_layers_do_not_merge(layer):
    with pytest.raises(ValueError, match=r"around a whole \w+, which no single weight can hold"):
        make(layer, activation="linear")[0].merge_and_unload()


@pytest.mark.parametrize("activation", ["gelu", "linear"])
@pytest.mark.parametrize("layer", ["linear", "mlp", "sequential mlp"])
def test_only_tensors_of_the_branchs_width_are_kept(layer, activation):
    model, _, x, _ = make(layer, activation)
    with Kept(model) as kept:
        assert model(x).requires_grad
    assert kept.tensors and all(tensor.shape[-1] == RANK for tensor in kept.tensors)


def test_the_projection_is_frozen_and_saved(tmp_path):
    model, side, x, _ = make("linear")
    assert not side.s2a_down["default"].requires_grad
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)  # another random projection is drawn here, and replaced
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    torch.testing.assert_close(loaded(x), make("linear")[0](x))


class TestFrozenProjection:
    @pytest.mark.parametrize("init", ["orthogonal", "svd"])
    @pytest.mark.parametrize("rank", [1, 4, 6])
    def test_directions_are_orthonormal(self, init, rank):
        down = frozen_projection(nn.Linear(6, 9), (rank, 6), init)
        torch.testing.assert_close(down @ down.T, torch.eye(rank))

    def test_svd_takes_the_directions_that_are_amplified_most(self):
        layer = nn.Linear(6, 9)
        down = frozen_projection(layer, (2, 6), "svd")
        torch.testing.assert_close((layer.weight @ down.T).norm(dim=0), torch.linalg.svdvals(layer.weight)[:2])

    def test_svd_of_a_convolution_for_a_pointwise_branch(self):
        layer = nn.Conv2d(6, 9, 3)
        down = frozen_projection(layer, (2, 6), "svd")
        summed = layer.weight.sum((2, 3))
        torch.testing.assert_close((summed @ down.T).norm(dim=0), torch.linalg.svdvals(summed)[:2])

    def test_svd_fills_up_with_random_directions(self):
        down = frozen_projection(nn.Linear(6, 2), (5, 6), "svd")
        assert down.shape == (5, 6)
        torch.testing.assert_close(down.norm(dim=1), torch.ones(5))

    def test_more_directions_than_the_input_has(self):
        for init in ("orthogonal", "svd"):
            assert frozen_projection(nn.Linear(3, 9), (5, 3), init).isfinite().all()


def test_the_rank_may_exceed_the_width():
    model = get_peft_model(Wrapper(nn.Linear(3, 2)), S2ASideConfig(side_rank=8, target_modules=["target"]))
    assert model(torch.randn(4, 3)).shape == (4, 2)


@pytest.mark.parametrize(("width", "rank"), [(3, 3), (24, 24), (96, 32), (1024, 32)])
def test_the_default_rank_is_at_most_the_width(width, rank):
    model = get_peft_model(Wrapper(nn.Linear(width, 5)), S2ASideConfig(target_modules=["target"]))
    assert model.base_model.model.target.side_adapter.s2a_up["default"].shape == (5, rank)


def test_scaling_keeps_the_branch_in_bounds_when_the_rank_grows():
    torch.manual_seed(0)
    x = torch.randn(64, 512)
    sizes = []
    for rank in (8, 32, 128):
        config = S2ASideConfig(side_rank=rank, target_modules=["target"], activation_quantization=None)
        model = get_peft_model(Wrapper(nn.Linear(512, 512)).requires_grad_(False), config)
        plain = model(x)
        plain.square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # the first step of Adam: every weight moves by the learning rate
                    parameter -= 1e-3 * parameter.grad.sign()
        sizes.append((model(x) - plain).abs().mean().item())
    assert max(sizes) < 2 * min(sizes)


def test_what_can_be_served():
    for build, _ in (*LEAVES.values(), *GROUPED.values(), *MODULES.values()):
        assert can_serve(build())
    for module in (nn.Conv3d(3, 3, 1), nn.ReLU(), nn.LayerNorm(3), nn.ModuleList([nn.Linear(3, 3)])):
        assert not can_serve(module)


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).flatten(2).mT


def test_named_modules_that_change_their_layout_are_refused():
    with pytest.raises(ValueError, match="on which 'side' cannot sit: it turns"):
        get_peft_model(Wrapper(Patches()), S2ASideConfig(target_modules=["target"]))


def test_modules_that_change_their_layout_say_so_where_the_models_inputs_are_not_known():
    class TakesMore(Wrapper):
        def forward(self, x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + offset

    model = get_peft_model(TakesMore(Patches()), S2ASideConfig(target_modules=["target"]))
    with pytest.raises(ValueError, match=r"input has shape \(1, 3, 8, 8\) and its output \(1, 4, 8\)"):
        model(torch.randn(1, 3, 8, 8), torch.zeros(()))


class TestLengthOfDirections:
    """Beside modules of little output the branch is weaker, see `length_of_directions`."""

    @staticmethod
    def lengths(target: nn.Module, **config) -> torch.Tensor:
        model = get_peft_model(Wrapper(target), S2ASideConfig(side_rank=RANK, target_modules=["target"], **config))
        return next(buffer for name, buffer in model.named_buffers() if "s2a_down" in name).flatten(1).norm(dim=1)

    @pytest.mark.parametrize("init", ["orthogonal", "svd"])
    def test_one_beside_weights_as_large_as_trained_ones(self, init):
        torch.testing.assert_close(self.lengths(Mlp(), side_init=init), torch.ones(RANK))

    @pytest.mark.parametrize("init", ["orthogonal", "svd"])
    def test_in_proportion_to_the_output_beside_small_weights(self, init):
        torch.manual_seed(0)
        mlp = Mlp(16)
        nn.init.normal_(mlp.fc1.weight, std=0.05), nn.init.normal_(mlp.fc2.weight, std=0.1)
        x = torch.randn(50_000, 16)
        hidden = torch.randn(50_000, 12)
        sizes = [F.linear(x, mlp.fc1.weight).square().mean(), F.linear(hidden, mlp.fc2.weight).square().mean()]
        expected = (sizes[0] * sizes[1]).sqrt() / USUAL_GAIN
        assert 0.1 < expected < 0.9
        torch.testing.assert_close(self.lengths(mlp, side_init=init), expected.expand(RANK), rtol=0.02, atol=0)

    @pytest.mark.parametrize(("value", "length"), [(0.0, LEAST_LENGTH), (float("inf"), 1.0), (float("nan"), 1.0)])
    def test_weights_that_say_nothing(self, value, length):
        mlp = Mlp()
        nn.init.constant_(mlp.fc2.weight, value)
        torch.testing.assert_close(self.lengths(mlp), torch.full((RANK,), length))

    @pytest.mark.parametrize(
        "target",
        [nn.Linear(6, 6), nn.Conv2d(6, 6, 1), nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))],
        ids=["linear", "convolution", "module of convolutions"],
    )
    def test_one_beside_single_layers_and_convolutions(self, target):
        for parameter in target.parameters():
            nn.init.constant_(parameter, 0.001)
        torch.testing.assert_close(self.lengths(target), torch.ones(RANK))

    def test_the_saved_directions_count_where_an_adapter_is_loaded(self, tmp_path):
        mlp = Mlp()
        nn.init.normal_(mlp.fc1.weight, std=0.02)
        model = get_peft_model(Wrapper(mlp), S2ASideConfig(target_modules=["target"], init_weights=False))
        x = torch.randn(4, 6)
        model.save_pretrained(tmp_path)
        other = Mlp()
        loaded = PeftModel.from_pretrained(Wrapper(other), tmp_path)
        difference = model(x) - mlp_output(model, x)
        torch.testing.assert_close(loaded(x) - mlp_output(loaded, x), difference)

    @pytest.mark.parametrize("learning_rate", [5e-4, 2e-3, 5e-3])
    def test_narrow_networks_with_random_weights_learn_at_usual_rates(self, learning_rate):
        def last_loss(structures: tuple[str, ...]) -> float:
            torch.manual_seed(0)
            model = ViTForImageClassification(
                ViTConfig(
                    hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256, image_size=32,
                    patch_size=8, num_labels=8,
                )
            )  # fmt: skip
            images = torch.randn(32, 3, 32, 32)
            model = get_peft_model(model, S2AConfig(structures=structures, activation_quantization=None)).eval()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate)
            for _ in range(30):
                loss = F.cross_entropy(model(pixel_values=images).logits, torch.arange(32) % 8)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return loss.item()

        assert last_loss(("bias", "prompt", "side")) < last_loss(("bias",))


def mlp_output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with model.disable_adapter():
        return model(x)
