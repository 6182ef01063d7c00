"""Operators that models write out: what gated MLPs, CLIP's activation function and Llama's normalisation keep."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.activations import QuickGELUActivation
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.t5.modeling_t5 import T5LayerNorm

from peft_s2a.activations import notes
from peft_s2a.activations.config import ActivationQuantizationConfig
from peft_s2a.activations.wrap import quantize_activations, unplanned


IMAGES = (4, 3, 32, 32)
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 1, "temporal_patch_size": 1}
GRID = torch.tensor([[1, 4, 4]] * 4)


def clip(ratio):
    return CLIPVisionModel(CLIPVisionConfig(**WIDTHS, intermediate_size=32 * ratio))


def siglip(ratio):
    return SiglipVisionModel(SiglipVisionConfig(**WIDTHS, intermediate_size=32 * ratio, vision_use_head=False))


def dinov2_giant(ratio):
    return Dinov2Model(Dinov2Config(**WIDTHS, mlp_ratio=3 * ratio // 2, use_swiglu_ffn=True))


def aimv2(ratio):
    return Aimv2VisionModel(Aimv2VisionConfig(**WIDTHS, intermediate_size=32 * ratio, use_head=False))


def qwen2(ratio):
    return Qwen2VisionTransformerPretrainedModel(
        Qwen2VLVisionConfig(**QWEN, embed_dim=32, hidden_size=32, mlp_ratio=ratio)
    )


def qwen2_5(ratio):
    config = Qwen2_5_VLVisionConfig(**QWEN, hidden_size=32, out_hidden_size=32, intermediate_size=32 * ratio)
    return Qwen2_5_VisionTransformerPretrainedModel(config)


# bits for each value of the hidden tensor
TOWERS = {clip: 4, siglip: 4, dinov2_giant: 9, aimv2: 9, qwen2: 4, qwen2_5: 9}


def tower(build, ratio):
    torch.manual_seed(0)
    model = build(ratio).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias") or "embed" in name
    return model


def run(model, images):
    if "Qwen" in type(model).__name__:
        return model(images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1), GRID)[
            0
        ]
    return model(images).last_hidden_state


def kept(function, owned=()):
    """(result, bytes that are still kept for backward when ``function`` has returned, other than ``owned``)."""
    known = {t.untyped_storage().data_ptr() for t in owned}
    packed = []

    def pack(tensor):
        tensor = tensor.detach() if tensor.requires_grad else tensor  # an operator's own result would hold itself
        packed.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    gc.collect()
    storages = {
        s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in (r() for r in packed) if t is not None)
    }
    return result, sum(size for place, size in storages.items() if place not in known)


def owned(model, *inputs):
    return [*model.parameters(), *model.buffers(), *inputs]


def gradients(model, result):
    weight = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((result * weight).sum(), list(parameters.values()), allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters.values(), found)])


def similarity(one, other):
    return F.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0).item()


class TestTowers:
    @pytest.mark.parametrize("build", TOWERS)
    def test_bits_for_a_value_of_the_hidden_tensor(self, build):
        images = torch.randn(IMAGES)
        sizes, hidden = [], []
        for ratio in (4, 8):
            model = quantize_activations(tower(build, ratio))
            run(model, images)  # what a first call sets up is no step's
            result, size = kept(lambda model=model: run(model, images), owned(model, images))
            sizes.append(size)
            widths = [
                m.in_features for n, m in model.named_modules() if n.endswith(("fc2", "weights_out", "down_proj"))
            ]
            hidden.append(sum(widths) * result.numel() // 32)
        assert 8 * (sizes[1] - sizes[0]) / (hidden[1] - hidden[0]) == pytest.approx(TOWERS[build], rel=0.02)

    @pytest.mark.parametrize("build", [clip, dinov2_giant, aimv2])
    def test_they_run_by_plans(self, build):
        model = quantize_activations(tower(build, 2))
        run(model, torch.randn(IMAGES))
        assert unplanned(model) == {}

    @pytest.mark.parametrize("build", TOWERS)
    def test_outputs_are_stock_and_gradients_faithful(self, build):
        model, images = tower(build, 4), torch.randn(IMAGES)
        stock = run(model, images)
        expected = gradients(model, stock)
        twin = quantize_activations(model, ActivationQuantizationConfig(bits=8, backend="reference"))
        result = run(twin, images)
        assert torch.equal(result, stock)
        assert similarity(gradients(twin, result), expected) > 0.999

    @pytest.mark.parametrize(
        "build", [*(pytest.param(build, marks=pytest.mark.slow) for build in (clip, dinov2_giant)), aimv2]
    )
    def test_compiled_they_keep_and_compute_the_same(self, build):
        torch._dynamo.reset()
        model, images = quantize_activations(tower(build, 4)), torch.randn(IMAGES)
        run(model, images)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        one, other = (kept(lambda each=each: run(each, images), owned(model, images)) for each in (model, compiled))
        torch.testing.assert_close(other[0], one[0])
        assert other[1] <= 1.02 * one[1]
        assert similarity(gradients(model, one[0]), gradients(model, other[0])) > 0.9999


class TestNormalisation:
    @pytest.mark.parametrize("norm", [LlamaRMSNorm, T5LayerNorm])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("trained", [False, True])
    def test_keeps_codes(self, norm, dtype, trained):
        torch.manual_seed(0)
        stock = norm(128).to(dtype).requires_grad_(trained)
        if trained:
            nn.init.normal_(stock.weight)
        x = torch.randn(4, 32, 128, dtype=dtype, requires_grad=True)
        weight = torch.randn(4, 32, 128).to(dtype)
        twin = quantize_activations(copy.deepcopy(stock))
        found = {}
        for module in (stock, twin):
            result, size = kept(lambda module=module: module(x * 1), owned(module, x))
            wanted = [x, module.weight] if trained else [x]
            found[module] = result, size, torch.autograd.grad(result, wanted, weight)
        assert torch.equal(found[twin][0], found[stock][0])
        for one, other in zip(found[stock][2], found[twin][2]):
            assert similarity(one, other) > 0.98
        # codes of the normalised values, a deviation and a scale for each row, statistics of the columns
        assert found[twin][1] <= x.numel() // 2 + 4 * 32 * (4 + 2 + 2) + 128 * 2 * 2
        assert found[stock][1] > 4 * found[twin][1]

    def test_over_another_dimension_is_left_alone(self):
        class Norm(nn.Module):
            def forward(self, x):
                return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)

        check(Norm(), torch.randn(4, 8, 16))


def module(function):
    class Written(nn.Module):
        def forward(self, x):
            return function(x)

    return Written()


def check(stock, *inputs):
    """Outputs and gradients, eager and compiled, are those of the stock module."""
    config = ActivationQuantizationConfig(bits=8, backend="reference")
    twin = quantize_activations(copy.deepcopy(stock), config)
    torch._dynamo.reset()
    notes.forget_all()  # of operators that tests ran outside of modules
    results = []
    for call in (stock, twin, torch.compile(twin, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        result = call(*[x * 1 for x in leaves])
        found = torch.autograd.grad(result, leaves, torch.linspace(-1, 1, result.numel()).view_as(result))
        results.append((result, found))
    for result, found in results[1:]:
        torch.testing.assert_close(result, results[0][0])
        for one, other in zip(results[0][1], found):
            assert (one - other).norm() <= 0.02 * one.norm()
    assert notes._thread.notes == []


def _double_(x):
    return x.mul_(2)


WRITTEN = {
    "swish": lambda x: x * torch.sigmoid(x),
    "quick gelu": lambda x: torch.sigmoid(1.702 * x) * x,
    "another constant": lambda x: x * torch.sigmoid(1.5 * x),
    "a gate of something else": lambda x: x.sin() * torch.sigmoid(1.702 * x),
    "swiglu": lambda x: F.silu(x[..., :8]) * x[..., 8:],
    "geglu": lambda x: x[..., 8:] * F.gelu(x[..., :8]),
    "reglu": lambda x: x[..., 8:] * F.relu(x[..., :8]),
    "a gate that broadcasts": lambda x: F.silu(x[..., :1]) * x,
    "a function of its own argument": lambda x: F.silu(x.sin()) * x.sin(),
    "squared": lambda x: F.silu(x.sin()) ** 2 * x,
    "used twice": lambda x: (lambda gate: gate * x.sin() + gate)(F.silu(x.cos())),
    "norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "norm of squares": lambda x: x * (torch.square(x).mean(dim=(-1,), keepdim=True) + 1e-6).rsqrt(),
    "norm of a product": lambda x: x * torch.rsqrt((x * x).mean(-1, True) + 1e-6),
    "norm of something else": lambda x: x * torch.rsqrt(x.sin().pow(2).mean(-1, keepdim=True) + 1e-6),
    "cubes": lambda x: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-6),
    "no epsilon": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    # changed in place on the way
    "argument doubled": lambda x: (lambda h: (lambda a: a * _double_(h).cos())(h.tanh()))(x.sin()),
    "result doubled": lambda x: _double_(F.silu(x.sin())) * x,
    "in place": lambda x: F.silu(x.sin(), inplace=True) * x,
    "deviation doubled": lambda x: x * _double_(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6).clone()),
}


class _Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.act = nn.Linear(16, 32), nn.Linear(16, 32), nn.SiLU()

    def forward(self, x):
        return self.act(self.gate(x)) * self.up(x)


def test_what_a_hook_keeps_of_an_activation_can_still_be_differentiated():
    torch.manual_seed(0)
    stock, x = _Gated(), torch.randn(4, 16)
    twin = quantize_activations(copy.deepcopy(stock), ActivationQuantizationConfig(bits=8))
    found = []
    for model in (stock, twin):
        held, ran = [], []
        model.act.register_forward_hook(lambda module, args, output, held=held: held.append(output))
        loss = model(x).square().sum()
        held[0].register_hook(ran.append)  # as late as after the forward pass
        (gradient,) = torch.autograd.grad(loss, held[0])
        assert len(ran) == 1
        found.append(gradient)
    assert similarity(*found) > 0.999


class TestRecognition:
    @pytest.mark.parametrize("name", WRITTEN)
    def test_what_is_written_is_computed(self, name):
        torch.manual_seed(0)
        check(module(WRITTEN[name]), torch.randn(4, 6, 16))

    def test_gradients_that_somebody_asked_for_are_there(self):
        kept_gates = []

        class Probed(nn.Module):
            def __init__(self):
                super().__init__()
                self.act = nn.SiLU()

            def forward(self, x):
                return self.act(x.sin()) * x.cos()

        stock = Probed()
        for model in (stock, quantize_activations(copy.deepcopy(stock))):
            model.act.register_forward_hook(lambda module, args, out: (out.retain_grad(), kept_gates.append(out))[0])
            x = torch.linspace(-2, 2, 64).view(4, 16).requires_grad_()
            (model(x) * x).sum().backward()
        assert similarity(kept_gates[1].grad, kept_gates[0].grad) > 0.99

    def test_a_quick_gelu_keeps_four_bits(self):
        stock, x = QuickGELUActivation(), torch.randn(8, 1024, requires_grad=True)
        twin = quantize_activations(copy.deepcopy(stock))
        result, size = kept(lambda: twin(x * 1), [x])
        assert size == x.numel() // 2
        assert torch.equal(result, stock(x))

    def test_a_gated_mlp_keeps_nine_bits(self):
        config = LlamaConfig(hidden_size=64, intermediate_size=256)
        mlp = quantize_activations(LlamaMLP(config).requires_grad_(False))
        x = torch.randn(4, 16, 64, requires_grad=True)
        _, size = kept(lambda: mlp(x * 1), owned(mlp, x))
        assert size == 4 * 16 * (256 * 9 // 8 + 4)  # and a scale for each row of either factor
