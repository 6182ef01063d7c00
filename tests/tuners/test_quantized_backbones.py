"""Frozen backbones whose weights torchao or bitsandbytes hold in 8 or 4 bits, where these are installed."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from families import NUM_LABELS, VIT
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import ViTConfig, ViTForImageClassification

from peft_s2a import (
    ActivationQuantizationConfig,
    S2ABiasConfig,
    S2AConfig,
    S2ASideConfig,
    profile_memory,
    quantize_activations,
)
from peft_s2a.activations.wrap import unplanned


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

IMAGES, LABELS = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 5
WEIGHTS = {(64, 64), (64, 128), (128, 64)}  # of the linear layers, either way round


def plain() -> nn.Module:
    """As wide as a group of bitsandbytes' is, which its kernels for some CPUs ask for."""
    return ViTForImageClassification(
        ViTConfig(**{**VIT, "hidden_size": 64, "intermediate_size": 128}, num_labels=NUM_LABELS)
    )


def with_torchao(config: Callable[[object], object]) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = plain()
    quantization.quantize_(model.vit, config(quantization))
    assert any("torchao" in type(p).__module__ for p in model.parameters())
    return model


def with_bitsandbytes(layer: Callable[..., nn.Module]) -> nn.Module:
    layers = pytest.importorskip("bitsandbytes").nn
    model = plain()
    for name, module in list(model.vit.named_modules()):
        if isinstance(module, nn.Linear):
            quantized = layer(layers, module.in_features, module.out_features)
            quantized.load_state_dict(module.state_dict())
            model.vit.set_submodule(name, quantized.to("cpu"))
    return model


# torchao's `Int4WeightOnlyConfig` has kernels for GPUs alone: what runs on a CPU is `IntxWeightOnlyConfig`.
BACKBONES = {
    "torchao int8": lambda: with_torchao(lambda q: q.Int8WeightOnlyConfig()),
    "torchao int8 in groups": lambda: with_torchao(lambda q: q.Int8WeightOnlyConfig(granularity=q.PerGroup(16))),
    "torchao int4": lambda: with_torchao(
        lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(16))
    ),
    "torchao float8": lambda: with_torchao(lambda q: q.Float8WeightOnlyConfig()),
    "bitsandbytes int8": lambda: with_bitsandbytes(lambda b, i, o: b.Linear8bitLt(i, o, has_fp16_weights=False)),
    "bitsandbytes nf4": lambda: with_bitsandbytes(lambda b, i, o: b.LinearNF4(i, o)),
    "bitsandbytes fp4": lambda: with_bitsandbytes(lambda b, i, o: b.LinearFP4(i, o, compress_statistics=False)),
}
BY_TORCHAO = [name for name in BACKBONES if name.startswith("torchao")]
METHODS = ["s2a", "lora"]


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request) -> nn.Module:
    torch.manual_seed(0)
    return BACKBONES[request.param]()


def dequantized(model: nn.Module) -> nn.Module:
    other, model = plain(), copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = dequantize_module_weight(module).detach().reshape(module.out_features, module.in_features)
            module.weight = nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
    parameters = dict(model.named_parameters())
    other.load_state_dict(parameters)
    return other


def adapted(model: nn.Module, method: str, bits: int | None) -> nn.Module:
    torch.manual_seed(1)
    config = ActivationQuantizationConfig(bits=bits) if bits else None
    if method == "s2a":
        return get_peft_model(model, S2AConfig(activation_quantization=config))
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "fc1", "fc2"]))
    return quantize_activations(model, config) if config else model


