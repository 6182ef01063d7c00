"""Tensor-parallel models are refused before anything is changed, FSDP2's are not."""

import copy

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import peft_s2a
from peft_s2a import S2AConfig
from peft_s2a.parallelism import TensorParallelError


HINT = r"tensor-parallel.*DistributedDataParallel or FSDP2"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """One process is all that is needed: a layer's parameters become DTensors as with many."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


@pytest.fixture
def vit():
    return FAMILIES["vit"]()


def batch():
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.arange(2)}


def state_of(model):
    modules = [(name, type(module), dict(module._forward_hooks)) for name, module in model.named_modules()]
    parameters = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    return modules, parameters


def split(model, mesh, prefix=""):
    plan = {f"{prefix}vit.layers.0.mlp.fc1": ColwiseParallel(), f"{prefix}vit.layers.0.mlp.fc2": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def changes(model):
    """What the package would do to it."""
    return {
        "s2a": lambda: get_peft_model(model, S2AConfig()),
        "codes alone": lambda: peft_s2a.quantize_activations(model),
        "s2a without codes": lambda: get_peft_model(model, S2AConfig(activation_quantization=None)),
    }


@pytest.mark.parametrize("change", changes(None))
def test_linear_layers_that_torch_split_are_refused(change, vit, mesh):
    split(vit, mesh)
    before = state_of(vit)
    with pytest.raises(TensorParallelError, match=r"`weight` of `vit.layers.0.mlp.fc1` is a DTensor.*FSDP2"):
        changes(vit)[change]()
    assert state_of(vit) == before and not hasattr(vit, "peft_config")
    vit(**batch()).loss.backward()


@pytest.mark.parametrize("change", changes(None))
def test_a_plan_of_transformers_is_refused(change, vit):
    vit.vit._tp_size = 2  # what `from_pretrained(..., tp_plan="auto")` leaves on a model that it split
    with pytest.raises(TensorParallelError, match=r"transformers split `vit` over 2 processes.*FSDP2"):
        changes(vit)[change]()


def test_weights_that_zero3_spread_are_refused(vit):
    weight = vit.vit.layers[0].mlp.fc1.weight
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)  # what `zero.Init` leaves of it
    before = state_of(vit)
    with pytest.raises(
        ValueError, match=r"ZeRO-3 spread the weights.*`vit.layers.0.mlp.fc1.weight`.*deepspeed.initialize"
    ):
        get_peft_model(vit, S2AConfig())
    assert state_of(vit) == before


def test_norms_on_parts_of_a_sequence_are_refused(vit, mesh):
    parallelize_module(vit, mesh, {"vit.layernorm": SequenceParallel()})
    with pytest.raises(TensorParallelError, match=r"`vit.layernorm` is a DTensor"):
        peft_s2a.quantize_activations(vit)


@pytest.mark.parametrize("steps_before", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("options", [{}, {"activation_quantization": None}])
def test_a_model_that_is_split_after_it_was_wrapped_raises_in_its_next_step(steps_before, options, vit, mesh):
    model = get_peft_model(vit, S2AConfig(structures=("prompt",), **options))
    for _ in range(steps_before):
        model(**batch()).loss.backward()
    split(model, mesh, "base_model.model.")
    with pytest.raises(TensorParallelError, match=HINT):
        model(**batch())


@pytest.mark.parametrize("steps_before", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_codes_alone_notice_too(steps_before, vit, mesh):
    model = get_peft_model(vit, LoraConfig(target_modules=["q_proj"]))
    peft_s2a.quantize_activations(model)
    for _ in range(steps_before):
        model(**batch()).loss.backward()
    split(model, mesh, "base_model.model.")
    with pytest.raises(TensorParallelError, match=HINT):
        model(**batch())


def test_a_second_adapter_on_a_split_model_leaves_the_first(vit, mesh):
    model = get_peft_model(vit, S2AConfig(structures=("prompt",)))
    split(model, mesh, "base_model.model.")
    before = state_of(model)
    with pytest.raises(TensorParallelError, match=HINT):
        model.add_adapter("second", S2AConfig(structures=("prompt",)))
    assert state_of(model) == before and set(model.peft_config) == {"default"}


def test_fsdp2_is_not_taken_for_it(vit, mesh):
    expected = get_peft_model(copy.deepcopy(vit), S2AConfig())
    model = get_peft_model(vit, S2AConfig())
    for block in model.base_model.model.vit.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert any(peft_s2a.parallelism.is_distributed(parameter) for parameter in model.parameters())
    data = batch()
    torch.testing.assert_close(model(**data).loss, expected(**data).loss)
    sharded = fully_shard(FAMILIES["vit"](), mesh=mesh)
    peft_s2a.quantize_activations(sharded)(**data).loss.backward()


def test_fsdp2_over_split_layers_is(vit):
    store = dist.HashStore()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    both = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    split(vit, both["tp"])
    fully_shard(vit, mesh=both["dp"])
    with pytest.raises(TensorParallelError, match=HINT):
        peft_s2a.quantize_activations(vit)
