"""Calibration chooses bits and levels that pay, within what was asked for, and leaves the model alone."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import batch, build, logits
from kept import Kept
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_s2a import S2AConfig
from peft_s2a.activations import notes
from peft_s2a.activations.calibrate import calibrate_activations, pareto_front
from peft_s2a.activations.codec import WIDTHS
from peft_s2a.activations.config import ActivationQuantizationConfig
from peft_s2a.activations.plans import planner
from peft_s2a.activations.wrap import quantize_activations, restore_activations


SIZE = 4  # images in a batch
REFERENCE = ActivationQuantizationConfig(backend="reference")


@pytest.fixture(autouse=True)
def _no_tensors_left_behind():
    notes.forget_all()  # of operators that other tests ran outside of modules
    yield
    assert notes._thread.notes == []


def tune_biases(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias") or "classifier" in name
    return model.train()


def cross_entropy(model, images_and_labels):
    images, labels = images_and_labels
    torch.manual_seed(0)  # the same stochastic depth every time
    return F.cross_entropy(logits(model, images), labels)


def calibrate(model, budget=None, family="vit", **options):
    options = {"config": REFERENCE, "loss": cross_entropy, **options}
    return calibrate_activations(model, [batch(family, SIZE)], budget, **options)


def gradient_and_bytes(model, config=None, family="vit"):
    """The gradient of the trained parameters, as one vector, and the bytes per image kept for it, quantised as in
    ``config``."""
    if config is not None:
        quantize_activations(model, config)
    try:
        with Kept(model) as kept:
            loss = cross_entropy(model, batch(family, SIZE))
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        restore_activations(model)
    return torch.cat([grad.flatten().double() for grad in grads if grad is not None]), kept.nbytes / SIZE


def relative_error(expected, actual):
    return ((actual - expected).norm() / expected.norm()).item()


def uniform(bits):
    return ActivationQuantizationConfig(bits=bits, backend="reference")


@pytest.fixture(scope="module")
def vit():
    return tune_biases(build("vit"))


@pytest.fixture(scope="module")
def exact(vit):
    return gradient_and_bytes(vit)[0]


@pytest.fixture(scope="module")
def swinv2():
    """A model whose attention modules hold operators of four kinds, and its configuration for the bytes of 4 bits."""
    model = tune_biases(build("swinv2"))
    return model, calibrate(model, 1.0, "swinv2")


def check_beats_four_bits(model, config, family):
    expected, _ = gradient_and_bytes(model, family=family)
    four, four_bytes = gradient_and_bytes(model, uniform(4), family)
    fitted, fitted_bytes = gradient_and_bytes(model, config, family)
    assert fitted_bytes <= four_bytes
    assert relative_error(expected, fitted) < 0.9 * relative_error(expected, four)


class TestParetoFront:
    @pytest.mark.parametrize("seed", range(20))
    def test_holds_the_best_choice_for_every_budget(self, seed):
        generator = np.random.default_rng(seed)
        costs = generator.integers(1, 30, (5, 3))
        errors = generator.random((5, 3))
        cost, error, choices = pareto_front(costs, errors)
        items = np.arange(5)
        everything = [
            (costs[items, list(c)].sum(), errors[items, list(c)].sum()) for c in itertools.product(range(3), repeat=5)
        ]
        for budget in range(costs.min(1).sum(), costs.max(1).sum() + 1):
            best = min(e for c, e in everything if c <= budget)
            found = np.searchsorted(cost, budget, side="right") - 1
            assert error[found] == pytest.approx(best)
            assert cost[found] == costs[items, choices[found]].sum() <= budget
            assert error[found] == pytest.approx(errors[items, choices[found]].sum())

    def test_is_close_to_the_best_where_points_are_dropped(self):
        generator = np.random.default_rng(0)
        costs = np.sort(generator.integers(1, 10_000, (20, 5)))
        errors = -np.sort(-generator.random((20, 5)))
        cost, error, _ = pareto_front(costs, errors, limit=5_000)
        thin_cost, thin_error, choices = pareto_front(costs, errors, limit=500)
        assert len(thin_cost) <= 502 < len(cost)
        assert thin_cost[0] == costs.min(1).sum()
        assert (np.diff(thin_cost) > 0).all() and (np.diff(thin_error) < 0).all()
        assert (thin_cost == costs[np.arange(20), choices].sum(1)).all()
        budgets = np.linspace(2 * cost[0], cost[-1], 50)
        best, thin = (
            e[np.searchsorted(c, budgets, side="right") - 1] for c, e in ((cost, error), (thin_cost, thin_error))
        )
        assert (thin <= 1.05 * best + 0.05).all()


class TestBudget:
    @pytest.mark.parametrize("budget", [15_000, 23_456, 40_000])
    def test_in_bytes_is_kept_to(self, budget):
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.LayerNorm(96), nn.GELU(), nn.SiLU())))
        x, weights = torch.randn(SIZE, 100, 96), torch.randn(96)

        def loss(model, x):
            return torch.tensordot(model(x), weights, 1).square().mean()

        config = calibrate_activations(model, [x], budget, config=REFERENCE, loss=loss)
        quantize_activations(model, config)
        with Kept(model) as kept:
            model(x)
        assert 0.85 * budget < kept.nbytes / SIZE <= budget

    def test_as_a_fraction_is_of_four_bits(self, vit):
        stock = gradient_and_bytes(vit)[1]
        four = gradient_and_bytes(vit, uniform(4))[1]
        half = gradient_and_bytes(vit, calibrate(vit, 0.6))[1]
        assert half < 0.7 * four < stock

    @pytest.mark.slow
    def test_more_is_never_worse(self, vit, exact):
        found = [gradient_and_bytes(vit, calibrate(vit, budget)) for budget in (0.6, 0.8, 1.0, 1.6)]
        errors = [relative_error(exact, gradient) for gradient, _ in found]
        kept = [size for _, size in found]
        assert kept == sorted(kept)
        assert errors == sorted(errors, reverse=True)

    def test_below_the_smallest_possible_is_refused(self, vit):
        with pytest.raises(ValueError, match=r"`budget` 10 allows 10 bytes per image, the smallest .* takes \d+"):
            calibrate(vit, 10)


class TestFidelity:
    @pytest.mark.parametrize("family", ["vit", "convnext"])
    def test_beats_uniform_bits_with_no_more_bytes(self, family):
        model = tune_biases(build(family))
        check_beats_four_bits(model, calibrate(model, 1.0, family), family)

    @pytest.mark.slow
    def test_beats_uniform_bits_where_operators_differ_in_scale(self, swinv2):
        check_beats_four_bits(*swinv2, "swinv2")

    def test_on_images_it_has_not_seen(self, vit):
        config = calibrate_activations(
            vit, [batch("vit", SIZE, seed) for seed in (2, 3)], 1.0, config=REFERENCE, loss=cross_entropy
        )
        expected, _ = gradient_and_bytes(vit)
        assert relative_error(expected, gradient_and_bytes(vit, config)[0]) < relative_error(
            expected, gradient_and_bytes(vit, uniform(4))[0]
        )

    @pytest.mark.parametrize("target", [0.03, 0.2])
    def test_target_error_is_reached_with_fewer_bytes_than_uniform_bits(self, vit, exact, target):
        gradient, kept = gradient_and_bytes(vit, calibrate(vit, target_error=target))
        assert 0.3 * target < relative_error(exact, gradient) < 1.3 * target  # an estimate to first order
        enough = [w for w in WIDTHS if relative_error(exact, gradient_and_bytes(vit, uniform(w))[0]) < target]
        assert kept < gradient_and_bytes(vit, uniform(enough[0]))[1]

    def test_unreachable_target_is_refused(self, vit):
        with pytest.raises(ValueError, match=r"`target_error` 1e-12 cannot be reached .* the smallest error is"):
            calibrate(vit, target_error=1e-12)

    def test_fitted_levels_lower_the_error(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 3))
        with torch.no_grad():
            model[0].bias.fill_(1.5)  # far from what the shipped levels are fitted to
        x = torch.randn(SIZE * 64, 8)

        def loss(model, x):
            return model(x).square().mean()

        def gradient(config):
            if config is not None:
                quantize_activations(model, config)
            grads = torch.autograd.grad(loss(model, x), list(model.parameters()))
            restore_activations(model)
            return torch.cat([grad.flatten() for grad in grads])

        config = calibrate_activations(model, [x], 1.0, config=REFERENCE, widths=(3, 4), loss=loss)
        assert config.bits["1:activation"] == 4
        assert list(config.levels) == ["1"]
        expected = gradient(None)
        assert relative_error(expected, gradient(config)) < 0.8 * relative_error(expected, gradient(uniform(4)))

    def test_stochastic_rounding_takes_the_shipped_levels(self, vit):
        config = calibrate(vit, 1.0, config=ActivationQuantizationConfig(rounding="stochastic", backend="reference"))
        assert config.levels is None and config.rounding == "stochastic"
        assert len(set(config.bits.values())) > 1


class TestResult:
    def test_is_plain_data_that_reproduces_the_run(self, vit):
        config = calibrate(vit, 0.8)
        again = ActivationQuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert torch.equal(gradient_and_bytes(vit, config)[0], gradient_and_bytes(vit, again)[0])

    def test_is_the_same_every_time(self, vit):
        assert calibrate(vit, 0.8) == calibrate(vit, 0.8)

    def test_is_the_same_for_a_model_that_runs_in_tiles(self, vit, monkeypatch):
        config = ActivationQuantizationConfig(mlp_tiles="auto")
        whole = calibrate(vit, 0.8, config=config)
        monkeypatch.setitem(planner._ROOM, "cpu", 1)
        assert calibrate(vit, 0.8, config=config) == whole

    def test_uses_only_the_widths_allowed(self, vit):
        assert {*calibrate(vit, 0.8, widths=(2, 3)).bits.values()} == {2, 3, 4}  # 4: what is not measured

    def test_keeps_the_other_settings(self, vit):
        options = {
            "backend": "reference",
            "group_size": 16,
            "mlp_tiles": 1,
            "skip_modules": ["mlp"],
            "bits": {"norm": 3},
        }
        config = calibrate(vit, 0.8, config=options)
        assert {**config.to_dict(), "bits": None, "levels": None} == {
            **ActivationQuantizationConfig(**options).to_dict(),
            "bits": None,
        }
        assert config.bits["norm"] == 3
        assert not any("mlp" in name for name in config.bits)

    def test_kinds_of_one_module_have_their_own_bits(self, swinv2):
        _, config = swinv2
        kinds = {name.rpartition(":")[2] for name in config.bits if "attention.self" in name}
        assert {"softmax", "attention", "norm"} <= kinds
        name = next(name for name in config.bits if name.endswith("attention.self:softmax")).rpartition(":")[0]
        for kind in ("softmax", "attention", "norm"):
            assert config.quantizer(kind, name).bits == config.bits[f"{name}:{kind}"]

    def test_is_saved_with_an_adapter(self, tmp_path):
        model = get_peft_model(build("vit"), S2AConfig(activation_quantization=REFERENCE))
        config = calibrate(model, 0.8)
        assert not any(name.startswith("base_model") for name in config.bits)
        tuned = get_peft_model(build("vit"), S2AConfig(activation_quantization=config))
        tuned.save_pretrained(tmp_path)
        assert S2AConfig.from_pretrained(tmp_path).activation_quantization == config
        widths = {
            name: module._activation_settings.operators.quantizer("norm").bits
            for name, module in tuned.get_base_model().named_modules()
            if f"{name}:norm" in config.bits
        }
        assert widths == {
            name[: -len(":norm")]: width for name, width in config.bits.items() if name.endswith(":norm")
        }

    def test_of_lora_with_compressed_inputs(self):
        model = get_peft_model(build("vit"), LoraConfig(target_modules=["q_proj", "v_proj", "query", "value"]))
        options = ActivationQuantizationConfig(backend="reference", compress_linear_inputs=True)
        assert any(name.endswith("lora_A.default:linear") for name in calibrate(model, 1.0, config=options).bits)


class _Tracker(nn.Module):
    """Has all that a forward pass may change."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.SiLU(inplace=True)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(8, 5)

    def forward(self, images):
        return self.last(self.drop(self.act(self.norm(self.first(images))).mean((2, 3))))


