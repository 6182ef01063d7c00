"""Whatever goes wrong in a step, the next one is right: bit for bit what it is without the fault."""

from __future__ import annotations

import copy
import gc
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import DataLoader, Dataset

from peft_s2a import S2AConfig, quantize_activations
from peft_s2a.activations.plans.trace import is_recording
from peft_s2a.activations.wrap import unplanned


WIDTH, TOKENS = 16, 5
ERRORS = (RuntimeError, MemoryError, KeyboardInterrupt, torch.OutOfMemoryError)
CONFIGS = {"whole": {"mlp_tiles": 1}, "tiles": {"mlp_tiles": 2}, "reference": {"backend": "reference"}}


class Bomb(nn.Module):
    """Raises when it is told to."""

    error: type[BaseException] | None = None

    def forward(self, x):
        if self.error is not None:
            raise self.error("a fault")
        return x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.act, self.bomb, self.drop = nn.GELU(), Bomb(), nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.drop(self.fc2(self.bomb(self.act(self.fc1(self.norm2(x))))))


def make(config: str | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), Block())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    return model if config is None else quantize_activations(model, CONFIGS[config])


def step(model: nn.Module, batch: int = 4, seed: int = 1) -> list[torch.Tensor]:
    """The result and the gradients of one step."""
    torch.manual_seed(seed)
    model.zero_grad()
    y = model(torch.randn(batch, TOKENS, WIDTH))
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(map(torch.equal, ours, theirs))


def assert_nothing_left_behind() -> None:
    assert not _get_current_function_mode_stack() and torch.is_grad_enabled() and not is_recording()
    assert sys.getprofile() is None and gc.isenabled()


class Fault:
    """Raises ``error`` at the ``at``-th call of an operator that Python makes inside; counts them in ``count``."""

    def __init__(self, error: type[BaseException] | None = None, at: int = -1) -> None:
        self.error, self.at, self.count = error, at, 0

    def __enter__(self) -> Fault:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_) -> None:
        sys.setprofile(None)

    def _note(self, frame, event, function) -> None:
        if event == "c_call" and _is_operator(function):
            self.count += 1
            if self.count - 1 == self.at:
                raise self.error("a fault")


def _is_operator(function) -> bool:
    name = getattr(function, "__module__", None) or ""
    return name.startswith(("torch._C._nn", "torch._ops.aten", "torch._ops.s2a")) or getattr(
        function, "__qualname__", ""
    ).startswith(("_VariableFunctionsClass.", "Tensor.add", "Tensor.view", "Tensor.transpose"))


@pytest.fixture(scope="module")
def clean() -> Callable[[str], tuple[list, list, dict]]:
    """What two steps give without a fault, and what runs without a plan."""
    known: dict[str, tuple] = {}

    def of(config: str) -> tuple[list, list, dict]:
        if config not in known:
            model = make(config)
            known[config] = step(model), step(model, seed=2), unplanned(model)
        return known[config]

    return of


@pytest.mark.parametrize("config", ["tiles"])
@pytest.mark.parametrize("error", ERRORS)
class TestExceptions:
    def test_in_the_first_call_while_a_block_is_observed(self, error, config, clean):
        model = make(config)
        model[2].bomb.error = error
        with pytest.raises(error, match="a fault"):
            step(model)
        model[2].bomb.error = None
        self.check(model, config, clean)

    def test_in_a_later_forward(self, error, config, clean):
        model = make(config)
        step(model)
        model[1].bomb.error = error
        with pytest.raises(error, match="a fault"):
            step(model)
        model[1].bomb.error = None
        self.check(model, config, clean)

    def test_in_hooks(self, error, config, clean):
        def fail(*_):
            raise error("a fault")

        model = make(config)
        step(model)
        for register in (
            model[2].fc1.register_forward_hook,
            model[1].register_forward_pre_hook,
            model[2].bomb.register_full_backward_hook,
            model[1].norm1.bias.register_hook,
        ):
            handle = register(fail)
            with pytest.raises(error, match="a fault"):
                step(model)
            handle.remove()
        self.check(model, config, clean)

    def check(self, model, config, clean):
        first, second, reasons = clean(config)
        assert_equal(step(model), first)
        assert_equal(step(model, seed=2), second)
        assert unplanned(model) == reasons
        assert_nothing_left_behind()


