"""What is said where attention is too sharp for its codes, and how precise its gradients are."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from families import VIT
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTForImageClassification

from peft_s2a import ActivationQuantizationConfig, estimate_memory, profile_memory, quantize_activations
from peft_s2a.activations.operators.attention import scaled_dot_product_attention
from peft_s2a.activations.quantizer import Quantizer
from peft_s2a.activations.sharpness import LIMIT, logit_error
from peft_s2a.activations.wrap import sharp_attention, unplanned


def cosine(spread: float, bits: int, tokens: int = 197, heads: int = 2) -> tuple[float, float]:
    """The cosine of the gradient for queries with the exact one, and what is told of the logits' error beforehand, for
    Gaussian queries and keys whose logits have a standard deviation of ``spread``."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, tokens, 64) * size for size in (spread**0.5, spread**0.5, 1.0)]
    tensors = [x.requires_grad_() for x in tensors]
    quantizer = Quantizer(bits=bits, group_size=16)
    out = torch.randn(1, heads, tokens, 64)
    exact = torch.autograd.grad(F.scaled_dot_product_attention(*tensors), tensors, out)[0]
    coded = torch.autograd.grad(scaled_dot_product_attention(*tensors, quantizer=quantizer), tensors, out)[0]
    codes = [quantizer.ops.encode_heads(x.detach(), bits, 16, True, True, None) for x in tensors[:2]]
    error = logit_error(*codes, 64**-0.5, bits, 16, 64)
    return F.cosine_similarity(exact.flatten(), coded.flatten(), 0).item(), error


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0, 3.0])
def test_what_is_told_of_the_logits_is_their_error(spread):
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 64, 32) * spread**0.5 for _ in range(2))
    quantizer = Quantizer(bits=4, group_size=16)
    kept = []
    for x in (q, k):
        packed, scales, mean = quantizer.ops.encode_heads(x, 4, 16, True, True, None)
        values = quantizer.ops.decode_groups(packed.flatten(0, 2), scales.flatten(0, 2), 4, 16, 32, torch.float32)
        kept.append(((packed, scales, mean), values.view(x.shape) + mean))
    exact, coded = 32**-0.5 * q @ k.mT, 32**-0.5 * kept[0][1] @ kept[1][1].mT
    p = exact.softmax(-1)
    weight = p * (1 - p)
    measured = ((weight * (coded - exact).square()).sum() / weight.sum()).sqrt().item()
    assert logit_error(kept[0][0], kept[1][0], 32**-0.5, 4, 16, 32) == pytest.approx(measured, rel=0.3)


def test_gradients_are_precise_up_to_the_limit_and_at_eight_bits_beyond_it():
    found = {(spread, bits): cosine(spread, bits) for spread in (1.0, 2.0, 3.8, 7.5) for bits in (4, 8)}
    for (_, bits), (direction, error) in found.items():
        if error <= LIMIT:
            assert direction > 0.975
        if bits == 8:
            assert direction > 0.999
            assert error < LIMIT / 2
    assert found[3.8, 4][1] > LIMIT
    assert found[7.5, 4][0] < 0.92


class Block(nn.Module):
    def __init__(self, sharp: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96, bias=False), nn.Linear(32, 32)
        with torch.no_grad():
            self.qkv.weight[:64].copy_(torch.eye(32).repeat(2, 1) * sharp)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def blocks(*sharp: float) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*map(Block, sharp))


X = torch.randn(4, 24, 32, generator=torch.Generator().manual_seed(0))


def step(model, x=X) -> list[str]:
    """The warnings of a training step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x).square().sum().backward()
    return [str(w.message) for w in caught if "too sharp" in str(w.message)]


class TestWarning:
    def test_names_all_modules_once_and_the_setting_that_mends_it(self):
        model = quantize_activations(blocks(0.5, 3.0, 3.0, 0.5))
        (said,) = step(model)
        assert "'1', '2':" in said
        assert 'bits={"attention": 8}' in said
        assert "'1:attention': 8" in said
        assert list(sharp_attention(model)) == ["1", "2"]
        assert step(model) == []
        assert unplanned(model) == {}

    def test_a_first_step_that_fails_is_not_the_first(self):
        model = quantize_activations(blocks(3.0))
        with pytest.raises(RuntimeError):
            model(X[..., :8])
        assert len(step(model)) == 1

    @pytest.mark.parametrize("bits", [{"attention": 8}, {"1:attention": 8, "2": 8}])
    def test_the_setting_mends_it(self, bits):
        model = quantize_activations(blocks(0.5, 3.0, 3.0, 0.5), ActivationQuantizationConfig(bits=bits))
        assert step(model) == []
        assert sharp_attention(model) == {}

    def test_a_new_configuration_is_looked_at_anew(self):
        model = quantize_activations(blocks(3.0))
        assert len(step(model)) == 1
        quantize_activations(model, ActivationQuantizationConfig(bits=8))
        assert step(model) == []
        assert sharp_attention(model) == {}

    def test_beyond_eight_bits_full_precision_is_named(self):
        model = quantize_activations(blocks(12.0), ActivationQuantizationConfig(bits=8))
        (said,) = step(model)
        assert "skip_modules" in said

    def test_is_the_same_in_tiles_without_a_plan_and_on_the_reference(self):
        errors = []
        for config in ({"mlp_tiles": 2}, {"mlp_tiles": 1}, {"backend": "reference"}):
            model = quantize_activations(blocks(3.0, 3.0), ActivationQuantizationConfig(**config))
            assert len(step(model)) == 1
            errors.append(sharp_attention(model)["1"])
        model = blocks(3.0, 3.0)
        lone = quantize_activations(nn.ModuleDict({"one": model[1]}))
        lone["one"](model[0](X)).sum().backward()
        errors.append(sharp_attention(lone)["one"])
        assert max(errors) < 1.1 * min(errors)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_comes_through_checkpoints(self, use_reentrant):
        model = quantize_activations(blocks(3.0, 3.0))
        x = X.clone().requires_grad_()

        def forward(x):
            for block in model:
                x = checkpoint(block, x, use_reentrant=use_reentrant)
            return x

        said = step(forward, x)
        assert said
        assert set(sharp_attention(model)) == {"0", "1"}

    def test_survives_copies_and_files(self):
        model = quantize_activations(blocks(3.0))
        model.requires_grad_(True)
        step(model)
        assert sharp_attention(copy.deepcopy(model)) == sharp_attention(model)
        assert sharp_attention(pickle.loads(pickle.dumps(model))) == sharp_attention(model)

    def test_evaluation_and_estimates_do_not_count_as_the_first_step(self):
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**VIT, num_labels=5))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "query" in name or "q_proj" in name or "key" in name or "k_proj" in name:
                    parameter.mul_(150)
        quantize_activations(model)
        batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.arange(2)}
        estimate_memory(model, batch)
        with torch.no_grad():
            model(**batch)
        assert sharp_attention(model) == {}
        with pytest.warns(UserWarning, match="too sharp"):
            report = profile_memory(model, batch)
        assert set(report.sharp_attention) == set(sharp_attention(model)) != set()
        assert "Attention too sharp for its codes" in str(report)