def trained(model: nn.Module) -> nn.Module:
    """``model`` with trained parameters that are not those of the start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def without_plans(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if type(layer).__name__ == "ViTLayer":
            layer.attention.register_forward_hook(lambda module, args, output: None)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=IMAGES).logits


@pytest.mark.parametrize("method", METHODS)
def test_starts_equal(backbone, method):
    stock = copy.deepcopy(backbone)
    model = adapted(copy.deepcopy(stock), method, bits=8)
    with torch.no_grad():
        expected = stock.train()(pixel_values=IMAGES, labels=LABELS).loss
    assert torch.allclose(model.train()(pixel_values=IMAGES, labels=LABELS).loss, expected, atol=1e-6)
    assert torch.equal(logits(model), logits(stock))


def test_trains_after_an_evaluation(backbone):
    """For which bitsandbytes lays 4-bit weights out anew on some CPUs, in a form that it cannot differentiate."""
    gradients = []
    for evaluates in (False, True):
        model = adapted(copy.deepcopy(backbone), "s2a", bits=8)
        if evaluates:
            logits(model)
        model.train()(pixel_values=IMAGES, labels=LABELS).loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        gradients.append(grads)
    assert gradients[0].keys() == gradients[1].keys()
    one, other = (torch.cat([grad.flatten() for grad in grads.values()]) for grads in gradients)
    assert torch.cosine_similarity(one, other, 0) > 0.999


@pytest.mark.parametrize("planned", [True, False], ids=["plans", "function mode"])
@pytest.mark.parametrize("method", METHODS)
def test_dequantised_weights_are_not_kept(backbone, method, planned):
    model = adapted(copy.deepcopy(backbone), method, bits=8)
    if not planned:
        without_plans(model)
    kept = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.element_size() > 1:
            kept.add(tuple(tensor.shape))
        return tensor

    for _ in range(2):  # the first step makes plans
        kept.clear()
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.train()(pixel_values=IMAGES, labels=LABELS).loss
        loss.backward()
    assert kept and not kept & WEIGHTS


def test_inputs_of_frozen_layers_are_not_kept(backbone):
    """Neither by autograd nor, as bitsandbytes' 8-bit products keep theirs, past it."""
    model = adapted(copy.deepcopy(backbone), "s2a", bits=8).train()
    model(pixel_values=IMAGES, labels=LABELS).loss.backward()
    inputs = []
    for name, layer in model.named_modules():
        if name.endswith(("fc1.base_layer", "fc2.base_layer", "o_proj.base_layer")):  # which read no residual stream
            layer.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    loss = model(pixel_values=IMAGES, labels=LABELS).loss
    gc.collect()
    assert len(inputs) >= 6 and not any(x() is not None for x in inputs)
    loss.backward()


@pytest.mark.parametrize("name", BY_TORCHAO)
@pytest.mark.parametrize("method", METHODS)
def test_blocks_run_by_plans(name, method):
    model = adapted(BACKBONES[name](), method, bits=8).train()
    for _ in range(2):
        model(pixel_values=IMAGES, labels=LABELS).loss.backward()
    assert unplanned(model) == {}


