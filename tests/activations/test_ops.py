"""The declared ops: schemas, fake implementations, aliasing, and tracing through `torch.compile`."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_s2a.activations import operators
from peft_s2a.activations.ops import _declared, op_set, op_set_name
from peft_s2a.activations.quantizer import Quantizer


def _calls():
    ops = op_set("reference")
    x, grad, seed = torch.randn(5, 24), torch.randn(5, 24), torch.tensor(7)
    heads = torch.randn(2, 7, 3, 8).transpose(1, 2)
    permuted = torch.randn(24, 2, 3).permute(1, 2, 0)
    prompts = torch.randn(4, 24), torch.randn(4, 15), torch.randn(3)
    groups = ops.encode_groups(x, 3, 8, None)
    normed = ops.encode_norm(x, 1e-5, True, True, 4, 24, None)
    coded = list(ops.encode_heads(heads, 4, 8, True, True, None))
    mask = torch.randn(1, 3, 7, 7)
    maps, channels = torch.randn(2, 3, 12), (torch.randn(3), torch.rand(3))
    mapped = ops.encode_channels(maps, *channels, 4, 8, None)
    pooled = ops.max_pool2d(maps, [2, 2], [2, 1], [1, 0], [1, 1], True, 2)
    return {
        "encode_steps": (permuted, [-0.5, 0.5], [0, 1, 2], 2),
        "encode_levels": (permuted, [0.0, 0.2, 0.5, 1.0], 2, seed),
        "scale_by_levels": (grad.t(), torch.randint(0, 255, (30,), dtype=torch.uint8), [0.0, 0.2, 0.5, 1.0], 2),
        "scale_by_levels_": (grad.clone(), torch.randint(0, 255, (30,), dtype=torch.uint8), [0.0, 0.2, 0.5, 1.0], 2),
        "encode_groups": (x, 3, 8, seed),
        "decode_groups": (*groups, 3, 8, 24, torch.float32),
        "encode_roots": (x.abs(), 3, 8, seed),
        "encode_channels": (maps, *channels, 4, 8, None),
        "batch_norm_backward": (maps, *mapped, channels[1], channels[0], True, 4, 8, [True, False, True]),
        "softmax_backward": (grad, *groups, 3, 8),
        "gated_backward": (grad, list(groups), list(groups), "leaky_relu", ["negative_slope"], [0.2], 3, 8),
        "max_pool2d": (maps, [2, 2], [2, 1], [1, 0], [1, 1], True, 2),
        "max_pool2d_backward": (pooled[0], pooled[1], [2, 2], [2, 1], [1, 0], [1, 1], 3, 12, 2),
        "encode_norm": (permuted, 1e-5, True, True, 4, 24, None),
        "norm_backward": (
            grad.view(1, 5, 24).transpose(0, 1),
            *normed,
            torch.randn(24),
            True,
            4,
            24,
            [True, True, False],
        ),
        "encode_heads": (heads, 4, 8, True, True, None),
        "attention_backward": (torch.randn(2, 3, 7, 8), coded, coded, coded, mask, False, 0.3, 4, 8, 8, True),
        "prompt_attention": (torch.randn(2, 7, 15), heads, *prompts, 0.3),
        "prompt_attention_backward": (torch.randn(2, 7, 15), coded, *prompts, 0.3, 4, 8),
    }


def test_every_op_is_called_here():
    assert _calls().keys() == _declared.keys()


@pytest.mark.parametrize("backend", ["reference", "auto", "triton"])
@pytest.mark.parametrize("name", _calls())
def test_schema_and_fake_implementation_match_the_real_one(name, backend):
    op = getattr(op_set(backend), name).default
    torch.library.opcheck(op, _calls()[name], test_utils=("test_schema", "test_faketensor"))


def test_the_backend_is_an_op_set_and_no_argument():
    assert op_set_name("auto") == op_set_name("compiled") == "s2a"
    assert op_set_name("reference") == "s2a_reference"
    for namespace in ("s2a", "s2a_reference"):
        for name in _calls():
            schema = getattr(getattr(torch.ops, namespace), name).default._schema
            assert all(argument.name != "backend" for argument in schema.arguments)


def test_the_dispatcher_finds_the_kernels_of_the_cpu_after_the_first_call():
    for name, arguments in _calls().items():
        getattr(torch.ops.s2a, name)(*arguments)
    for name in ("encode_steps", "encode_norm", "attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"s2a::{name}", "CPU")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"s2a_reference::{name}", "CPU")


def test_functions_run_on_fake_tensors():
    with FakeTensorMode():
        x = torch.randn(2, 3, 16, 8, requires_grad=True)
        y = operators.scaled_dot_product_attention(x, x, x, quantizer=Quantizer())
        y = operators.activation(operators.layer_norm(y, (8,), quantizer=Quantizer()), "gelu", quantizer=Quantizer())
        y.sum().backward()
    assert x.grad.shape == x.shape


def test_functions_compile_without_graph_breaks():
    def step(x):
        y = operators.layer_norm(x, (8,), quantizer=Quantizer())
        y = operators.scaled_dot_product_attention(y, 2 * y, y + 1, quantizer=Quantizer())
        return operators.activation(y, "gelu", quantizer=Quantizer())

    x = torch.randn(2, 3, 16, 8, requires_grad=True)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    (ours,) = torch.autograd.grad(compiled(x).sum(), x)
    (plain,) = torch.autograd.grad(step(x).sum(), x)
    torch.testing.assert_close(ours, plain)