@pytest.mark.parametrize("config", CONFIGS)
def test_at_any_operator_of_a_step(config, clean):
    """In forward, in backward, in a tile: wherever Python calls one."""
    first, second, reasons = clean(config)
    model = make(config)
    step(model)
    with Fault() as counted:
        step(model)
    assert counted.count > 20
    for at in range(0, counted.count, max(1, counted.count // 60)):
        error = ERRORS[at % len(ERRORS)]
        with pytest.raises(error, match="a fault"), Fault(error, at):
            step(model)
        assert_equal(step(model), first)
    assert_equal(step(model, seed=2), second)
    assert unplanned(model) == reasons
    assert_nothing_left_behind()


def _first_calls(config, clean, times: int) -> None:
    first, second, reasons = clean(config)
    with Fault() as counted:
        step(make(config))
    for at in range(times):
        model = make(config)
        with pytest.raises(KeyboardInterrupt), Fault(KeyboardInterrupt, (2 * at + 1) * counted.count // (2 * times)):
            step(model)
        assert_equal(step(model), first)
        assert_equal(step(model, seed=2), second)
        assert unplanned(model) == reasons
        assert_nothing_left_behind()


def test_while_plans_are_made(clean):
    _first_calls("tiles", clean, 3)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_at_many_places_while_plans_are_made(config, clean):
    _first_calls(config, clean, 60)


@pytest.mark.parametrize("config", ["tiles", "reference"])
def test_out_of_memory_then_a_smaller_batch(config):
    model, expected = make(config), make(config)
    step(model, batch=8)
    with pytest.raises(torch.OutOfMemoryError), Fault(torch.OutOfMemoryError, 10):
        step(model, batch=8)
    assert_equal(step(model, batch=4), step(expected, batch=4))


@pytest.mark.parametrize("config", CONFIGS)
def test_backward_twice_is_the_stock_error(config):
    def message(model):
        loss = model(torch.ones(4, TOKENS, WIDTH)).square().sum()
        loss.backward()
        with pytest.raises(RuntimeError) as error:
            loss.backward()
        return str(error.value)

    model = make(config)
    assert message(model) == message(model) == message(make(None))
    assert "backward through the graph a second time" in message(model)


@pytest.mark.parametrize("config", CONFIGS)
def test_retained_graph_gives_the_same_twice(config):
    model = make(config)
    for _ in range(2):
        loss = model(torch.ones(4, TOKENS, WIDTH)).square().sum()
        trained = [p for p in model.parameters() if p.requires_grad]
        one = torch.autograd.grad(loss, trained, retain_graph=True)
        assert_equal(list(one), list(torch.autograd.grad(loss, trained)))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
class TestGrowth:
    @pytest.mark.parametrize("times", [300, pytest.param(1000, marks=pytest.mark.slow)])
    def test_forward_without_backward_many_times(self, times):
        model, x = make("tiles"), torch.randn(64, TOKENS, WIDTH)
        kept = []
        for count in (50, times):
            for _ in range(count):
                model(x)
            gc.collect()
            kept.append(_resident())
        # what one of these passes keeps, kept as often, would be 15 MiB and more
        assert kept[1] - kept[0] < 8 * 2**20

    @pytest.mark.slow
    def test_ten_thousand_steps(self):
        model = make("tiles")
        for seed in range(500):
            step(model, batch=3 + seed % 5, seed=seed)
        gc.collect()
        before, objects = _resident(), len(gc.get_objects())
        for seed in range(10_000):
            step(model, batch=3 + seed % 5, seed=seed)
        gc.collect()
        assert _resident() - before < 8 * 2**20 and len(gc.get_objects()) - objects < 1000


@pytest.mark.parametrize("config", ["tiles", "reference"])
def test_inference_mode_then_training(config, clean):
    model = make(config)
    with torch.inference_mode():
        model(torch.ones(4, TOKENS, WIDTH))
        model.eval()(torch.ones(4, TOKENS, WIDTH))
    model.train()
    assert_equal(step(model), clean(config)[0])
    with torch.inference_mode():
        model(torch.ones(4, TOKENS, WIDTH))
    assert_equal(step(model, seed=2), clean(config)[1])


class Steps(Dataset):
    """Its items are what steps of a model give, made in a worker."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.cat([x.flatten() for x in step(self.model, seed=1 + index)])


def _check_workers(method: str, first: list, second: list) -> None:
    model = make("tiles")
    assert_equal(step(model), first)
    loader = DataLoader(Steps(model), batch_size=None, num_workers=1, multiprocessing_context=method, timeout=200)
    for item, expected in zip(loader, (first, second), strict=True):
        # a worker has one thread, and sums in another order than more
        torch.testing.assert_close(item, torch.cat([x.flatten() for x in expected]), rtol=1e-4, atol=1e-5)
    assert_equal(step(model), first)


def test_forked_workers_that_use_the_model(clean):
    """After kernels were loaded and plans made here."""
    _check_workers("fork", *clean("tiles")[:2])


@pytest.mark.slow
def test_spawned_workers_that_use_the_model(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_faults import _check_workers, make, step
if __name__ == "__main__":
    model = make("tiles")
    _check_workers("spawn", step(model), step(model, seed=2))
""")
    subprocess.run([sys.executable, str(script)], check=True, timeout=500)


@pytest.mark.parametrize("config", ["tiles", "reference"])
def test_a_whole_model_saved_in_training(config, clean):
    model, buffer = make(config), io.BytesIO()
    step(model)
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (loaded, copy.deepcopy(model), model):
        assert_equal(step(other), clean(config)[0])
        assert_equal(step(other, seed=2), clean(config)[1])


@pytest.mark.parametrize("config", ["tiles"])
def test_batches_of_another_size_every_step(config):
    """More sizes than there are plans for, an empty batch, and one sample."""
    model, stock = make(config), make(None)
    for seed, batch in enumerate((4, 1, 0, 2, 7, 5, 0, 3, 6, 8, 9, 10, 4)):
        ours, theirs = step(model, batch, seed), step(stock, batch, seed)
        assert torch.allclose(ours[0], theirs[0], atol=1e-5)
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).norm() <= 0.2 * other.norm() + 0.02 * theirs[1].norm()


def test_images_of_another_size_every_step():
    def build():
        torch.manual_seed(0)
        parts = [
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1))
            for _ in range(2)
        ]
        return nn.Sequential(nn.Conv2d(3, 8, 3), *parts)

    stock, model = build(), quantize_activations(build(), {"bits": 8})
    for seed, size in enumerate(
        ((9, 9), (12, 7), (5, 5), (9, 9), (33, 3), (8, 16), (7, 7), (6, 6), (10, 10), (11, 11))
    ):
        x = torch.randn(2 + seed % 3, 3, *size, generator=torch.Generator().manual_seed(seed))
        grads = []
        for each in (stock, model):
            each.zero_grad()
            each(x).square().sum().backward()
            grads.append(torch.cat([p.grad.flatten() for p in each.parameters()]))
        assert torch.cosine_similarity(*grads, dim=0) > 0.999


