"""Every form in which operators can be called: the result is the stock one, and so is the gradient at 8 bits."""

import inspect
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_s2a.activations.config import ActivationQuantizationConfig
from peft_s2a.activations.interception import OperatorMode
from peft_s2a.activations.operators.registry import HANDLERS


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SCALAR, TRAINED = nn.Parameter(torch.tensor(0.3)), nn.Parameter(draw(16, 16, seed=1))
FROZEN = nn.Parameter(draw(16, 16, seed=2), requires_grad=False)
BIAS, FILTERS = nn.Parameter(draw(16, seed=3)), nn.Parameter(draw(9, 2, seed=4))


def as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def of_complex(function):
    return lambda x: torch.view_as_real(function(as_complex(x)))


def near_eps(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) * torch.tensor([0.0, 0.1, 0.5, 0.999, 1.0, 1.001, 2.0, 50.0])[:, None]


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


FORMS = {
    "scalar parameter": lambda x: x * SCALAR.exp(),
    "scalar loss": lambda x: torch.exp(-SCALAR) * x.square().mean(),
    "scalar by scalar": lambda x: x.mean() * x.sum(),
    "scalar gate": lambda x: torch.tanh(SCALAR) * F.gelu(x),
    "scalar activation as gate": lambda x: x.mean().sigmoid() * x,
    "scalar of another dtype": lambda x: x * x.double().mean(),
    "scalar vector_norm": lambda x: torch.linalg.vector_norm(x.mean()),
    "scalar softmax": lambda x: x.mean().softmax(0),
    "bmm by keywords": lambda x: torch.bmm(input=x, mat2=x.mT),
    "bmm by a keyword": lambda x: torch.bmm(x, mat2=x.mT),
    "matmul by keywords": lambda x: torch.matmul(input=x, other=x.mT),
    "mul by keywords": lambda x: torch.mul(input=x, other=x + 1),
    "softmax by keywords": lambda x: torch.softmax(input=x, dim=-1),
    "layer_norm by keywords": lambda x: F.layer_norm(input=x, normalized_shape=[16]),
    "softmax over numpy's axis": lambda x: torch.softmax(x, axis=-1),
    "method softmax over numpy's axis": lambda x: x.softmax(axis=1),
    "mean over numpy's axis": lambda x: x * torch.rsqrt(torch.mean(torch.square(x), axis=-1, keepdims=True) + 1e-5),
    "amax over numpy's axis": lambda x: torch.amax(x=x, axis=-1, keepdims=True),
    "vector_norm by keywords": lambda x: torch.linalg.vector_norm(input=x, dim=-1),
    "vector_norm by numpy's names": lambda x: torch.linalg.vector_norm(x=x, axis=-1, keepdims=True),
    "add, the deprecated form": lambda x: torch.add(x, 0.5, x.tanh()),
    "addcmul, the deprecated form": lambda x: torch.addcmul(x, 0.5, x.tanh(), x.sigmoid()),
    "mul by numpy's names": lambda x: torch.mul(x1=x, x2=x + 1),
    "matmul by numpy's names": lambda x: torch.matmul(a=x, x2=x.mT),
    "tanh by a numpy name": lambda x: torch.tanh(x=x),
    "attention by keywords": lambda x: F.scaled_dot_product_attention(query=heads(x), key=heads(x), value=heads(x)),
    "mul into out": lambda x: torch.mul(x.detach(), x.detach(), out=torch.empty(2, 8, 16)) + x,
    "matmul into out": lambda x: torch.matmul(x.detach(), x.detach().mT, out=torch.empty(2, 8, 8)).sum() + x,
    "bmm into out": lambda x: torch.bmm(x.detach(), x.detach().mT, out=torch.empty(2, 8, 8)).sum() + x,
    "tanh into out": lambda x: torch.tanh(x.detach(), out=torch.empty(2, 8, 16)) + x,
    "frozen vector": lambda x: F.linear(x, FROZEN[0].detach()),
    "trained vector": lambda x: F.linear(x, TRAINED[0]),
    "frozen linear changed in place": lambda x: F.linear(x, FROZEN, BIAS).mul_(2),
    "trained linear changed in place": lambda x: F.linear(x, TRAINED, BIAS).clamp_(min=-1),
    "norm changed in place": lambda x: F.layer_norm(x, (16,)).mul_(2),
    "activation changed in place": lambda x: F.gelu(x).add_(1),
    "complex product": of_complex(lambda z: z * (z + 1)),
    "complex matmul": of_complex(lambda z: z @ z.mT),
    "complex by real": of_complex(lambda z: z * z.abs()),
    "complex tanh": of_complex(torch.tanh),
    "complex sigmoid": of_complex(torch.sigmoid),
    "complex vector_norm": lambda x: torch.linalg.vector_norm(as_complex(x), dim=-1),
    "global filter": lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(FILTERS)),
    "normalize around eps": lambda x: F.normalize(near_eps(x), dim=-1, eps=1.0),
    "normalize around the default eps": lambda x: F.normalize(1e-12 * near_eps(x), dim=-1),
    "vector_norm over no dimension": lambda x: torch.linalg.vector_norm(x, dim=()),
    "vector_norm over two": lambda x: torch.linalg.vector_norm(x, dim=(-1, 0)),
    "norm": lambda x: x.norm(),
    "norm over two": lambda x: x.norm(p=2, dim=(0, -1), keepdim=True),
    "norm over one": lambda x: torch.norm(x, 2, -1),
    "norm of Frobenius": lambda x: torch.norm(x, dim=(0, 1)),
    "norm of order one": lambda x: x.norm(p=1, dim=-1),
    "norm in another dtype": lambda x: x.norm(p=2, dim=-1, dtype=torch.float64),
    "vector_norm of zeros": lambda x: torch.linalg.vector_norm(x * 0, dim=-1),
    "amax by keywords": lambda x: torch.amax(input=x, dim=1, keepdim=True),
    "amax of a scalar": lambda x: x.mean().amax(),
    "amax into out": lambda x: torch.amax(x.detach(), (0, 1), out=torch.empty(16)) + x,
    "addcmul by keywords": lambda x: torch.addcmul(x, tensor1=x + 1, tensor2=TRAINED[0, 0], value=2),
    "addcmul of two dtypes": lambda x: torch.addcmul(x.double(), x + 1, x),
    "addcmul in place": lambda x: (x * 1).addcmul_(x + 1, x),
    "grid_sample without corners": lambda x: F.grid_sample(x.unsqueeze(1), x[:, None, :, :2]),
    "grid_sample in space": lambda x: F.grid_sample(x[:, None, None], x[:, None, None, :, :3], align_corners=True),
    "grid_sample at fixed places": lambda x: F.grid_sample(x[:, None], FROZEN[None, None, :, :2].expand(2, -1, -1, -1), align_corners=True),
    "a factor twice": lambda x: x * x,
    "a matrix three times": lambda x: x @ x.mT @ x,
    "an expanded factor": lambda x: x * x[:, :1].expand(-1, 8, -1),
    "a factor of another dtype": lambda x: x * x.double(),
    "a boolean factor": lambda x: x * (x > 0),
    "query, key and value in one": lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x)),
    "attention of broadcast keys": lambda x: F.scaled_dot_product_attention(heads(x), heads(x)[:1], heads(x)[:1]),
    "attention without keys": lambda x: F.scaled_dot_product_attention(heads(x), heads(x[:, :0]), heads(x[:, :0])),
    "no values": lambda x: x[:0] * x[:0].exp(),
    "expanded input": lambda x: F.silu(x[:, :1].expand(2, 8, 16)),
    "transposed input": lambda x: F.silu(x.mT),
}  # fmt: skip
SETTINGS = {
    "float32": (None, {}),
    "autocast": (torch.bfloat16, {}),
    "linear inputs compressed": (None, {"compress_linear_inputs": True}),
    "linear inputs compressed, autocast": (torch.bfloat16, {"compress_linear_inputs": True}),
}


