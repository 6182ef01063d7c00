"""What only a CUDA device shows: whole training steps, that they wait for nothing and can be captured and compiled, what
kernels allocate, what a smaller batch compiles. The kernels themselves are compared with the reference in
`tests/activations/test_triton.py`, which runs them on the device where there is one."""

import contextlib
from collections.abc import Callable

import families
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_s2a import ActivationQuantizationConfig, S2AConfig, quantize_activations
from peft_s2a.activations.ops import op_set
from peft_s2a.memory.methods import lora


pytestmark = pytest.mark.cuda
needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # what is not about the device is kept up to date without one


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "stock": lambda model: model,  # were it to wait, or fail, it would not be for this package
    "s2a": lambda model: get_peft_model(model, S2AConfig(init_weights=False)),
    "ladder": lambda model: get_peft_model(model, S2AConfig(structures=("side",), side_mode="ladder")),
    "lora": lambda model: quantize_activations(lora(model)),
    "full": quantize_activations,
}
each_method = pytest.mark.parametrize("method", METHODS)
each_family = pytest.mark.parametrize("family", ["vit", "swin", "resnet", "convnext"])
each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def autocast(precision: str):
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(DEVICE, torch.bfloat16)


def build(family: str, method: str) -> nn.Module:
    base = families.build(family, 0)
    base.config.problem_type = "single_label_classification"  # which the first call would find out, and note
    torch.manual_seed(1)
    model = METHODS[method](base).to(DEVICE).train()
    for module in model.modules():  # what is drawn would differ between two models
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model


def batch(family: str, size: int = 4, seed: int = 1) -> dict[str, Tensor]:
    images, labels = families.batch(family, size, seed)
    return {"pixel_values": images.to(DEVICE), "labels": labels.to(DEVICE)}


