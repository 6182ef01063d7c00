"""Quantising a model's activations changes what is kept for backward, and nothing else; it can be undone."""

import copy
import functools
import inspect
import io

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from families import batch, build, logits
from kept import Kept
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTForImageClassification

from peft_s2a.activations import wrap
from peft_s2a.activations.config import ActivationQuantizationConfig
from peft_s2a.activations.plans import planner
from peft_s2a.activations.plans.tiles import TiledPlan
from peft_s2a.activations.wrap import quantize_activations, restore_activations


def reference(**options):
    return ActivationQuantizationConfig(backend="reference", **options)


def tiled(**options):
    """Settings under which small models run in tiles."""
    return ActivationQuantizationConfig(mlp_tiles=2, **options)


def tune_biases(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias") or "classifier" in name
    return model.train()


def gradients(model, family="vit", seed=0):
    images, labels = batch(family)
    torch.manual_seed(seed)
    model.zero_grad()
    F.cross_entropy(logits(model, images), labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def cosine(expected, actual):
    assert expected.keys() == actual.keys()
    one, other = (torch.cat([g.flatten() for g in d.values()]) for d in (expected, actual))
    return F.cosine_similarity(one.double(), other.double(), dim=0).item()


def kept_dtypes(model, *args, **kwargs):
    """{dtype: bytes} that autograd keeps, without parameters and buffers."""
    with Kept(model) as kept:
        model(*args, **kwargs)
    return kept.bytes_of


@pytest.fixture
def vit():
    return tune_biases(build("vit"))


@pytest.fixture
def tiles_run(monkeypatch):
    """A list that grows by the numbers of samples in the tiles of every call that runs in tiles."""
    calls = []
    run = TiledPlan.__call__

    def spy(plan, *args):
        calls.append(plan.sizes)
        return run(plan, *args)

    monkeypatch.setattr(TiledPlan, "__call__", spy)
    return calls


class TestForward:
    @pytest.mark.parametrize("training", [True, False])
    def test_outputs_are_the_stock_ones_bit_for_bit(self, vit, training):
        vit.train(training)
        images, _ = batch("vit")
        expected = logits(vit, images)
        quantize_activations(vit, reference())
        assert torch.equal(logits(vit, images), expected)
        with torch.no_grad():
            assert torch.equal(logits(vit, images), expected)

    def test_outputs_in_tiles_are_within_rounding(self, vit, tiles_run):
        images, _ = batch("vit")
        expected = logits(vit, images)
        torch.testing.assert_close(logits(quantize_activations(vit, tiled()), images), expected)
        assert tiles_run

    def test_codes_are_kept_in_eval_mode_too(self, vit):
        images, _ = batch("vit")
        stock = kept_dtypes(vit.eval(), images)
        quantized = kept_dtypes(quantize_activations(vit, reference()), images)
        assert quantized[torch.uint8] > 0
        assert quantized[torch.float32] < stock[torch.float32] / 3

    def test_nothing_is_kept_without_gradients(self, vit):
        images, _ = batch("vit")
        quantize_activations(vit)
        with torch.no_grad():
            assert not kept_dtypes(vit, images)
        vit.requires_grad_(False)
        assert not kept_dtypes(vit, images)

    def test_frozen_part_below_the_first_trained_module_keeps_nothing(self, vit):
        images, _ = batch("vit")
        vit.requires_grad_(False)
        vit.classifier.requires_grad_(True)
        assert torch.uint8 not in kept_dtypes(quantize_activations(vit), images)

    def test_requested_attentions_and_hidden_states_are_whole(self, vit, tiles_run):
        vit.set_attn_implementation("eager")
        images, _ = batch("vit")
        expected = vit(images, output_attentions=True, output_hidden_states=True)
        quantize_activations(vit, tiled())
        actual = vit(images, output_attentions=True, output_hidden_states=True)
        assert len(actual.attentions) == len(expected.attentions) == 2
        for one, other in zip(
            (*expected.attentions, *expected.hidden_states), (*actual.attentions, *actual.hidden_states)
        ):
            torch.testing.assert_close(other, one)
        vit(images)
        assert [2, 2] in tiles_run

    def test_autocast(self, vit):
        images, _ = batch("vit")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = logits(vit, images)
            actual = logits(quantize_activations(vit, reference()), images)
        assert torch.equal(actual, expected)


class TestGradients:
    @pytest.mark.parametrize("config", [reference(bits=8), tiled(bits=8)])
    def test_are_close_at_eight_bits(self, vit, config):
        expected = gradients(vit)
        assert cosine(expected, gradients(quantize_activations(vit, config))) > 0.9999

    def test_of_full_fine_tuning(self):
        vit = build("vit").train()
        expected = gradients(vit)
        assert cosine(expected, gradients(quantize_activations(vit, tiled(bits=8)))) > 0.999

    def test_compressed_inputs_of_trained_layers(self):
        vit = build("vit").train()
        images, _ = batch("vit")
        expected = gradients(vit)
        plain = kept_dtypes(quantize_activations(vit, reference(bits=8)), images)
        config = reference(bits=8, compress_linear_inputs=True)
        compressed = kept_dtypes(quantize_activations(vit, config), images)
        assert compressed[torch.float32] < plain[torch.float32] / 3
        assert cosine(expected, gradients(vit)) > 0.999

    def test_of_lora(self, tiles_run):
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        model = get_peft_model(build("vit"), config).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        expected = gradients(model)
        quantize_activations(model, tiled(bits=8))
        assert cosine(expected, gradients(model)) > 0.9999
        assert tiles_run

    def test_stochastic_rounding_is_reproducible(self, vit):
        quantize_activations(vit, reference(bits=2, rounding="stochastic"))
        first, again, other = gradients(vit, seed=1), gradients(vit, seed=1), gradients(vit, seed=2)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    def test_double_backward_is_refused(self, vit):
        images, labels = batch("vit")
        quantize_activations(vit)
        loss = F.cross_entropy(logits(vit, images), labels)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(loss, [p for p in vit.parameters() if p.requires_grad], create_graph=True)

    def test_a_module_used_twice_in_one_forward(self):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(6, 6), nn.GELU())
        x = torch.randn(3, 6)
        (expected,) = torch.autograd.grad(layer(layer(x)).sum(), layer[0].bias)
        quantize_activations(layer, reference(bits=8))
        (actual,) = torch.autograd.grad(layer(layer(x)).sum(), layer[0].bias)
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


class TestReversibility:
    def test_restoring_gives_the_stock_modules_back(self, vit):
        before = {name: (type(module), set(vars(module))) for name, module in vit.named_modules()}
        expected = gradients(vit)
        quantize_activations(vit)
        gradients(vit)
        assert restore_activations(vit) is vit
        assert {name: (type(module), set(vars(module))) for name, module in vit.named_modules()} == before
        actual = gradients(vit)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)

    def test_accelerates_hooks_may_come_between(self, vit):
        """They put a forward of their own on the instance, which calls what the class had then."""
        expected = gradients(vit)
        quantize_activations(vit)
        modules = [vit, *vit.vit.layers, *(m for m in vit.modules() if isinstance(m, (nn.Linear, nn.LayerNorm)))]
        for module in modules:
            add_hook_to_module(module, ModelHook(), append=True)
        coded = gradients(vit)
        assert any(not torch.equal(coded[name], expected[name]) for name in expected), "nothing was coded"
        restore_activations(vit)
        for _ in range(2):
            actual = gradients(vit)
            assert all(torch.equal(actual[name], expected[name]) for name in expected)
            for module in modules:
                remove_hook_from_module(module)

    def test_classes_that_others_derived_since_are_restored(self, vit):
        """As FSDP2 does; transformers puts a forward that checkpoints into each of them."""
        expected = gradients(vit)
        quantize_activations(vit)
        for module in vit.modules():
            if isinstance(module, wrap._Quantized):
                module.__class__ = type("Sharded", (type(module),), {})
        gradients(vit)
        restore_activations(vit)
        assert not any(isinstance(module, wrap._Quantized) for module in vit.modules())
        assert any(type(module).__name__ == "Sharded" for module in vit.modules())
        actual = gradients(vit)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)

    def test_restoring_a_stock_model_does_nothing(self, vit):
        restore_activations(vit)
        assert not any(isinstance(module, wrap._Quantized) for module in vit.modules())

    def test_twice_is_once(self, vit):
        classes = [type(module) for module in quantize_activations(vit).modules()]
        assert [type(module) for module in quantize_activations(vit).modules()] == classes
        restore_activations(vit)
        assert not any(isinstance(module, wrap._Quantized) for module in vit.modules())

    def test_a_second_call_applies_its_configuration(self, vit):
        images, _ = batch("vit")
        wide = kept_dtypes(quantize_activations(vit, reference(bits=8)), images)
        narrow = kept_dtypes(quantize_activations(vit, reference(bits=2)), images)
        assert narrow[torch.uint8] < wide[torch.uint8] / 2
        quantize_activations(vit, reference(skip_modules=["layers"]))
        assert not any(isinstance(module, wrap._Quantized) for module in vit.vit.layers.modules())
        assert isinstance(vit.vit.layernorm, wrap._Quantized)

    def test_a_second_call_covers_modules_added_since(self, vit):
        quantize_activations(vit)
        vit.vit.layers[0].mlp.activation_fn = nn.SiLU()
        quantize_activations(vit)
        assert isinstance(vit.vit.layers[0].mlp.activation_fn, wrap._Quantized)

    def test_deepcopy_is_independent(self, vit):
        images, _ = batch("vit")
        quantize_activations(vit, reference())
        clone = copy.deepcopy(vit)
        assert torch.equal(logits(clone, images), logits(vit, images))
        assert torch.uint8 in kept_dtypes(clone, images)
        restore_activations(vit)
        assert torch.uint8 in kept_dtypes(clone, images)
        assert torch.uint8 not in kept_dtypes(vit, images)

    def test_pickle(self, vit):
        images, _ = batch("vit")
        file = io.BytesIO()
        torch.save(quantize_activations(vit, reference()), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(logits(loaded, images), logits(vit, images))
        assert torch.uint8 in kept_dtypes(loaded, images)

    def test_state_dict_is_the_stock_one(self, vit):
        stock = build("vit").state_dict()
        quantized = quantize_activations(vit).state_dict()
        assert list(quantized) == list(stock)
        vit.load_state_dict(stock)

    def test_save_pretrained(self, vit, tmp_path):
        quantize_activations(vit).save_pretrained(tmp_path)
        loaded = type(vit).from_pretrained(tmp_path)
        images, _ = batch("vit")
        assert type(loaded) is type(vit)
        assert torch.equal(logits(loaded.train(), images), logits(vit, images))

    def test_modules_remain_what_they_were(self, vit):
        norm = vit.vit.layers[0].layernorm_before
        calls = []
        norm.register_forward_hook(lambda *args: calls.append(1))
        description, signature = str(vit), inspect.signature(vit.vit.layers[0].mlp.forward)
        quantize_activations(vit)
        assert isinstance(norm, nn.LayerNorm)
        assert str(vit) == description
        assert inspect.signature(vit.vit.layers[0].mlp.forward) == signature
        logits(vit, batch("vit")[0])
        assert calls == [1]

    def test_moving_and_casting(self, vit):
        quantize_activations(vit, reference()).to(torch.bfloat16)
        images, _ = batch("vit")
        output = logits(vit, images.to(torch.bfloat16))
        output.sum().backward()
        assert output.dtype == vit.classifier.bias.grad.dtype == torch.bfloat16

    def test_merge_and_unload(self):
        model = get_peft_model(build("vit"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        quantize_activations(model)
        images, _ = batch("vit")
        with torch.no_grad():
            expected = logits(model, images)
            merged = model.merge_and_unload()
            torch.testing.assert_close(logits(merged, images), expected, rtol=1e-4, atol=1e-4)
        restore_activations(merged)

    def test_a_tuner_added_afterwards(self):
        vit = quantize_activations(build("vit"), reference())
        model = get_peft_model(vit, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        images, _ = batch("vit")
        assert torch.uint8 in kept_dtypes(model, images)
        assert type(model.unload()) is type(vit)

    @pytest.mark.parametrize(
        ("module", "shape"),
        [
            (nn.GELU(), (3, 5)),
            (nn.Sequential(nn.LayerNorm(32), nn.Tanh()), (5, 32)),
            (nn.ReLU(), (4,)),
            (nn.Sequential(nn.SiLU()), (2, 3)),
        ],
    )
    def test_single_modules(self, module, shape):
        x = torch.randn(shape)
        leaf = x.clone().requires_grad_()
        stock = module(leaf)
        (expected,) = torch.autograd.grad(stock.square().sum(), leaf)
        quantize_activations(module, {"bits": 8, "backend": "reference"})
        assert torch.equal(module(leaf), stock)
        (actual,) = torch.autograd.grad(module(leaf).square().sum(), leaf)
        assert (actual - expected).norm() < 0.05 * expected.norm() + 1e-6

    def test_other_arguments_are_refused(self, vit):
        with pytest.raises(ValueError, match="got str"):
            quantize_activations("vit")
        with pytest.raises(ValueError, match="ActivationQuantizationConfig, a dict"):
            quantize_activations(vit, 4)
        with pytest.raises(ValueError, match="unknown"):
            quantize_activations(vit, {"bit": 4})


def hook_all(model):
    """Have accelerate's hooks call every module, as `dispatch_model` does."""
    for module in model.modules():
        add_hook_to_module(module, ModelHook())


def close_over_all(model):
    """Replace every forward method by a function around it."""
    for module in model.modules():
        module.forward = functools.partial(lambda forward, *args, **kwargs: forward(*args, **kwargs), module.forward)


def hook_closures(model):
    close_over_all(model)
    hook_all(model)


class TestReplacedForwards:
    """Forward methods that were set on modules before their activations are quantised, and call the stock ones."""

    @pytest.mark.parametrize("replace", [hook_all, close_over_all, hook_closures])
    def test_are_quantised_and_listed(self, vit, replace):
        images, _ = batch("vit")
        plain = quantize_activations(copy.deepcopy(vit))
        replace(vit)
        expected, stock = kept_dtypes(plain, images), kept_dtypes(vit, images)
        quantize_activations(quantize_activations(vit))
        for model in (vit, copy.deepcopy(vit)):
            assert kept_dtypes(model, images) == expected != stock
            assert {name: actual.equal(gradients(plain)[name]) for name, actual in gradients(model).items()} == (
                dict.fromkeys(gradients(plain), True)
            )
            assert set(wrap.unplanned(model)) == {"vit.embeddings", "vit.layers.0", "vit.layers.1"}
            assert all("was replaced" in reason for reason in wrap.unplanned(model).values())

    def test_run_by_plans_once_accelerates_hooks_are_gone(self, vit):
        images, _ = batch("vit")
        expected = kept_dtypes(quantize_activations(copy.deepcopy(vit)), images)
        hook_all(vit)
        quantize_activations(vit)
        remove_hook_from_module(vit, recurse=True)
        assert kept_dtypes(vit, images) == expected
        assert not wrap.unplanned(vit)

    @pytest.mark.parametrize("replace", [hook_all, close_over_all, hook_closures])
    def test_are_as_they_were_once_restored(self, vit, replace):
        expected = gradients(vit)
        replace(vit)
        before = {name: module.forward for name, module in vit.named_modules()}
        restore_activations(quantize_activations(vit))
        assert {name: module.forward for name, module in vit.named_modules()} == before
        actual = gradients(vit)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


class TestTiles:
    def test_blocks_run_over_samples(self, vit, tiles_run):
        quantize_activations(vit, tiled())
        logits(vit, batch("vit")[0])
        assert tiles_run == [[2, 2]] * 3  # embeddings and two layers
        tiles_run.clear()
        logits(vit, batch("vit", size=5)[0])
        assert tiles_run == [[3, 2]] * 3
        tiles_run.clear()
        logits(vit, batch("vit", size=1)[0])
        assert not tiles_run

    @pytest.mark.parametrize("config", [reference(mlp_tiles=2), ActivationQuantizationConfig(mlp_tiles=1)])
    def test_switched_off(self, vit, tiles_run, config):
        logits(quantize_activations(vit, config), batch("vit")[0])
        assert not tiles_run

    def test_large_inputs_run_in_tiles_by_default(self, vit, tiles_run, monkeypatch):
        quantize_activations(vit)
        images, _ = batch("vit")
        logits(vit, images)
        assert not tiles_run
        monkeypatch.setitem(planner._ROOM, "cpu", 4 * 17 * 32 * 4)
        logits(quantize_activations(vit), images)
        assert tiles_run[-1] == [1] * 4

    def test_tiles_are_larger_the_more_codes_are_still_to_come(self, tiles_run, monkeypatch):
        monkeypatch.setitem(planner._ROOM, "cpu", 1)
        config = ViTConfig(hidden_size=32, intermediate_size=64, num_attention_heads=2, image_size=32, num_labels=3)
        vit = ViTForImageClassification(config).requires_grad_(False)
        vit.vit.embeddings.cls_token.requires_grad_(True)
        vit(torch.randn(16, 3, 32, 32))  # nothing quantised: whole
        assert not tiles_run
        quantize_activations(vit)(torch.randn(16, 3, 32, 32))
        _, *tiles = [len(sizes) for sizes in tiles_run]  # the first are the embeddings
        assert tiles == sorted(tiles) and tiles[-1] == 16 > tiles[0]

    def test_trained_weights_run_whole(self, tiles_run):
        vit = quantize_activations(build("vit"), tiled())
        logits(vit, batch("vit")[0])
        assert len(tiles_run) <= 1  # the embeddings' weights are smaller than the images

    def test_hooks_of_others_see_whole_tensors(self, vit, tiles_run):
        shapes = []
        vit.vit.layers[0].mlp.fc1.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
        logits(quantize_activations(vit, tiled()), batch("vit")[0])
        assert shapes == [(4, 17, 64)]
        assert tiles_run == [[2, 2]] * 2

    def test_gradient_hooks_of_parameters_fire_once(self, vit, tiles_run):
        quantize_activations(vit, tiled())
        seen = []
        vit.vit.layers[0].mlp.fc1.bias.register_hook(lambda grad: seen.append(grad))
        gradients(vit)
        assert len(seen) == 1
        assert tiles_run == [[2, 2]] * 3

    def test_live_batch_statistics_run_whole(self, tiles_run):
        resnet = build("resnet").train()
        twin = copy.deepcopy(resnet)
        images, _ = batch("resnet")
        quantize_activations(twin, tiled())
        torch.testing.assert_close(logits(twin, images), logits(resnet, images))
        for one, other in zip(resnet.buffers(), twin.buffers()):
            torch.testing.assert_close(one, other)
        assert not tiles_run

    def test_dropout_draws_the_stock_numbers(self, tiles_run):
        vit = tune_biases(build("vit"))
        for module in vit.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        images, _ = batch("vit")
        torch.manual_seed(5)
        expected = logits(vit, images)
        quantize_activations(vit, tiled())
        torch.manual_seed(5)
        torch.testing.assert_close(logits(vit, images), expected)
        assert [2, 2] in tiles_run

    def test_stochastic_depth_draws_the_stock_numbers(self, tiles_run):
        swin = tune_biases(build("swin"))
        images, _ = batch("swin")
        torch.manual_seed(5)
        expected = logits(swin, images)
        quantize_activations(swin, tiled())
        torch.manual_seed(5)
        torch.testing.assert_close(logits(swin, images), expected)
        assert [2, 2] in tiles_run


class TestOverwriting:
    def test_inputs_that_are_read_again_are_left_alone(self):
        class Gate(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.act = nn.Linear(8, 8), nn.GELU()

            def forward(self, x):
                hidden = self.fc(x)
                return self.act(hidden) * hidden

        torch.manual_seed(0)
        gate, x = Gate(), torch.randn(3, 8)
        expected = gate(x)
        torch.testing.assert_close(quantize_activations(gate)(x), expected)

    def test_hooks_on_the_layer_see_its_own_output(self, vit):
        images, _ = batch("vit")
        seen = {}
        for name, model in (("stock", copy.deepcopy(vit)), ("quantized", quantize_activations(copy.deepcopy(vit)))):
            fc1 = model.vit.layers[0].mlp.fc1
            fc1.register_forward_hook(lambda module, args, output, name=name: seen.__setitem__(name, output))
            logits(model, images)
        torch.testing.assert_close(seen["quantized"], seen["stock"])


class TestComposition:
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing(self, vit, use_reentrant):
        quantize_activations(vit, tiled())
        expected = gradients(vit)
        vit.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert cosine(expected, gradients(vit)) > 0.99999

    def test_checkpointing_keeps_less(self, vit):
        images, _ = batch("vit")
        quantize_activations(vit, tiled())
        plain = kept_dtypes(vit, images)
        vit.gradient_checkpointing_enable({"use_reentrant": False})
        assert torch.uint8 in plain
        assert kept_dtypes(vit, images).get(torch.uint8, 0) < plain[torch.uint8] / 3

    def test_save_on_cpu(self, vit):
        quantize_activations(vit, tiled())
        expected = gradients(vit)
        with torch.autograd.graph.save_on_cpu():
            actual = gradients(vit)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)

    def test_gradient_accumulation(self, vit):
        quantize_activations(vit, tiled())
        images, labels = batch("vit")
        once = gradients(vit)
        for _ in range(2):
            F.cross_entropy(logits(vit, images), labels).backward()
        torch.testing.assert_close(vit.classifier.bias.grad, 3 * once["classifier.bias"])

    def test_distributed_data_parallel(self, vit, tmp_path):
        quantize_activations(vit, tiled())
        expected = gradients(vit)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            images, labels = batch("vit")
            vit.zero_grad()
            model = DistributedDataParallel(vit)
            F.cross_entropy(model(pixel_values=images).logits, labels).backward()
            # workers need the interpreter's lock to let go of tensors, and whoever joins them holds it: let them finish first
            torch.distributed.barrier()
            del model
        finally:
            torch.distributed.destroy_process_group()
        for name, gradient in expected.items():
            torch.testing.assert_close(vit.get_parameter(name).grad, gradient)

    def test_torch_compile(self, vit):
        expected = gradients(quantize_activations(vit, tiled()))
        torch._dynamo.reset()
        compiled = torch.compile(vit, backend="aot_eager")
        images, labels = batch("vit")
        vit.zero_grad()
        F.cross_entropy(compiled(pixel_values=images).logits, labels).backward()
        actual = {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}
        assert cosine(expected, actual) > 0.999
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
            compiled(pixel_values=images)
        assert torch.uint8 in kept

    def test_training_converges_as_without(self):
        images, labels = batch("vit")
        for quantize in (lambda model: model, lambda model: quantize_activations(model, tiled())):
            model = quantize(build("vit")).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            for _ in range(40):
                loss = F.cross_entropy(logits(model, images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            assert loss.item() < 0.1
