"""Prompt: the gated second attention, and the pattern on the image where there is no attention."""

from __future__ import annotations

import families
import pytest
import torch
import torch.nn.functional as F
from kept import Kept
from peft import PeftModel, get_peft_model
from torch import nn

from peft_s2a import S2APromptConfig
from peft_s2a.activations.operators import add_prompt_attention
from peft_s2a.tuners.prompt import InputPromptLayer, PromptLayer


def by_loops(query, key, value, gate, num_heads):
    """The formula, one head and one query at a time."""
    head = query.shape[-1] // num_heads
    output = torch.zeros_like(query)
    for index in torch.cartesian_prod(*map(torch.arange, query.shape[:-1])).reshape(-1, query.dim() - 1):
        for h in range(num_heads):
            own = slice(h * head, (h + 1) * head)
            q = query[tuple(index)][own]
            weights = torch.stack([q @ k[own] for k in key]).div(head**0.5).softmax(0)
            output[tuple(index)][own] = gate[h].tanh() * sum(w * v[own] for w, v in zip(weights, value))
    return output


@pytest.mark.parametrize("shape", [(2, 5, 8), (3, 8), (2, 2, 3, 8)])
@pytest.mark.parametrize(("num_heads", "prompts"), [(1, 1), (2, 3), (4, 8)])
def test_gated_attention_is_the_formula(shape, num_heads, prompts):
    query = torch.randn(shape, dtype=torch.double)
    key, value = torch.randn(2, prompts, 8, dtype=torch.double)
    gate = torch.randn(num_heads, dtype=torch.double)
    attended = torch.randn_like(query)
    actual = add_prompt_attention(attended, query, key, value, gate, num_heads)
    torch.testing.assert_close(actual, attended + by_loops(query, key, value, gate, num_heads))


def test_gradients_of_the_gated_attention():
    tensors = [
        torch.randn(shape, dtype=torch.double, requires_grad=True)
        for shape in ((2, 3, 4), (2, 3, 4), (5, 4), (5, 4), (2,))
    ]
    torch.autograd.gradcheck(lambda *args: add_prompt_attention(*args, num_heads=2), tensors)


def test_open_gates_start_to_learn_behind_a_closed_one():
    query, key, value = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5, 4)
    gate = torch.zeros(2, requires_grad=True)
    output = add_prompt_attention(torch.zeros_like(query), query, key, value, gate, num_heads=2)
    assert not output.any()
    output.sum().backward()
    assert gate.grad.all()


class Attention(nn.Module):
    """Single projections or a fused one, in one test module."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_heads = 2
        if fused:
            self.qkv = nn.Linear(6, 24)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 8) for _ in range(3))
        self.out_proj = nn.Linear(8, 6)

    def projected(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if hasattr(self, "qkv"):
            return self.qkv(x).chunk(3, -1)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def attended(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (tensor.unflatten(-1, (2, 4)).movedim(-2, -3) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).movedim(-3, -2).flatten(-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.attended(*self.projected(x)))


@pytest.mark.parametrize("fused", [False, True])
def test_the_host_attends_to_prompts_too(fused):
    torch.manual_seed(0)
    base = Attention(fused).double()
    x = torch.randn(2, 5, 6, dtype=torch.double)
    q, k, v = base.projected(x)
    attended = base.attended(q, k, v)
    model = get_peft_model(nn.Sequential(base), S2APromptConfig(num_prompt_tokens=3, init_weights=False))
    layer = base.prompt_adapter
    assert layer.s2a_key["default"].shape == layer.s2a_value["default"].shape == (3, 8)
    own = (layer.s2a_key["default"], layer.s2a_value["default"], layer.s2a_gate["default"])
    expected = F.linear(attended + by_loops(q, *own, num_heads=2), base.out_proj.weight, base.out_proj.bias)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("family", ["vit", "swin", "timm_vit", "dinov3"])
def test_heads_are_counted(family):
    model = get_peft_model(families.build(family), S2APromptConfig())
    for layer in model.modules():
        if isinstance(layer, PromptLayer):
            owners = [layer.get_base_layer(), *layer.get_base_layer().modules()]
            counts = {getattr(m, n) for m in owners for n in ("num_heads", "num_attention_heads") if hasattr(m, n)}
            assert {layer.num_heads} == counts
            assert layer.s2a_gate["default"].shape == (layer.num_heads,)


def test_prompts_take_any_number_of_tokens():
    model = get_peft_model(families.build("vit"), S2APromptConfig(init_weights=False)).eval()
    for side in (32, 40, 64):
        output = model(torch.randn(2, 3, side, side), interpolate_pos_encoding=True).logits
        assert output.shape == (2, families.NUM_LABELS) and output.isfinite().all()


def test_prompts_keep_their_scores_but_never_a_square_of_tokens():
    torch.manual_seed(0)
    base = Attention(fused=False).requires_grad_(False)
    model = get_peft_model(nn.Sequential(base), S2APromptConfig(num_prompt_tokens=3, activation_quantization=None))
    with Kept(model) as kept:
        assert model(torch.randn(2, 50, 6)).requires_grad
    assert all(tensor.numel() <= 2 * 50 * 8 for tensor in kept.tensors)


def test_attention_whose_tokens_change_on_the_way_is_refused():
    class Pooling(Attention):
        def projected(self, x):
            return tuple(tensor[..., ::2, :] for tensor in super().projected(x))

    with pytest.raises(ValueError, match=r"does not keep its tokens.*`exclude_modules`"):
        get_peft_model(nn.Sequential(Pooling(fused=False)), S2APromptConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"'prompt' has no place to go.*'0' does not keep its tokens"):
        get_peft_model(nn.Sequential(Pooling(fused=False)), S2APromptConfig())


class TestInputPrompt:
    @pytest.mark.parametrize("family", ["resnet", "convnext", "plain_cnn"])
    def test_the_pattern_is_stretched_over_the_image(self, family):
        base = families.build(family).eval()
        images = torch.randn(2, 3, 32, 24)
        model = get_peft_model(base, S2APromptConfig(num_prompt_tokens=4, init_weights=False)).eval()
        layer = next(module for module in model.modules() if isinstance(module, InputPromptLayer))
        pattern = layer.s2a_pattern["default"]
        assert pattern.shape == (3, 4, 4)
        actual = families.logits(model, images)
        with model.disable_adapter():
            stretched = F.interpolate(pattern[None], size=(32, 24), mode="bilinear")
            expected = families.logits(model, images + stretched)
        torch.testing.assert_close(actual, expected)

    def test_it_does_not_depend_on_the_resolution(self, tmp_path):
        model = get_peft_model(families.build("resnet").eval(), S2APromptConfig(init_weights=False)).eval()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(families.build("resnet"), tmp_path)
        for side in (32, 64):
            images = torch.randn(2, 3, side, side)
            assert torch.equal(families.logits(loaded, images), families.logits(model, images))
