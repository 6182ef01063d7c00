"""Profile, estimate and PyTorch's allocator tell the same."""

import pytest
import torch
from kept import Kept
from small_models import batch_for, tuned

from peft_s2a.memory import estimate_memory, profile_memory


def allocator_peak(model, batch) -> int:
    """Highest live bytes of a step above what was live before it, straight from the allocator's events."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def saved_bytes(model, batch) -> int:
    """Bytes of the unique storages kept for backward, without parameters and buffers."""
    with Kept(model) as kept:
        model(**batch).loss.backward()
    model.zero_grad()
    return kept.nbytes


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vit", "full"), ("vit", "lora"), ("vit", "s2a"), ("swin", "lora"), ("swin", "s2a"), ("resnet", "s2a"),
        pytest.param("swin", "full", marks=pytest.mark.slow), pytest.param("resnet", "full", marks=pytest.mark.slow),
        pytest.param("resnet", "lora", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_profile_estimate_and_allocator_agree(name, method):
    model, batch = tuned(name, method), batch_for(name)
    estimate = estimate_memory(model, batch)
    profile = profile_memory(model, batch)
    assert profile.step_peak_bytes == pytest.approx(allocator_peak(model, batch), rel=0.02)
    assert estimate.step_peak_bytes == pytest.approx(profile.step_peak_bytes, rel=0.05)
    assert estimate.saved_bytes == pytest.approx(profile.saved_bytes, rel=0.05)
    assert profile.saved_bytes == pytest.approx(saved_bytes(model, batch), rel=0.02)
    for attribute in ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "batch_bytes", "trainable_parameters"):
        assert getattr(estimate, attribute) == getattr(profile, attribute), attribute


def test_estimate_knows_activation_checkpointing():
    model, batch = tuned("vit", "lora"), batch_for("vit")
    plain = estimate_memory(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    estimate, profile = estimate_memory(model, batch), profile_memory(model, batch)
    assert estimate.step_peak_bytes == pytest.approx(profile.step_peak_bytes, rel=0.05)
    assert estimate.saved_bytes == profile.saved_bytes < plain.saved_bytes / 2
    assert estimate.by_operator == profile.by_operator


def test_estimate_under_autocast_matches_profile():
    model, batch = tuned("vit", "lora"), batch_for("vit")
    estimate = estimate_memory(model, batch, autocast=torch.bfloat16)
    profile = profile_memory(model, batch, autocast=torch.bfloat16)
    assert estimate.saved_bytes == pytest.approx(profile.saved_bytes, rel=0.05)
    assert estimate.saved_bytes < estimate_memory(model, batch).saved_bytes


def test_module_and_operator_of_the_peak_agree():
    model, batch = tuned("vit", "lora"), batch_for("vit")
    estimate, profile = estimate_memory(model, batch), profile_memory(model, batch)
    assert (estimate.peak.phase, estimate.peak.module, estimate.peak.operator) == (
        profile.peak.phase,
        profile.peak.module,
        profile.peak.operator,
    )
    assert estimate.by_module == profile.by_module