def direct(model, images_and_labels):
    return F.cross_entropy(model(images_and_labels[0]), images_and_labels[1])


class TestModel:
    def test_is_left_as_it_was(self):
        model = _Tracker()
        model.norm.eval()
        direct(model, batch("vit", SIZE)).backward()
        state = copy.deepcopy(model.state_dict())
        grads = [p.grad.clone() for p in model.parameters()]
        held = [p.grad for p in model.parameters()]
        torch.manual_seed(3)
        random_state = torch.get_rng_state()
        calibrate_activations(model, [batch("vit", SIZE)], 1.0, config=REFERENCE, loss=direct)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(p.grad is h and torch.equal(p.grad, g) for p, h, g in zip(model.parameters(), held, grads))
        assert [m.training for m in model.modules()] == [True, True, False, True, True, True]
        assert torch.equal(torch.get_rng_state(), random_state)
        assert type(model.act) is nn.SiLU and not hasattr(model.act, "_activation_settings")

    def test_stays_quantised_as_it_was(self):
        model = quantize_activations(tune_biases(build("vit")), uniform(2))
        settings = {name: getattr(m, "_activation_settings", None) for name, m in model.named_modules()}
        classes = {name: type(m) for name, m in model.named_modules()}
        calibrate(model, 1.0)
        assert {name: getattr(m, "_activation_settings", None) for name, m in model.named_modules()} == settings
        assert {name: type(m) for name, m in model.named_modules()} == classes

    def test_is_left_as_it_was_after_an_error(self, vit):
        with pytest.raises(RuntimeError, match="on purpose"):
            calibrate(vit, 1.0, loss=lambda model, batch: (_ for _ in ()).throw(RuntimeError("on purpose")))
        assert not any(hasattr(module, "_activation_settings") for module in vit.modules())

    def test_hooks_of_optimisers_do_not_fire(self):
        model = tune_biases(build("vit"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: pytest.fail("a gradient was accumulated"))
        calibrate(model, 1.0)

    def test_under_autocast(self, vit):
        def loss(model, images_and_labels):
            with torch.autocast("cpu", torch.bfloat16):
                return cross_entropy(model, images_and_labels)

        assert len(set(calibrate(vit, 0.8, loss=loss).bits.values())) > 1

    def test_with_attention_dropout(self):
        model = tune_biases(build("vit"))
        for module in model.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.5
        # with different masks the error would be as large as the gradient
        calibrate(model, target_error=0.02)

    def test_default_loss_is_the_models_own(self, vit):
        images, labels = batch("vit", SIZE)
        own = calibrate_activations(vit, [{"pixel_values": images, "labels": labels}], 0.8, config=REFERENCE)
        assert own == calibrate(vit, 0.8)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "Exactly one of `budget` and `target_error`"),
            ({"budget": 0.5, "target_error": 0.1}, "Exactly one of `budget` and `target_error`"),
            ({"budget": 0}, "`budget` must be a positive int"),
            ({"budget": "1 GB"}, "`budget` must be a positive int"),
            ({"budget": True}, "`budget` must be a positive int"),
            ({"budget": 5e6}, "give bytes per image as an int"),
            ({"target_error": -0.1}, "`target_error` must be a positive number"),
            ({"budget": 1.0, "widths": (4, 5)}, r"`widths` must be some of \(1, 2, 3, 4, 8\)"),
            ({"budget": 1.0, "widths": 4}, r"`widths` must be some of"),
            ({"budget": 1.0, "config": 4}, "`config` must be an ActivationQuantizationConfig"),
            ({"budget": 1.0, "loss": lambda model, batch: torch.zeros(())}, "requires_grad=False"),
            ({"budget": 1.0, "loss": lambda model, batch: logits(model, batch[0])}, "must be a scalar"),
            ({"budget": 1.0, "loss": lambda *args: cross_entropy(*args) * torch.nan}, "must be finite, got nan"),
            ({"budget": 1.0, "loss": None}, "`batches` must hold dicts"),
        ],
    )
    def test_others_are_refused(self, vit, options, message):
        with pytest.raises(ValueError, match=message):
            calibrate(vit, **options)

    def test_no_batches(self, vit):
        with pytest.raises(ValueError, match="at least one batch"):
            calibrate_activations(vit, [], 1.0)

    def test_no_labels(self, vit):
        with pytest.raises(ValueError, match="give `labels`"):
            calibrate_activations(vit, [{"pixel_values": batch("vit")[0]}], 1.0)

    def test_nothing_trainable(self):
        with pytest.raises(ValueError, match="no trainable parameters"):
            calibrate(build("vit").requires_grad_(False), 1.0)

    def test_nothing_to_quantise(self):
        model = nn.Linear(3, 2)
        with pytest.raises(ValueError, match="No operator of `model`"):
            calibrate_activations(model, [torch.ones(2, 3)], 1.0, loss=lambda m, x: m(x).sum())

    def test_bits_by_unknown_kind(self):
        with pytest.raises(ValueError, match="operator kinds"):
            ActivationQuantizationConfig(bits={"vit.layernorm:norms": 4})
