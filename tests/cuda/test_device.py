"""What only a CUDA device shows: whole training steps, what kernels allocate, what a smaller batch compiles. The
kernels themselves are compared with the reference in `tests/activations/test_triton.py`, which runs them on the device
where there is one."""

import contextlib

import families
import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from peft_s2a import ActivationQuantizationConfig, S2AConfig
from peft_s2a.activations import ops


pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"


def autocast(precision: str):
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(DEVICE, torch.bfloat16)


def step(backend: str, precision: str, batch: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one training step of a small ViT, the same for all backends but for quantisation."""
    config = S2AConfig(init_weights=False, activation_quantization=ActivationQuantizationConfig(backend=backend))
    base = families.build("vit", 0)
    torch.manual_seed(1)
    model = get_peft_model(base, config).to(DEVICE).train()
    images, labels = (x.to(DEVICE) for x in families.batch("vit", batch))
    with autocast(precision):
        loss = model(pixel_values=images, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_is_the_references(precision):
    (our_loss, ours), (their_loss, theirs) = (step(backend, precision) for backend in ("auto", "reference"))
    assert torch.isfinite(our_loss) and ours.keys() == theirs.keys()
    assert torch.allclose(our_loss, their_loss, rtol=1e-5 if precision == "fp32" else 1e-2)
    ours, theirs = (torch.cat([g.flatten().float() for g in grads.values()]) for grads in (ours, theirs))
    assert torch.cosine_similarity(ours, theirs, dim=0) > (0.9999 if precision == "fp32" else 0.995)


def test_a_smaller_batch_compiles_and_tunes_nothing():
    import triton

    from peft_s2a.activations.backends import triton_kernels

    step("triton", "bf16")
    tuned = [kernel for kernel in vars(triton_kernels).values() if isinstance(kernel, triton.runtime.Autotuner)]
    before = [len(kernel.cache) for kernel in tuned]
    compiled = []
    triton.knobs.compilation.listener = lambda **event: compiled.append(event["metadata"]["name"])
    try:
        step("triton", "bf16", batch=4)
    finally:
        triton.knobs.compilation.listener = None
    assert not compiled and before == [len(kernel.cache) for kernel in tuned]


def _peak_above(call) -> int:
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


def test_kernels_allocate_no_temporaries_of_the_inputs_size():
    rows, count = 32768, 768
    x, weight = torch.randn(rows, count, device=DEVICE), torch.ones(count, device=DEVICE)
    heads = x.view(64, 512, 12, 64).transpose(1, 2)
    levels = torch.linspace(0, 1, 16).tolist()
    normed = ops.encode_norm(x, 1e-5, True, True, 4, count, None, "triton")
    coded = list(ops.encode_heads(heads, 4, 32, True, True, None, "triton"))
    packed = ops.encode_steps(x.view(-1), levels[1:], list(range(16)), 4, "triton")
    calls = {
        "encode_steps": lambda: ops.encode_steps(x.view(-1), levels[1:], list(range(16)), 4, "triton"),
        "scale_by_levels": lambda: ops.scale_by_levels(x.view(-1), packed, levels, 4, "triton"),
        "encode_norm": lambda: ops.encode_norm(x, 1e-5, True, True, 4, count, None, "triton"),
        "norm_backward": lambda: ops.norm_backward(x, *normed, weight, True, 4, count, [True] * 3, "triton"),
        "encode_heads": lambda: ops.encode_heads(heads, 4, 32, True, True, None, "triton"),
        "attention_backward": lambda: ops.attention_backward(
            heads, coded, coded, coded, None, False, 0.125, 4, 32, 64, False, "triton"
        ),
    }
    for name, call in calls.items():
        assert _peak_above(call) < x.nbytes // 8, name
