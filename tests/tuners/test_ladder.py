"""Ladder: a narrow network beside a backbone of which nothing is kept for backward."""

from __future__ import annotations

import families
import pytest
import torch
import torch.nn.functional as F
from kept import Kept
from methods import IMAGES, LABELS, base_model
from peft import PeftModel, get_peft_model
from torch import nn

from peft_s2a import S2AConfig, S2ASideConfig
from peft_s2a.activations.plans import planner
from peft_s2a.tuners.ladder import LadderRung, LadderTop, resample


RANK = 7


def ladder(model: nn.Module, **kwargs) -> nn.Module:
    config = S2ASideConfig(side_mode="ladder", side_rank=RANK, activation_quantization=None, **kwargs)
    return get_peft_model(model, config)


def test_output_is_the_formula():
    torch.manual_seed(0)
    base = base_model().double().requires_grad_(False)
    images = IMAGES.double()
    inputs, features = [], []
    for block in base.vit.layers:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    base.classifier.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    base(images)
    model = ladder(base, init_weights=False)
    rungs = [module for module in model.modules() if isinstance(module, LadderRung)]
    (top,) = [module for module in model.modules() if isinstance(module, LadderTop)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    h = F.gelu(inputs[0] @ rungs[0].s2a_down["default"].T + rungs[0].s2a_shift["default"])
    for x, rung in zip(inputs[1:], rungs[1:]):
        mixed = h @ rung.s2a_mix["default"].T
        h = h + F.gelu(x @ rung.s2a_down["default"].T + mixed + rung.s2a_shift["default"])
    joined = features[0] + 16.0 / RANK * h.mean(1) @ top.s2a_up["default"].T
    expected = base.classifier.modules_to_save["default"](joined)
    torch.testing.assert_close(model(images).logits, expected)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_tiles_of_blocks_and_stages_leave_the_ladder_whole(family, monkeypatch):
    images, labels = families.batch(family)
    gradients = []
    for tile_bytes in (2**30, 1):
        monkeypatch.setitem(planner._ROOM, "cpu", tile_bytes)
        torch.manual_seed(0)
        model = get_peft_model(families.build(family), S2ASideConfig(side_mode="ladder", init_weights=False)).train()
        torch.manual_seed(0)
        F.cross_entropy(families.logits(model, images), labels).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        assert torch.allclose(gradients[1][name], expected, rtol=0.1, atol=0.02 * expected.abs().max().item()), name


@pytest.mark.parametrize("family", families.FAMILIES)
def test_nothing_of_the_backbone_is_kept(family):
    images, labels = families.batch(family)
    model = ladder(families.build(family), modules_to_save=[]).train()
    blocks = {m.get_base_layer() for m in model.modules() if isinstance(m, LadderRung)}
    recorded = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: recorded.append(output))
    with Kept(model) as kept:
        assert F.cross_entropy(families.logits(model, images), labels).requires_grad
    outputs = [output if isinstance(output, torch.Tensor) else output[0] for output in recorded]
    assert outputs and not any(output.requires_grad for output in outputs)
    # What remains is of width r, or no more than a vector per image.
    per_image = max(output.shape[1 if output.dim() == 4 else -1] for output in outputs)
    assert all(RANK in tensor.shape or tensor.numel() <= len(images) * per_image for tensor in kept.tensors)


@pytest.mark.parametrize("family", ["vit", "timm_convnext", "convnext"])
def test_what_a_ladder_keeps_is_seen_by_others_from_the_first_step_on(family):
    """Where a head that is watched once for its plan holds the place where the ladder joins, the ladder runs in it."""
    model = get_peft_model(families.build(family), S2ASideConfig(side_mode="ladder", init_weights=False)).train()
    images, _ = families.batch(family)
    found = []
    for _ in range(2):
        with Kept(model) as kept:
            assert families.logits(model, images).requires_grad
        with torch.autograd.graph.save_on_cpu():
            loss = families.logits(model, images).square().mean()
        model.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((kept.nbytes, gradients))
    (first, gradients), (second, same_gradients) = found
    assert first == second > 1000
    assert all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)