def result_and_gradients(function, dtype, mode) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    leaf = draw(2, 8, 16, seed=5).requires_grad_()
    with torch.autocast("cpu", dtype) if dtype else nullcontext(), mode:
        y = function(leaf * 1)
    wanted = (leaf, SCALAR, TRAINED, BIAS, FILTERS)
    return y.detach(), torch.autograd.grad(y, wanted, draw(*y.shape, seed=6).to(y.dtype), allow_unused=True)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", FORMS)
def test_result_and_gradients_are_the_stock_ones(name, setting):
    dtype, options = SETTINGS[setting]
    mode = OperatorMode(ActivationQuantizationConfig(bits=8, **options), "module")
    expected, theirs = result_and_gradients(FORMS[name], dtype, nullcontext())
    actual, ours = result_and_gradients(FORMS[name], dtype, mode)
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    for one, other in zip(ours, theirs):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype and one.shape == other.shape
            assert (one - other).norm() <= 0.03 * other.norm() + 1e-9


@pytest.mark.parametrize("function", [f for f in HANDLERS if not inspect.isfunction(f)], ids=lambda f: f.__qualname__)
def test_handlers_take_every_form_of_torchs_schemas(function):
    name = {"__radd__": "add", "__rmul__": "mul"}.get(function.__name__, function.__name__.strip("_"))
    if name == "float":  # no operator, a conversion
        return
    packet, handler = getattr(torch.ops.aten, name), inspect.signature(HANDLERS[function])
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    found = [s for s in schemas if str(s.arguments[0].type) == "Tensor" and not any(a.is_out for a in s.arguments)]
    assert found
    for schema in found:
        names = ["input" if a.name == "self" else a.name for a in schema.arguments]
        given = [name for name, argument in zip(names, schema.arguments) if not argument.kwarg_only]
        handler.bind(None, *given, **dict.fromkeys(names[len(given) :]))
        handler.bind(None, **dict.fromkeys(names))


@pytest.mark.parametrize("function", [f for f in HANDLERS if inspect.isfunction(f)], ids=lambda f: f.__name__)
def test_handlers_take_every_argument_of_torchs_python_functions(function):
    stock, handler = inspect.signature(function).parameters, inspect.signature(HANDLERS[function]).parameters
    if not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in (*stock.values(), *handler.values())):
        missing = set(stock) - {"self"} - set(handler)
        assert not missing
    for name, parameter in stock.items():
        if name in handler and inspect.Parameter.empty not in (parameter.default, handler[name].default):
            assert handler[name].default == parameter.default
