"""The state of a forward pass belongs to the pass: models shared by threads, called within calls, and interrupted."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable

import families
import pytest
import torch
from methods import IMAGES, LABELS, S2A, base_model, logits, make_config
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_s2a import S2AConfig


# Prompts, branches around an MLP split over two siblings (BEiT), norms of the model's own class, and a ladder.
SHARED = {
    **{f"vit, {method}": ("vit", lambda method=method: make_config(method, random_start=True)) for method in S2A},
    "vit, quantised": ("vit", lambda: S2AConfig(init_weights=False)),
    "beit": ("beit", lambda: S2AConfig(init_weights=False)),
    "convnext": ("convnext", lambda: S2AConfig(init_weights=False)),
    "resnet": ("resnet", lambda: S2AConfig(init_weights=False, freeze_batch_norm_stats=False)),
    "swin, ladder": ("swin", lambda: make_config("s2a_ladder", random_start=True)),
}
WITH_STATE = ("vit, s2a", "vit, s2a_ladder", "vit, quantised", "beit")
THREADS, CALLS = 4, 6


def in_threads(*work: Callable[[], object]) -> list:
    """Runs all of `work` at once and returns what they return; an exception in one of them is raised here."""
    results: list = [None] * len(work)
    start = threading.Barrier(len(work))

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = work[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.fixture
def _switch_often():
    """Threads take turns every few microseconds, so that those that get into each other's way do so at once."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_weights(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())


@pytest.mark.usefixtures("_switch_often")
@pytest.mark.parametrize("case", SHARED)
def test_threads_share_a_model(case):
    family, make = SHARED[case]
    model = get_peft_model(families.build(family), make()).eval()
    batches = [families.batch(family, size=index + 1, seed=index)[0] for index in range(THREADS)]
    with torch.no_grad():
        expected = [families.logits(model, images) for images in batches]
    before = weights(model)

    def serve(images: torch.Tensor, wanted: torch.Tensor) -> int:
        with torch.no_grad():
            return sum(torch.equal(families.logits(model, images), wanted) for _ in range(CALLS))

    right = in_threads(*(lambda b=b, e=e: serve(b, e) for b, e in zip(batches, expected)))
    assert right == [CALLS] * THREADS
    assert_equal_weights(model, before)


@pytest.mark.usefixtures("_switch_often")
def test_threads_serve_models_that_share_a_base():
    """As a server does that holds one backbone for several tasks: copies of the modules around the same parameters."""
    base = base_model()
    parameters = {id(parameter): parameter for parameter in base.parameters()}
    models = [
        get_peft_model(copy.deepcopy(base, memo=dict(parameters)), make_config(method, random_start=True)).eval()
        for method in S2A
    ]
    shared = {id(parameter) for parameter in base.vit.parameters()}
    assert all(shared <= {id(parameter) for parameter in model.parameters()} for model in models)
    expected, before = [logits(model) for model in [base, *models]], weights(base)
    assert len({tuple(output.flatten().tolist()) for output in expected}) == len(expected)

    def serve(model: nn.Module, wanted: torch.Tensor) -> int:
        return sum(torch.equal(logits(model), wanted) for _ in range(CALLS))

    right = in_threads(*(lambda m=m, e=e: serve(m, e) for m, e in zip([base, *models], expected)))
    assert right == [CALLS] * len(expected)
    assert_equal_weights(base, before)


@pytest.mark.usefixtures("_switch_often")
@pytest.mark.parametrize("method", S2A)
def test_one_thread_trains_while_another_serves(method):
    """Two adapters, each in a model of its own around the same base parameters."""
    base = base_model()
    parameters = {id(parameter): parameter for parameter in base.parameters()}
    trained, served = (
        get_peft_model(
            copy.deepcopy(base, memo=dict(parameters)), make_config(method, random_start=True, modules_to_save=[])
        ).eval()
        for _ in range(2)
    )

    def gradients() -> list[torch.Tensor]:
        loss = nn.functional.cross_entropy(families.logits(trained, IMAGES), LABELS)
        return torch.autograd.grad(loss, [p for p in trained.parameters() if p.requires_grad])

    expected, wanted = gradients(), logits(served)
    assert len(expected) > 0
    found, right = in_threads(
        lambda: [gradients() for _ in range(CALLS)],
        lambda: sum(torch.equal(logits(served), wanted) for _ in range(CALLS)),
    )
    assert right == CALLS
    assert all(torch.equal(a, b) for of_a_call in found for a, b in zip(of_a_call, expected))


class Failure(Exception):
    pass


INTERRUPTED = [(case, Failure) for case in WITH_STATE] + [("vit, s2a", KeyboardInterrupt), ("vit, s2a", MemoryError)]


