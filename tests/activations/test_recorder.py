"""What may be read while a call is recorded: values that the code wrote down, and no others."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from peft_s2a.activations.plans.recorder import Untraceable
from peft_s2a.activations.plans.trace import trace


def _trace(function, tensors=()):
    leaves, spec = tree_flatten(((torch.randn(2, 3, requires_grad=True),), {}))
    return trace(function, leaves, spec, tensors)


@pytest.mark.parametrize(
    "made",
    [
        lambda x: torch.tensor(2.0).item(),
        lambda x: (torch.tensor(1.0) + torch.tensor(1.0)).item(),
        lambda x: torch.tensor(1.0).add_(1.0).item(),
        lambda x: 2.0 if torch.tensor(1.0) < torch.tensor(2.0) else 1.0,
    ],
)
def test_numbers_that_the_code_wrote_down_may_be_asked_for(made):
    joint = _trace(lambda x: x * made(x))
    assert 2.0 in [arg for node in joint.graph.nodes for arg in node.args]


@pytest.mark.parametrize("kind", [nn.Parameter, torch.clone])
@pytest.mark.parametrize("ask", [torch.Tensor.item, lambda held: float(held > 0), lambda held: float(held + 1)])
def test_values_of_parameters_and_buffers_may_not(kind, ask):
    held = kind(torch.tensor(1.5))
    with pytest.raises(Untraceable, match="value of a tensor"):
        _trace(lambda x: x * ask(held), [held])


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: torch.tensor(1.0).copy_(x[0, 0].detach()).item(),
        lambda x: _written_through_a_view(x),
    ],
)
def test_what_depends_on_the_arguments_may_not(ask):
    with pytest.raises(Untraceable, match="value of a tensor"):
        _trace(lambda x: x * ask(x))


def _written_through_a_view(x):
    number = torch.tensor(1.0)
    number.view(1).copy_(x[0, :1].detach())
    return number.item()
