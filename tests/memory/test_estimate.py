import pytest
import torch
from small_models import backbone, batch_for, plans_made, settings_of, tuned
from torch import nn

from peft_s2a.memory import estimate_memory, extrapolate_memory, image_batch, largest_batch_size, profile_memory


def test_meta_model_and_real_model_have_the_same_estimate():
    with torch.device("meta"):
        model = backbone("vit")
    on_meta, real = estimate_memory(model, 4), estimate_memory(backbone("vit"), 4)
    assert on_meta.to_dict() == real.to_dict()
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_shapes_are_enough_and_nothing_large_is_allocated():
    model = backbone("vit")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        report = estimate_memory(model, 4096)
    allocated = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sum(size for size in allocated if size > 0) < report.saved_bytes / 1000


def test_model_is_left_as_it_was():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.tables, self.last = nn.Linear(8, 8), {}, None

        def forward(self, x):
            if x.shape not in self.tables:
                self.tables[x.shape] = torch.arange(8.0)
            self.last = self.layer(x) + self.tables[x.shape]
            return self.last

    model = Caching().eval()
    parameters = list(model.parameters())
    estimate_memory(model, torch.empty(4, 8), loss_fn=lambda model, batch: model(batch).mean())
    assert model.tables == {} and model.last is None and not model.training
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    assert all(parameter.grad is None for parameter in parameters)
    assert torch.isfinite(model(torch.randn(4, 8))).all()


def test_profile_after_estimate_works_on_quantised_model():
    model = tuned("swin", "s2a")
    estimate = estimate_memory(model, batch_for("swin"))
    profile = profile_memory(model, batch_for("swin"))
    assert estimate.saved_bytes == pytest.approx(profile.saved_bytes, rel=0.05)


def test_blocks_that_are_alike_are_recorded_once_and_no_recording_is_left():
    model = tuned("vit", "s2a")
    with plans_made() as made:
        estimate_memory(model, batch_for("vit"))
    assert len(made) == 2, "embeddings, and one for three blocks"
    settings = settings_of(model)
    assert not any(s.planner.store.entries for s in settings if s.planner is not None)
    assert all(s.is_new for s in settings)


def test_tied_parameters_are_counted_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    report = estimate_memory(model, torch.empty(4, 8), loss_fn=lambda model, batch: model(batch).mean())
    assert report.parameter_bytes == report.gradient_bytes == 8 * 8 * 4


def test_integer_batch_takes_the_size_from_the_config():
    batch = image_batch(backbone("swin"), 3)
    assert batch["pixel_values"].shape == (3, 3, 64, 64) and batch["labels"].shape == (3,)
    assert image_batch(backbone("resnet"), 2)["pixel_values"].shape == (2, 3, 224, 224)
    assert image_batch(backbone("resnet"), 2, (32, 48))["pixel_values"].shape == (2, 3, 32, 48)


def test_integer_batch_without_config_raises():
    with pytest.raises(ValueError, match="no transformers config"):
        estimate_memory(nn.Linear(4, 4), 8)


def test_empty_batch_raises():
    with pytest.raises(ValueError, match="must be positive, got 0"):
        estimate_memory(backbone("vit"), 0)


def test_unknown_device_raises():
    with pytest.raises(ValueError, match="'cpu' or 'cuda', got 'mps'"):
        estimate_memory(backbone("vit"), 2, device="mps")


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of PyTorch")
def test_cuda_needs_a_cuda_build():
    with pytest.raises(ValueError, match="CUDA build"):
        estimate_memory(backbone("vit"), 2, device="cuda")


def test_data_dependent_model_raises_and_names_the_way_out():
    class Counting(nn.Linear):
        def forward(self, x):
            return super().forward(x) * int((x > 0).sum().item())

    with pytest.raises(ValueError, match="profile_memory"):
        estimate_memory(Counting(4, 4), torch.empty(2, 4), loss_fn=lambda model, batch: model(batch).mean())


class Peak:
    def __init__(self, peak_bytes):
        self.peak_bytes = peak_bytes


@pytest.mark.parametrize(
    "peak",
    [lambda n: 100 + 7 * n, lambda n: 100 + 7 * n + n % 5, lambda n: 100 + n * n, lambda n: max(500, 9 * n)],
    ids=["line", "sawtooth", "square", "floor"],
)
@pytest.mark.parametrize("budget", [106, 107, 650, 5003, 10**5])
def test_largest_batch_fits_and_the_next_does_not(peak, budget):
    size = largest_batch_size(lambda n: Peak(peak(n)), budget)
    assert size == 0 or peak(size) <= budget
    assert peak(size + 1) > budget


def test_largest_batch_needs_few_estimates_and_stops_at_the_limit():
    tried = []

    def report(size):
        tried.append(size)
        return Peak(1000 + 13 * size)

    assert largest_batch_size(report, 50_000) == (50_000 - 1000) // 13
    assert len(tried) <= 4
    tried.clear()
    peak = {1: 5000, 2: 5010}  # that of the optimiser's step, as long as batches are small
    assert largest_batch_size(lambda n: tried.append(n) or Peak(peak.get(n, 1000 + 1300 * n)), 50_000, start=2) == 37
    assert len(tried) <= 6
    assert largest_batch_size(report, 10**9, limit=64) == 64


def test_largest_batch_of_a_model_is_where_the_budget_ends():
    model = tuned("vit", "lora")
    budget = estimate_memory(model, 11).peak_bytes
    assert largest_batch_size(lambda n: estimate_memory(model, n), budget) == 11
    assert largest_batch_size(lambda n: estimate_memory(model, n), budget - 1) == 10


@pytest.mark.parametrize("argument", ["budget", "start", "limit"])
def test_largest_batch_rejects_what_is_not_positive(argument):
    arguments = {"budget": 100, "start": 1, "limit": 10, argument: 0}
    with pytest.raises(ValueError, match=f"{argument}: must be positive"):
        largest_batch_size(lambda n: Peak(n), **arguments)


def test_extrapolation_meets_the_estimate():
    model = tuned("vit", "lora")
    small, large, exact = (estimate_memory(model, size) for size in (8, 16, 48))
    report = extrapolate_memory(small, large, 48)
    assert report.source == "extrapolation" and report.batch_size == 48
    assert report.saved_bytes == exact.saved_bytes and report.by_operator == exact.by_operator
    assert report.peak_bytes == pytest.approx(exact.peak_bytes, rel=0.01)


def test_extrapolation_backwards_raises():
    small, large = (estimate_memory(tuned("vit", "lora"), size) for size in (2, 4))
    with pytest.raises(ValueError, match="got 2, 4 and 3"):
        extrapolate_memory(small, large, 3)


def test_blocks_without_a_plan_are_in_the_report():
    model, batch = tuned("vit", "s2a"), batch_for("vit")
    assert not profile_memory(model, batch).unplanned and not estimate_memory(model, batch).unplanned
    name = next(name for name, _ in model.base_model.model.named_modules() if name.endswith("layers.1.mlp.fc1"))
    model.base_model.model.get_submodule(name).register_forward_hook(lambda *_: None)
    for report in (profile_memory(model, batch), estimate_memory(model, batch)):
        (block,) = report.unplanned
        assert name.startswith(block) and "hook" in report.unplanned[block]
        assert "Without a plan" in str(report)