@pytest.mark.parametrize(("case", "error"), INTERRUPTED)
def test_calls_that_are_interrupted_leave_nothing(case, error):
    family, make = SHARED[case]
    model = get_peft_model(families.build(family), make()).eval()
    images = families.batch(family)[0]
    with torch.no_grad():
        expected = families.logits(model, images)
    before = weights(model)
    leaves = [module for module in model.modules() if type(module) is nn.Linear or type(module) is nn.Conv2d]
    for leaf in leaves[:: max(1, len(leaves) // 4)]:

        def fail(*args):
            raise error

        hook = leaf.register_forward_pre_hook(fail)
        with torch.no_grad(), pytest.raises(error):
            families.logits(model, images)
        hook.remove()
        with torch.no_grad():
            assert torch.equal(families.logits(model, images), expected)
    assert_equal_weights(model, before)


@pytest.mark.parametrize("case", WITH_STATE)
def test_a_model_is_called_from_within_its_own_call(case):
    """As a user's hook does that compares features with those of another image."""
    family, make = SHARED[case]
    model = get_peft_model(families.build(family), make()).eval()
    images, other = families.batch(family, seed=1)[0], families.batch(family, size=2, seed=2)[0]
    with torch.no_grad():
        expected, expected_inside = families.logits(model, images), families.logits(model, other)
    inside = []

    def call_again(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if not busy:
            busy.append(True)
            inside.append(families.logits(model, other))
            busy.clear()

    busy: list[bool] = []
    stop = ("query", "q_proj", "key", "k_proj", "fc1", "dense", "convolution", "layernorm", "norm1")
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] in stop]
    hooks = [module.register_forward_hook(call_again) for module in found[:: max(1, len(found) // 6)]]
    with torch.no_grad():
        assert torch.equal(families.logits(model, images), expected)
    for hook in hooks:
        hook.remove()
    assert len(inside) > 2 and all(torch.equal(output, expected_inside) for output in inside)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [method for method in S2A if method != "s2a_ladder"])
def test_blocks_that_backward_runs_again(method, reentrant):
    model = get_peft_model(base_model(), make_config(method, random_start=True)).train()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    images = IMAGES.clone().requires_grad_()

    def gradients() -> dict[str, torch.Tensor | None]:
        loss = nn.functional.cross_entropy(families.logits(model, images), LABELS)
        model.zero_grad()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in parameters.items()}

    expected = gradients()
    for block in model.base_model.model.vit.layers:
        forward = block.forward
        block.forward = lambda *args, forward=forward, **kw: checkpoint(
            forward, *args, use_reentrant=reentrant, **({} if reentrant else kw)
        )
    found = gradients()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize(
    ("case", "recomputed"),
    [
        *((case, "nothing") for case in SHARED),
        *((case, way) for case in WITH_STATE if "ladder" not in case for way in ("blocks", "blocks, reentrant")),
    ],
)
def test_backward_in_another_thread(case, recomputed):
    """As on GPUs, of which each has a thread for its backward passes."""
    family, make = SHARED[case]

    def build() -> nn.Module:
        base = families.build(family)
        torch.manual_seed(0)
        model = get_peft_model(base, make()).train()
        if recomputed != "nothing":
            model.gradient_checkpointing_enable({"use_reentrant": recomputed.endswith("reentrant")})
        return model

    def steps(run_backward: Callable[[torch.Tensor], object]) -> list[torch.Tensor]:
        model, found = build(), []
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(parameters, 0.1)
        for seed in range(3):
            images, labels = families.batch(family, seed=seed)
            torch.manual_seed(seed)
            loss = nn.functional.cross_entropy(families.logits(model, images), labels)
            run_backward(loss)
            found += [
                loss.detach(),
                *(parameter.grad.clone() for parameter in parameters if parameter.grad is not None),
            ]
            optimizer.step()
            optimizer.zero_grad()
        return found

    ours, theirs = steps(lambda loss: in_threads(loss.backward)), steps(torch.Tensor.backward)
    assert len(ours) == len(theirs) > 6 and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("case", WITH_STATE)
def test_no_tensor_of_a_call_outlives_it(case):
    family, make = SHARED[case]
    model = get_peft_model(families.build(family), make()).eval()
    seen: list[weakref.ref] = []

    def remember(module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, torch.Tensor):
            seen.append(weakref.ref(output))

    for module in model.modules():
        module.register_forward_hook(remember)
    with torch.no_grad():
        families.logits(model, families.batch(family)[0])
    gc.collect()
    assert seen and not any(reference() is not None for reference in seen)