def _with_adapters(kind: str) -> nn.Module:
    import families  # not above: spawned workers import this module, and need none of it

    torch.manual_seed(0)
    config = (
        (lambda: LoraConfig(r=2, target_modules=["q_proj", "fc1", "query", "dense"], init_lora_weights=False))
        if kind == "lora"
        else (lambda: S2AConfig(init_weights=False, activation_quantization={"bits": 8}))
    )
    model = get_peft_model(families.FAMILIES["vit"](), config(), "first")
    model.add_adapter("second", config())
    model.set_adapter("first")
    return model


@pytest.mark.parametrize("kind", ["s2a", "lora"])
def test_adapters_switched_between_forward_and_backward(kind):
    """Autograd gives nothing to parameters that need no gradient any more, and nothing to the adapter that did not run."""
    model = _with_adapters(kind)
    x = torch.randn(2, 3, 32, 32)

    def grads(switch: bool) -> dict[str, torch.Tensor]:
        model.set_adapter("first")
        model.zero_grad()
        loss = model(pixel_values=x).logits.square().sum()
        if switch:
            model.set_adapter("second")
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    for _ in range(2):
        expected, switched = grads(False), grads(True)
        assert expected and switched.keys() <= expected.keys()
        assert all(torch.equal(expected[name], grad) for name, grad in switched.items())
        assert any("first" in name for name in expected) and not any("first" in name for name in switched)


@pytest.mark.parametrize("config", ["tiles", "reference"])
def test_half_and_back_and_meta_and_back(config, clean):
    model = make(config)
    weights = copy.deepcopy(model.state_dict())
    step(model)
    model.half()
    model(torch.randn(4, TOKENS, WIDTH).half()).float().sum().backward()
    model.float().load_state_dict(weights)
    assert_equal(step(model), clean(config)[0])
    model.to("meta")
    assert model(torch.empty(4, TOKENS, WIDTH, device="meta")).is_meta
    model.to_empty(device="cpu").load_state_dict(weights)
    assert_equal(step(model), clean(config)[0])
    assert_equal(step(model, seed=2), clean(config)[1])


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic"}])
def test_same_seed_same_adapter_bit_for_bit(options):
    def trained() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = quantize_activations(make(None), {**CONFIGS["tiles"], **options})
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-2)
        for seed in range(5):
            step(model, seed=seed)
            optimizer.step()
        return [p.detach() for p in model.parameters() if p.requires_grad]

    assert_equal(trained(), trained())
