"""What code of users' does that a recording of it would miss: outputs, gradients and what is left behind are stock's."""

import copy
import functools
import logging
import types
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_s2a import quantize_activations
from peft_s2a.activations.plans import planner
from peft_s2a.activations.wrap import unplanned


WIDTH = 16
SIZES = (6, 6, 6, 4, 6, 2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.act = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU()
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH)

    def mlp(self, x):
        return self.fc2(self.act(self.fc1(self.norm(x))))

    def forward(self, x):
        return x + self.mlp(x) * self.factor()

    def factor(self):
        return 1.0

    def before(self, step):
        """What somebody does between two steps."""

    def left(self):
        """What is left behind."""


def step_of(model, x, run):
    torch.manual_seed(0)
    y = run(model, x)
    (y.square().mean() + y.mean()).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    for tensor in (y, *gradients, *model.buffers()):
        assert type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
    return y.detach(), torch.cat([g.flatten() for g in gradients])


def check(kind, tiles, run=lambda model, x: model(x), trained="bias", depth=2):
    torch.manual_seed(0)
    stock = nn.Sequential(*(kind() for _ in range(depth))).train()
    for name, parameter in stock.named_parameters():
        parameter.requires_grad = trained in name
    quantized = quantize_activations(copy.deepcopy(stock), {"bits": 8, "mlp_tiles": tiles})
    for step, size in enumerate(SIZES):
        x, seen = torch.randn(size, 5, WIDTH), []
        for model in (stock, quantized):
            model.zero_grad()
            for block in model:
                block.before(step)
            seen.append((*step_of(model, x, run), [block.left() for block in model]))
        (output, gradient, left), (other_output, other_gradient, other_left) = seen
        torch.testing.assert_close(other_output, output, rtol=1e-3, atol=1e-4)
        assert F.cosine_similarity(gradient, other_gradient, dim=0) > 0.99
        assert other_gradient.norm() / gradient.norm() == pytest.approx(1, abs=0.05)
        assert left == other_left
    return quantized


class Untied(Block):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.one.weight

    def factor(self):
        return F.linear(self.one.bias, self.other.weight)

    def before(self, step):
        if step == 3:
            self.other.weight = nn.Parameter(2 * self.one.weight.detach() + 1, requires_grad=False)


class Optional(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", None)
        self.register_parameter("gamma", None)

    def factor(self):
        return (1 if self.mask is None else self.mask) * (1 if self.gamma is None else self.gamma)


class MaskSet(Optional):
    def before(self, step):
        if step in (2, 3):
            self.mask = torch.linspace(0, step, WIDTH)


class MaskTakenAway(Optional):
    def before(self, step):
        self.mask = torch.linspace(0, 1, WIDTH) if step < 3 else None


class ParameterSet(Optional):
    def before(self, step):
        if step == 3:
            self.gamma = nn.Parameter(torch.linspace(0, 1, WIDTH))


class BiasTakenAway(Block):
    def before(self, step):
        if step == 3:
            self.fc1.bias = None


class ChildRenamed(Block):
    def mlp(self, x):
        return self.fc2(self.act((self.fc1 if hasattr(self, "fc1") else self.fc3)(self.norm(x))))

    def before(self, step):
        if step == 3:
            self.fc3 = self.fc1
            del self.fc1


class ParameterRenamed(Block):
    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(WIDTH))

    def factor(self):
        return self.one if "one" in self._parameters else self.two

    def before(self, step):
        if step == 3:
            self.two = self.one
            del self.one