def test_a_weight_that_is_replaced_is_read(backbone):
    """A plan holds for codes of the same form, wherever they are."""
    model = adapted(copy.deepcopy(backbone), "s2a", bits=8).train()
    for _ in range(2):
        model(pixel_values=IMAGES, labels=LABELS).loss.backward()
    other = adapted(copy.deepcopy(backbone), "s2a", bits=8).train()
    for one in (model, other):
        fc1, fc1_of_another = (m for n, m in one.named_modules() if n.endswith("fc1.base_layer"))
        fc1.weight = copy.deepcopy(fc1_of_another.weight)
        if hasattr(fc1, "state"):
            fc1.state = copy.deepcopy(fc1_of_another.state)
        if hasattr(fc1.weight, "quant_state"):
            fc1.quant_state = fc1.weight.quant_state
    losses = [one(pixel_values=IMAGES, labels=LABELS).loss for one in (model, other)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_dequantised_model(backbone, method):
    gradients, losses = [], []
    for model, bits in ((copy.deepcopy(backbone), 8), (dequantized(backbone), None)):
        model = trained(adapted(model, method, bits)).train()
        for _ in range(2):
            model.zero_grad()
            loss = model(pixel_values=IMAGES, labels=LABELS).loss
            loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(expected.norm() for expected in gradients[1].values())
    compared = 0
    for name, expected in gradients[1].items():
        if expected.norm() > 1e-3 * largest:
            compared += 1
            assert torch.cosine_similarity(gradients[0][name].flatten(), expected.flatten(), 0) > 0.99, name
    assert compared > 5


@pytest.mark.parametrize("autocast", [False, True])
def test_the_derivative_of_one_product(backbone, autocast):
    """That of one layer keeps no activations, so it is exact: autograd's of the dequantised weight, in float32."""
    name, layer = next((n, m) for n, m in backbone.named_modules() if n.endswith("fc1"))
    stock = copy.deepcopy(layer).train()
    layer = quantize_activations(copy.deepcopy(layer).train())
    weight = dequantize_module_weight(copy.deepcopy(layer)).detach().reshape(128, 64)
    found, expected = [], []
    for compute, grads in ((layer, found), (stock, []), (lambda x: x @ weight.T + stock.bias, expected)):
        x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = compute(x)
        grads += [y.detach().float(), *torch.autograd.grad((y.float() * torch.linspace(-1, 1, 128)).sum(), x)]
    tolerance = 2e-2 if autocast else 1e-5
    for one, other in zip(found, expected):
        assert (one - other).abs().max() < tolerance * other.abs().max(), name


@pytest.mark.parametrize("method", METHODS)
def test_memory_is_that_of_the_unquantised_model(backbone, method):
    batch = {"pixel_values": IMAGES, "labels": LABELS}
    model, unquantized = (adapted(m, method, bits=4) for m in (copy.deepcopy(backbone), plain()))
    report = profile_memory(model, batch)
    if unplanned(model):  # which keeps a little more
        without_plans(unquantized)
    assert report.saved_bytes < 1.05 * profile_memory(unquantized, batch).saved_bytes


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded(backbone, method, tmp_path):
    model = trained(adapted(copy.deepcopy(backbone), method, bits=8))
    for _ in range(2):
        model.train()(pixel_values=IMAGES, labels=LABELS).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), logits(copy.deepcopy(backbone)), atol=1e-3)


def test_biases_are_merged(backbone):
    model = trained(get_peft_model(copy.deepcopy(backbone), S2ABiasConfig(modules_to_save=[])))
    before = logits(model)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), before, atol=1e-4)
    assert not torch.allclose(before, logits(copy.deepcopy(backbone)), atol=1e-3)


def test_branches_beside_quantised_weights_are_not_merged(backbone):
    config = S2ASideConfig(side_activation="linear", target_modules=["fc1"], modules_to_save=[], side_init="svd")
    model = trained(get_peft_model(copy.deepcopy(backbone), config))
    before = logits(model)
    with pytest.raises(ValueError, match="held quantised"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)


def test_svd_reads_the_dequantised_weight(backbone):
    def directions(model: nn.Module) -> torch.Tensor:
        config = S2ASideConfig(side_init="svd", side_rank=4, target_modules=["fc1"], modules_to_save=[])
        return next(b for n, b in get_peft_model(model, config).named_buffers() if "s2a_down" in n)

    found, expected = directions(copy.deepcopy(backbone)), directions(dequantized(backbone))
    assert torch.allclose(found @ found.T, torch.eye(4), atol=1e-4)
    assert torch.linalg.svdvals(found @ expected.T).min() > 0.999


def test_a_bias_for_a_layer_without_one(backbone):
    model = copy.deepcopy(backbone)
    for name, module in model.named_modules():
        if name.endswith("fc1"):
            module.bias = None
    model = get_peft_model(model, S2ABiasConfig(target_modules=["fc1"], modules_to_save=[]))
    assert {tuple(p.shape) for n, p in model.named_parameters() if "s2a_bias" in n} == {(128,)}
    model(pixel_values=IMAGES, labels=LABELS).loss.backward()


def test_a_quantised_head_is_refused(backbone):
    model = copy.deepcopy(backbone)
    model.classifier = copy.deepcopy(next(m for n, m in model.named_modules() if n.endswith("fc1")))
    state = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="'classifier' is to be trained whole"):
        get_peft_model(model, S2AConfig())
    assert {name: id(module) for name, module in model.named_modules()} == state
    get_peft_model(model, S2AConfig(modules_to_save=[]))