def test_a_bare_backbone_is_joined_behind_its_last_block():
    torch.manual_seed(0)
    base = base_model().vit.requires_grad_(False)
    plain = base(IMAGES).last_hidden_state
    model = ladder(base)
    assert torch.equal(model(IMAGES).last_hidden_state, plain)
    model = ladder(base_model().vit, init_weights=False)
    assert not torch.allclose(model(IMAGES).last_hidden_state, plain)
    model(IMAGES).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_several_heads_share_the_ladder_even_if_some_are_not_called():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.timm_model = base_model().vit
            self.heads = nn.ModuleList([nn.Linear(32, 3), nn.Linear(32, 3)])
            self.timm_model.get_classifier = lambda: (self.heads[0], self.heads[1])

        def forward(self, x, both=True):
            features = self.timm_model(x).last_hidden_state[:, 0]
            return [head(features) for head in (self.heads if both else self.heads[:1])]

    model = ladder(TwoHeads(), init_weights=False, modules_to_save=[])
    other = torch.randn_like(IMAGES)
    first, second = model(IMAGES)
    model(other, both=False)
    again = model(IMAGES)
    assert torch.equal(again[0], first) and torch.equal(again[1], second)
    assert torch.equal(model(IMAGES, both=False)[0], first)


def test_ladders_survive_a_change_of_batch_size_and_training_steps():
    model = ladder(base_model())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for size in (4, 2, 4, 3, 4):
        loss = F.cross_entropy(model(IMAGES[:size]).logits, LABELS[:size])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_ladders_beside_some_blocks():
    model = ladder(base_model(), layers_to_transform=[1], init_weights=False)
    assert [name for name, m in model.named_modules() if isinstance(m, LadderRung)] == [
        "base_model.model.vit.layers.1.ladder_adapter"
    ]
    assert model(IMAGES).logits.isfinite().all()


def test_a_ladder_without_a_head_and_one_with_it(tmp_path):
    options = {"side_mode": "ladder", "init_weights": False, "activation_quantization": None}
    model = get_peft_model(families.build("vit"), S2ASideConfig(**options, modules_to_save=[])).eval()
    images, _ = families.batch("vit")
    expected, count = model(images).logits, sum(isinstance(module, LadderTop) for module in model.modules())
    model.add_adapter("with head", S2ASideConfig(**options))
    assert sum(isinstance(module, LadderTop) for module in model.modules()) == count
    assert torch.equal(model(images).logits, expected)
    model.set_adapter("with head")
    expected = model(images).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(families.build("vit"), tmp_path / "with head").eval()
    assert torch.equal(loaded(images).logits, expected)


@pytest.mark.parametrize("structures", [("bias", "side"), ("bias", "prompt", "side"), ("bias",), ("prompt",)])
def test_a_ladder_cannot_be_combined(structures):
    with pytest.raises(ValueError, match="cannot be combined with other structures"):
        S2AConfig(structures=structures, side_mode="ladder")


class TestResample:
    def test_same_positions_are_left_alone(self):
        state = torch.randn(2, 5, 3)
        assert resample(state, torch.Size([5])) is state

    def test_grids_are_averaged_over_windows(self):
        state = torch.randn(2, 4, 6, 3)
        expected = F.avg_pool2d(state.movedim(-1, 1), 2).movedim(1, -1)
        torch.testing.assert_close(resample(state, torch.Size([2, 3])), expected)
        torch.testing.assert_close(
            resample(state[:, :, :4].flatten(1, 2), torch.Size([4])), expected[:, :, :2].flatten(1, 2)
        )

    def test_tokens_become_a_grid(self):
        state = torch.randn(2, 16, 3)
        assert resample(state, torch.Size([2, 2])).shape == (2, 2, 2, 3)

    def test_sequences_with_other_tokens_go_through_their_mean(self):
        state = torch.randn(2, 17, 3)
        expected = state.mean(1)[:, None].expand(2, 5, 3)
        torch.testing.assert_close(resample(state, torch.Size([5])), expected)