class Doubling(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * result.as_subclass(torch.Tensor) if function is F.linear else result


class BecomesASubclass(Block):
    def before(self, step):
        if step == 3:
            self.fc1.weight = nn.Parameter(self.fc1.weight.detach().as_subclass(Doubling), requires_grad=False)


class ParameterWithAnAttribute(Block):
    def factor(self):
        return self.fc2.weight.scale

    def before(self, step):
        self.fc2.weight.scale = 1.0 if step < 3 else 3.0


class Average(Block):
    """A buffer that another takes the place of, where most code writes into it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x):
        h = self.mlp(x)
        self.average = 0.9 * self.average + 0.1 * h.detach().mean((0, 1))
        return x + h - self.average


class StopsHalfway(Block):
    """No recording gets beyond the question, while a flag is changed."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        before = self.dropout.training
        self.dropout.eval()
        target = self.dropout(self.mlp(x)).detach()
        if target.abs().max() > 1e4:
            target = target.clamp(-1e4, 1e4)
        self.dropout.train(before)
        return x + self.dropout(self.mlp(x)) + 0.1 * target

    def left(self):
        return self.dropout.training


class ReadsAGradient(Block):
    def factor(self):
        return self.fc2.weight.grad.mean()

    def before(self, step):
        self.fc2.weight.grad = torch.full_like(self.fc2.weight, 1.0 + step)


class Bank(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.temperature, self.calls = 1.0, 0


class Outside(Block):
    def __init__(self):
        super().__init__()
        self.bank = [Bank()]

    def left(self):
        return int(self.bank[0].count), self.bank[0].calls


class ReadsOutside(Outside):
    def factor(self):
        return self.bank[0].temperature

    def before(self, step):
        self.bank[0].temperature = 1.0 if step < 3 else 3.0


class CountsOutside(Outside):
    def factor(self):
        self.bank[0].calls += 1
        return 1.0


class WritesOutside(Outside):
    def factor(self):
        self.bank[0].count.add_(1)
        return 1.0


BANK = Bank()


class ReadsByReference(Block):
    def __init__(self):
        super().__init__()
        self.bank = weakref.ref(BANK)

    def factor(self):
        return self.bank().temperature

    def before(self, step):
        BANK.temperature = 1.0 if step < 3 else 3.0


class Namespaces(Block):
    def __init__(self):
        super().__init__()
        self.settings = types.SimpleNamespace(model=types.SimpleNamespace(scale=1.0))

    def factor(self):
        return self.settings.model.scale

    def before(self, step):
        self.settings.model.scale = 1.0 if step < 3 else 3.0


class Schedule:
    value = 1.0


class OfItsClass(Block):
    schedule: Any = Schedule()

    def factor(self):
        return self.schedule.value

    def before(self, step):
        self.schedule.value = 1.0 if step < 3 else 3.0


class AClass(OfItsClass):
    schedule = type("Schedule", (Schedule,), {})


class AClassOfItsOwn(OfItsClass):
    def __init__(self):
        super().__init__()
        self.schedule = Schedule


class AModule(OfItsClass):
    schedule = types.ModuleType("schedules")


class State(dict):
    value = 1.0


class ADictWithAttributes(OfItsClass):
    def __init__(self):
        super().__init__()
        self.schedule = State()


class Scaled(nn.GELU):
    gain = 1.0


class ReducedNames(Block):
    """Blocks that differ in an attribute whose name is put together."""

    number = 0

    def __init__(self):
        super().__init__()
        ReducedNames.number += 1
        self.act = Scaled()
        self.act.gain = 1.0 + 2 * (ReducedNames.number % 2)

    def factor(self):
        return functools.reduce(getattr, "act.gain".split("."), self)


class LocalGenerator(Block):
    def factor(self):
        return torch.rand(5, 1, generator=torch.Generator().manual_seed(7))


class Seeded(Block):
    def factor(self):
        with torch.random.fork_rng([]):
            torch.manual_seed(7)
            return torch.rand(5, 1)


class HoldsGradients(Block):
    def __init__(self):
        super().__init__()
        self.gradients = []

    def factor(self):
        factor = self.fc1.bias.sum() + 1
        factor.register_hook(self.gradients.append)
        return factor

    def left(self):
        return [type(gradient) for gradient in self.gradients]


class CountsGradients(HoldsGradients):
    count = 0

    def factor(self):
        factor = self.fc1.bias.sum() + 1
        factor.register_hook(self.add)
        return factor

    def add(self, gradient):
        self.count += 1

    def left(self):
        return self.count


class Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, block):
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return x + block.mlp(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = x + ctx.block.mlp(x)
        torch.autograd.backward(y, gradient)
        return x.grad, None, None


class AddsGradients(Block):
    def forward(self, x):
        return Reversible.apply(x, self.fc1.bias, self)


@functools.cache
def positions(shape):
    return torch.linspace(0, 1, shape[1])[:, None]


class CachedByShape(Block):
    def forward(self, x):
        return x + self.mlp(x) * positions(tuple(x.shape))


class AddedToAProduct(Block):
    def forward(self, x):
        h = self.act(self.fc1(self.norm(x)))
        return torch.addmm(x.reshape(-1, WIDTH), h.flatten(0, 1), self.fc2.weight.t()).view_as(x) + self.fc2.bias


class NormalisesGradients(Block):
    def forward(self, x):
        h = self.mlp(x)
        h.register_hook(lambda gradient: gradient / gradient.norm())
        return x + h


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(0, keepdim=True)


class CentresGradients(Block):
    def forward(self, x):
        return x + Centred.apply(self.mlp(x))


class DropsTokens(Block):
    """But never the class token."""

    def forward(self, x):
        kept = torch.ones(*x.shape[:2], 1)
        kept[:, 1:].bernoulli_(0.5)
        return x + self.mlp(x) * kept


class DrawsOver(Block):
    def forward(self, x):
        drawn = torch.full((len(x), 1, 1), 0.25)
        before = drawn * 1.0
        drawn.bernoulli_(0.5)
        return x + self.mlp(x) * (drawn + before)


KINDS = [
    Untied, MaskSet, MaskTakenAway, ParameterSet, BiasTakenAway, ChildRenamed, ParameterRenamed, BecomesASubclass,
    ParameterWithAnAttribute, Average, StopsHalfway, ReadsAGradient, ReadsOutside, CountsOutside, WritesOutside,
    ReadsByReference, Namespaces, OfItsClass, AClass, AClassOfItsOwn, AModule, ADictWithAttributes, ReducedNames,
    LocalGenerator, Seeded, HoldsGradients, CountsGradients, AddsGradients, CachedByShape, AddedToAProduct,
    NormalisesGradients, CentresGradients, DropsTokens, DrawsOver,
]  # fmt: skip


# In the usual run each kind in one piece or in tiles, in turn; most have the same cause in both.
IN_TURN = [
    pytest.param(kind, tiles, marks=pytest.mark.slow if (tiles == 1) == (index % 2 == 1) else ())
    for index, kind in enumerate(KINDS)
    for tiles in (1, 3)
]


@pytest.mark.parametrize(("kind", "tiles"), IN_TURN)
def test_steps_are_stock(kind, tiles):
    for holder in (BANK, Schedule, AModule.schedule, AClass.schedule, OfItsClass.schedule):
        holder.value = holder.temperature = 1.0
    positions.cache_clear()
    check(kind, tiles, depth=3 if kind is ReducedNames else 2)  # the first one's argument has no gradient


class ReturnsTheBatchSize(Block):
    def forward(self, x):
        return x + self.mlp(x), x.shape[0]


class ReturnsANumber(Block):
    def forward(self, x):
        return x + self.mlp(x), torch.zeros(())


@pytest.mark.parametrize("tiles", [1, 3])
def test_results_that_are_no_tensors(tiles):
    def run(model, x):
        for block in model:
            x, count = block(x)
        return x * count

    check(ReturnsTheBatchSize, tiles, run)


@pytest.mark.parametrize("tiles", [1, 3])
def test_callers_add_to_a_result_that_is_the_same_at_every_call(tiles):
    def run(model, x):
        losses = []
        for block in model:
            x, loss = block(x)
            losses.append(loss.add_(0.5))
        return x + losses[0]

    check(ReturnsANumber, tiles, run)


class ReadsAnAttribute(Block):
    def forward(self, x):
        return x + self.mlp(x) * getattr(x, "scale", 1.0)


class ReadsFromAPlaceOn(Block):
    def forward(self, x):
        return self.mlp(torch.as_strided(x, (len(x), 4, WIDTH), x.stride(), x.storage_offset() + WIDTH))


def test_arguments_with_attributes():
    def run(model, x):
        for block in model:
            x.scale = 3.0
            x = block(x)
        return x

    check(ReadsAnAttribute, 1, run)


def test_arguments_that_lie_within_others():
    check(ReadsFromAPlaceOn, 1, lambda model, x: model[0](torch.cat([x, 2 * x], 1)[:, 3:8]))


def test_weights_that_are_computed_once_for_several_calls():
    class Parametrised(Block):
        def __init__(self):
            super().__init__()
            torch.nn.utils.parametrizations.weight_norm(self.fc1)

    def run(model, x):
        with torch.nn.utils.parametrize.cached():
            return model(model(x))

    check(Parametrised, 1, run, trained="")


def test_random_numbers_from_a_generator_made_on_the_spot():
    class Permutes(Block):
        def factor(self):
            return torch.from_numpy(np.random.default_rng().permutation(5))[:, None]

    model, x = quantize_activations(nn.Sequential(Permutes(), Permutes())), torch.randn(4, 5, WIDTH)
    assert len({model(x).sum().item() for _ in range(6)}) > 1


def test_what_is_logged(caplog):
    class Logs(Block):
        def factor(self):
            logging.getLogger("somebody").info("called")
            return 1.0

    with caplog.at_level(logging.INFO, "somebody"):
        model = check(Logs, 1)
    assert len(caplog.records) == 2 * 2 * len(SIZES)
    assert "log" in unplanned(model)["0"]


def test_attributes_that_change_at_every_step_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(planner, "_RECORDINGS", 4)
    monkeypatch.setattr(planner, "_ENTRIES", 3)

    class Anneals(Block):
        rate = 1.0

        def factor(self):
            return self.rate

    model = quantize_activations(nn.Sequential(Anneals(), Anneals()))
    for step in range(8):
        for block in model:
            block.rate = 1 / (step + 1)
        model(torch.randn(2, 5, WIDTH)).sum().backward()
    store = model[0]._activation_settings.planner.store
    assert all(len(entries) <= 3 for entries in store.entries.values())
    assert "too often" in unplanned(model)["0"]
