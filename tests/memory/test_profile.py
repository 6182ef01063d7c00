import copy

import pytest
import torch
from small_models import backbone, batch_for, plans_made, tuned
from torch import nn

from peft_s2a.memory import profile_memory


def mean_loss(model, batch):
    return model(batch).mean()


def test_counts_what_a_layer_keeps_by_operator_and_module():
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    report = profile_memory(model, torch.randn(64, 16), loss_fn=mean_loss)
    assert report.by_operator["gelu"].full_precision == 64 * 32 * 4
    assert report.by_module["1"].total == 64 * 32 * 4
    assert report.by_operator["addmm"].full_precision == 64 * (16 + 32) * 4  # the inputs of both layers
    assert report.saved_bytes == report.kept.total == 64 * (16 + 32 + 32) * 4
    assert report.batch_size == 64 and report.batch_bytes == 64 * 16 * 4


def test_frozen_layers_do_not_keep_their_inputs():
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    model[2].weight.requires_grad_(False)
    report = profile_memory(model, torch.randn(64, 16), loss_fn=mean_loss)
    assert report.by_operator["addmm"].full_precision == 64 * 16 * 4
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_indices_are_told_apart_from_full_precision():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2))
    report = profile_memory(model, torch.randn(4, 1, 8, 8), loss_fn=mean_loss)
    assert report.kept.masks == 4 * 2 * 4 * 4 * 8  # an int64 for each output
    assert report.kept.quantized == 0 and report.kept.full_precision > 0


def test_quantised_codes_are_told_apart():
    report = profile_memory(tuned("vit", "s2a"), batch_for("vit"))
    assert report.by_operator["s2a::activation"].quantized > 0
    assert report.kept.quantized > report.kept.full_precision
    assert profile_memory(tuned("vit", "lora"), batch_for("vit")).kept.quantized == 0


def test_peak_adds_up_and_optimizer_state_is_counted():
    model = tuned("vit", "full")
    report = profile_memory(model, batch_for("vit"))
    parameters = sum(p.numel() * 4 for p in model.parameters())
    assert report.peak.parameters == report.parameter_bytes == parameters + sum(b.nbytes for b in model.buffers())
    assert report.gradient_bytes == parameters
    assert report.optimizer_bytes == pytest.approx(2 * parameters, rel=0.01)
    assert report.peak_bytes == report.peak.total
    without = profile_memory(model, batch_for("vit"), optimizer=None)
    assert without.optimizer_bytes == 0 and without.peak_bytes < report.peak_bytes


def test_inputs_of_checkpointed_modules_are_named():
    model = tuned("vit", "lora")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    report = profile_memory(model, batch_for("vit"))
    assert report.by_operator["(input of a checkpointed module)"].total > report.saved_bytes / 2


def test_model_is_left_as_it_was():
    model = backbone("resnet").eval()  # its batch norms would update their statistics in train mode
    model.classifier[1].weight.grad = torch.ones_like(model.classifier[1].weight)
    batch = batch_for("resnet")
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    profile_memory(model, batch)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model.classifier[1].weight.grad, torch.ones_like(model.classifier[1].weight))
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_blocks_run_by_the_plans_that_they_have():
    model, batch = tuned("vit", "s2a"), batch_for("vit")
    model(**batch).loss.backward()
    with plans_made() as made:
        for _ in range(2):
            profile_memory(model, batch)
    assert not made


def test_branches_that_do_not_reach_the_loss_are_named():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.GELU())

        def forward(self, x):
            return self.used(x), self.unused(x)

    report = profile_memory(TwoHeads(), torch.randn(32, 16), loss_fn=lambda model, batch: model(batch)[0].mean())
    assert report.by_operator["(unused in backward)"].total == 32 * 16 * 4


def test_nothing_trained_raises():
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        profile_memory(nn.Linear(4, 4).requires_grad_(False), torch.randn(2, 4), loss_fn=mean_loss)


def test_output_without_loss_raises():
    with pytest.raises(ValueError, match="has no loss"):
        profile_memory(nn.Linear(4, 4), torch.randn(2, 4))


def test_loss_that_is_no_scalar_raises():
    with pytest.raises(ValueError, match=r"scalar tensor, got a tensor of shape \(2, 4\)"):
        profile_memory(nn.Linear(4, 4), torch.randn(2, 4), loss_fn=lambda model, batch: model(batch))


def test_meta_model_raises_and_names_the_way_out():
    with pytest.raises(ValueError, match="estimate_memory"):
        profile_memory(nn.Linear(4, 4, device="meta"), torch.randn(2, 4), loss_fn=mean_loss)