def training_step(model: nn.Module, given: dict[str, Tensor], precision: str = "fp32") -> Callable[[], Tensor]:
    """A whole step on what ``given`` holds when it is called; its loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision):
            loss = model(**given).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def loss_and_gradients(backend: str, precision: str, size: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one training step of a small ViT, the same for all backends but for quantisation."""
    config = S2AConfig(init_weights=False, activation_quantization=ActivationQuantizationConfig(backend=backend))
    base = families.build("vit", 0)
    torch.manual_seed(1)
    model = get_peft_model(base, config).to(DEVICE).train()
    with autocast(precision):
        loss = model(**batch("vit", size)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@each_precision
def test_a_training_step_is_the_references(precision):
    (our_loss, ours), (their_loss, theirs) = (loss_and_gradients(b, precision) for b in ("auto", "reference"))
    assert torch.isfinite(our_loss) and ours.keys() == theirs.keys()
    assert torch.allclose(our_loss, their_loss, rtol=1e-5 if precision == "fp32" else 1e-2)
    ours, theirs = (torch.cat([g.flatten().float() for g in grads.values()]) for grads in (ours, theirs))
    assert torch.cosine_similarity(ours, theirs, dim=0) > (0.9999 if precision == "fp32" else 0.995)


@needs_device
@each_precision
@each_method
@each_family
def test_no_step_waits_for_the_device(family, method, precision):
    step = training_step(build(family, method), batch(family), precision)
    for _ in range(3):  # kernels are tuned, plans made, and the first call is looked at
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_device
@each_precision
@each_method
@each_family
def test_a_whole_step_is_captured_and_replayed(family, method, precision):
    """A CUDA graph of a step, replayed on other images, trains as steps without it do."""
    batches = [batch(family, seed=seed) for seed in range(5)]
    plain, given = build(family, method), {name: x.clone() for name, x in batches[0].items()}
    captured = build(family, method)
    step = training_step(captured, given, precision)
    others = torch.cuda.Stream()
    others.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(others):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(others)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    ours = []
    for images in batches:
        for name, x in images.items():
            given[name].copy_(x)
        graph.replay()
        ours.append(loss.item())
    theirs = [training_step(plain, images, precision)().item() for images in [batches[0]] * 3 + batches][3:]
    torch.testing.assert_close(ours, theirs, rtol=1e-3 if precision == "fp32" else 3e-2, atol=1e-4)
    assert len(set(theirs)) == len(theirs), "nothing was learned"


@needs_device
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@each_family
def test_compiled_it_trains_as_it_does_eagerly(family, mode):
    """With CUDA graphs (``reduce-overhead``) none is left out."""
    from torch._dynamo.utils import counters

    batches = [batch(family, seed=seed) for seed in range(5)]
    plain, compiled = build(family, "s2a"), build(family, "s2a")
    counters.clear()
    faster = torch.compile(compiled, mode=mode, fullgraph=True)
    ours = [training_step(faster, images)().item() for images in batches]
    theirs = [training_step(plain, images)().item() for images in batches]
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["inductor"]["cudagraph_skips"]


@needs_device
def test_a_smaller_batch_compiles_and_tunes_nothing():
    import triton

    from peft_s2a.activations.backends import triton_kernels

    loss_and_gradients("triton", "bf16")
    tuned = [kernel for kernel in vars(triton_kernels).values() if isinstance(kernel, triton.runtime.Autotuner)]
    before = [len(kernel.cache) for kernel in tuned]
    compiled = []
    triton.knobs.compilation.listener = lambda **event: compiled.append(event["metadata"]["name"])
    try:
        loss_and_gradients("triton", "bf16", size=4)
    finally:
        triton.knobs.compilation.listener = None
    assert not compiled and before == [len(kernel.cache) for kernel in tuned]


def peak_above(call: Callable[[], object]) -> int:
    """The most bytes that a call had allocated besides its results; kernels are compiled before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - start
    assert results is not None
    return torch.cuda.max_memory_allocated() - start - kept


@needs_device
def test_kernels_allocate_no_temporaries_of_the_inputs_size():
    x, calls = calls_of_kernels(rows=32768, tokens=512, count=768, heads=12)
    for name, call in calls.items():
        assert peak_above(call) < x.nbytes // 8, name


def test_each_of_these_kernels_runs():
    """Under Triton's interpreter where there is no device."""
    _, calls = calls_of_kernels(rows=32, tokens=16, count=64, heads=2)
    for name, call in calls.items():
        results = call()
        assert all(x.numel() for x in (results if isinstance(results, (tuple, list)) else [results])[:2]), name


def calls_of_kernels(rows: int, tokens: int, count: int, heads: int) -> tuple[Tensor, dict[str, Callable[[], object]]]:
    """The tensor that ops get, and calls of those whose kernels are to allocate little beside their results."""
    ops = op_set("triton")
    x, weight = torch.randn(rows, count, device=DEVICE), torch.ones(count, device=DEVICE)
    by_head = x.view(rows // tokens, tokens, heads, count // heads).transpose(1, 2)
    levels = torch.linspace(0, 1, 16).tolist()
    normed = ops.encode_norm(x, 1e-5, True, True, 4, count, None)
    coded = list(ops.encode_heads(by_head, 4, 32, True, True, None))
    packed = ops.encode_steps(x.view(-1), levels[1:], list(range(16)), 4)
    return x, {
        "encode_steps": lambda: ops.encode_steps(x.view(-1), levels[1:], list(range(16)), 4),
        "scale_by_levels": lambda: ops.scale_by_levels(x.view(-1), packed, levels, 4),
        "encode_norm": lambda: ops.encode_norm(x, 1e-5, True, True, 4, count, None),
        "norm_backward": lambda: ops.norm_backward(x, *normed, weight, True, 4, count, [True] * 3),
        "encode_heads": lambda: ops.encode_heads(by_head, 4, 32, True, True, None),
        "attention_backward": lambda: ops.attention_backward(
            by_head, coded, coded, coded, None, False, 0.125, 4, 32, count // heads, False
        ),
    }
