"""Named cases: somebody holds, or reads later, what a linear layer or a convolution put out before an activation."""

import functools

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .cases import DEFAULT, LORA, S2A_BIAS, Case


class Perceptron(nn.Module):
    """x + fc2(act(fc1(norm(x)))). Read otherwise by its subclasses."""

    def __init__(self, width=16, activation=nn.GELU, linear=nn.Linear):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = linear(width, 2 * width)
        self.act = activation()
        self.fc2 = nn.Linear(2 * width, width)

    def hidden(self, x):
        return self.act(self.fc1(self.norm(x)))

    def forward(self, x):
        return x + self.fc2(self.hidden(x))


class OverwritingCase(Case):
    settings = (DEFAULT,)
    block: type[nn.Module] = Perceptron

    def build(self):
        return nn.Sequential(self.block(), self.block())


class KeptOnSelf(OverwritingCase):
    """The block keeps its pre-activation in an attribute."""

    class block(Perceptron):
        def hidden(self, x):
            self.pre = self.fc1(self.norm(x))
            return self.act(self.pre)


class KeptDetached(OverwritingCase):
    """The block keeps its pre-activation detached."""

    class block(Perceptron):
        def hidden(self, x):
            pre = self.fc1(self.norm(x))
            self.features = {"pre": pre.detach()}
            return self.act(pre)


class KeptInList(OverwritingCase):
    """The block appends its pre-activation to a list of its own."""

    class block(Perceptron):
        def __init__(self):
            super().__init__()
            self.collected = []

        def hidden(self, x):
            self.collected.append(self.fc1(self.norm(x)))
            return self.act(self.collected[-1])


COLLECTED = []


class KeptInGlobal(OverwritingCase):
    """The block appends its pre-activation to a global list."""

    class block(Perceptron):
        def hidden(self, x):
            pre = self.fc1(self.norm(x))
            COLLECTED.append(pre)
            return self.act(pre)

    def build(self):
        COLLECTED.clear()
        return super().build()

    def watched(self, model):
        return list(COLLECTED)


class KeptByClosure(OverwritingCase):
    """A function that the block calls keeps the pre-activation in its closure."""

    def build(self):
        self.kept = kept = []

        class Keeping(Perceptron):
            def hidden(self, x):
                def keep(t):
                    kept.append(t)
                    return t

                return self.act(keep(self.fc1(self.norm(x))))

        return nn.Sequential(Keeping(), Keeping())

    def watched(self, model):
        return list(self.kept)


class Images(Case):
    settings = (DEFAULT,)
    shape = (3, 8, 8)

    def layers(self):
        return [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]

    def build(self):
        return nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(*self.layers())).eval()


class SequentialIterated(Images):
    """A parent iterates over an `nn.Sequential` and uses what the convolutions put out, as perceptual losses do."""

    def build(self):
        class Features(nn.Module):
            def __init__(self, layers):
                super().__init__()
                self.norm = nn.BatchNorm2d(3)
                self.layers = nn.Sequential(*layers)

            def forward(self, x):
                found, x = [], self.norm(x)
                for layer in self.layers:
                    x = layer(x)
                    if isinstance(layer, nn.Conv2d):
                        found.append(x)
                return found, x

        return Features(self.layers())


class SequentialIndexed(Images):
    """A parent indexes into an `nn.Sequential` and uses what is between."""

    def build(self):
        class Indexing(nn.Module):
            def __init__(self, layers):
                super().__init__()
                self.norm = nn.BatchNorm2d(3)
                self.layers = nn.Sequential(*layers)

            def forward(self, x):
                first = self.layers[0](self.norm(x))
                second = self.layers[2](self.layers[1](first))
                return first + self.layers[3](second)

        return Indexing(self.layers())


class SequentialSliced(Images):
    """A slice of an `nn.Sequential` runs, and its last result is read twice."""

    def build(self):
        class Slicing(nn.Module):
            def __init__(self, layers):
                super().__init__()
                self.norm = nn.BatchNorm2d(3)
                self.layers = nn.Sequential(*layers)

            def forward(self, x):
                middle = self.layers[:3](self.norm(x))
                return middle, self.layers[3:](middle)

        return Slicing(self.layers())


class SharedActivation(OverwritingCase):
    """One activation module serves a block and a place above it that reads its input again."""

    def build(self):
        class Above(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.Sequential(Perceptron(), Perceptron())
                self.head = nn.Linear(16, 16)

            def forward(self, x):
                h = self.head(self.blocks(x))
                return h * self.blocks[1].act(h)

        return Above()


class ActivationCalledByGrandparent(OverwritingCase):
    """A grandparent calls the two modules of a block itself and uses what the first one gave."""

    def build(self):
        class Mlp(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.act, self.out = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

            def forward(self, x):
                return self.out(self.act(self.fc(x)))

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.mlp = Mlp()

        class Grandparent(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.layer = nn.LayerNorm(16), Layer()

            def forward(self, x):
                mlp = self.layer.mlp
                pre = mlp.fc(self.norm(x))
                return mlp.out(mlp.act(pre)), pre

        return Grandparent()


def _reading_twice(self, x):
    pre = self.fc1(self.norm(x))
    return x + self.fc2(self.act(pre) + pre)


class ForwardPatchedBefore(OverwritingCase):
    """`forward` was replaced on the instance before wrapping, by one that reads the pre-activation twice."""

    def build(self):
        model = super().build()
        for block in model:
            block.forward = functools.partial(_reading_twice, block)
        return model


class ForwardPatchedAfter(OverwritingCase):
    """`forward` is replaced on the instance after wrapping."""

    def after_wrapping(self, model):
        for block in model:
            block.forward = functools.partial(_reading_twice, block)


class ClassForwardPatchedAfter(OverwritingCase):
    """`forward` is replaced on the class after wrapping."""

    def build(self):
        self.cls = type("Patched", (Perceptron,), {})
        return nn.Sequential(self.cls(), self.cls())

    def after_wrapping(self, model):
        self.cls.forward = _reading_twice


class RememberingLinear(nn.Linear):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class LinearThatRemembers(OverwritingCase):
    """A subclass of `nn.Linear` keeps its output."""

    def build(self):
        return nn.Sequential(*(Perceptron(linear=RememberingLinear) for _ in range(2)))


class RememberingCall(nn.Linear):
    def __call__(self, x):
        self.last = super().__call__(x)
        return self.last


class LinearThatRemembersInCall(OverwritingCase):
    """A subclass of `nn.Linear` keeps its output, in `__call__`."""

    def build(self):
        return nn.Sequential(*(Perceptron(linear=RememberingCall) for _ in range(2)))


class LinearReplacedAfter(OverwritingCase):
    """The linear layer is replaced, after wrapping, by one that keeps its output."""

    def after_wrapping(self, model):
        for block in model:
            new = RememberingLinear(16, 32)
            new.load_state_dict(block.fc1.state_dict())
            new.requires_grad_(False)
            new.bias.requires_grad_(True)
            block.fc1 = new


class RememberingActivation(nn.GELU):
    def forward(self, x):
        self.seen = x
        return super().forward(x)


class ActivationThatRemembers(OverwritingCase):
    """A subclass of an activation module keeps its input."""

    def build(self):
        return nn.Sequential(*(Perceptron(activation=RememberingActivation) for _ in range(2)))


class FlagLater(OverwritingCase):
    """A flag that is set after the first step makes the block read its pre-activation twice."""

    class block(Perceptron):
        twice = False

        def forward(self, x):
            if self.twice:
                return _reading_twice(self, x)
            return super().forward(x)

    def before(self, model, step):
        for block in model:
            block.twice = step > 1


class OnlyInTraining(OverwritingCase):
    """The pre-activation is read twice in train mode only; the model is wrapped in eval mode."""

    class block(Perceptron):
        def forward(self, x):
            if self.training:
                return _reading_twice(self, x)
            return super().forward(x)

    def train_what(self, model):
        super().train_what(model)
        model.eval()

    def before(self, model, step):
        model.train(step % 2 == 0)


class KeywordLater(OverwritingCase):
    """A keyword that is given later makes the block return its pre-activation too."""

    def build(self):
        class Returning(Perceptron):
            def forward(self, x, features=None):
                pre = self.fc1(self.norm(x))
                if features is not None:
                    return x + self.fc2(self.act(pre))
                return x + self.fc2(self.act(pre)), pre

        return Returning()

    def inputs(self, step, batch, generator):
        args, _ = super().inputs(step, batch, generator)
        return args, {"features": True} if step % 2 else {}


class GlobalHook(OverwritingCase):
    """A global forward hook keeps the outputs of linear layers."""

    def after_wrapping(self, model):
        self.kept = []

        def keep(module, args, output):
            if isinstance(module, nn.Linear):
                self.kept.append(output)

        self.handle = nn.modules.module.register_module_forward_hook(keep)

    def watched(self, model):
        return list(self.kept) if hasattr(self, "kept") else None

    def close(self):
        if hasattr(self, "handle"):
            self.handle.remove()


class HookOnLayer(OverwritingCase):
    """A hook on the linear layer keeps its output."""

    def layer(self, block):
        return block.fc1

    def after_wrapping(self, model):
        self.kept = []
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        for block in base:
            self.layer(block).register_forward_hook(lambda module, args, output: self.kept.append(output))

    def watched(self, model):
        return list(self.kept)


class HookOnActivation(HookOnLayer):
    """A hook on the activation keeps its input."""

    def after_wrapping(self, model):
        self.kept = []
        for block in model:
            block.act.register_forward_hook(lambda module, args, output: self.kept.append(args[0]))


class HookOnBaseLayerOfLora(HookOnLayer):
    """A hook on the layer that LoRA has wrapped keeps its output, while the adapter is switched on and off."""

    settings = (LORA,)

    def layer(self, block):
        return block.fc1.base_layer

    def after_wrapping(self, model):
        super().after_wrapping(model)
        for block in model.get_base_model():
            block.norm.requires_grad_(True)

    def before(self, model, step):
        if step % 2:
            model.base_model.disable_adapter_layers()
        else:
            model.base_model.enable_adapter_layers()

    def loss_terms(self, model, result):
        return [result, *self.kept[-2:]]


class HookOnBaseLayerOfS2A(HookOnLayer):
    """A hook on the layer that our tuner has wrapped keeps its output."""

    settings = (S2A_BIAS,)

    def layer(self, block):
        return block.fc1.base_layer

    def loss_terms(self, model, result):
        return [result, *self.kept[-2:]]


class Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.kept.append(result)
        return result


class UsersFunctionMode(OverwritingCase):
    """A function mode of the user keeps what linear layers compute."""

    def __init__(self):
        self.mode = Recorder()

    def call(self, model, *args, **kwargs):
        with self.mode:
            return model(*args, **kwargs)

    def watched(self, model):
        return list(self.mode.kept)


class NothingRunsWhenWrapped(OverwritingCase):
    """Wrapping runs nothing of the model: no `Proxy` is left in attributes and lists, and no counter counts."""

    class block(Perceptron):
        def __init__(self):
            super().__init__()
            self.calls, self.collected, self.pre = 0, [], None

        def hidden(self, x):
            self.calls += 1
            pre = self.fc1(self.norm(x))
            self.pre = pre * 2
            self.collected.append(pre + 1)
            return self.act(pre)

    def after_wrapping(self, model):
        self.found = tree_map(str, [(block.calls, len(block.collected), type(block.pre)) for block in model])

    def watched(self, model):
        return self.found


class ViewKept(OverwritingCase):
    """What is kept is a view of the pre-activation that shares its memory: the first token's."""

    class block(Perceptron):
        def hidden(self, x):
            pre = self.fc1(self.norm(x))
            self.first = pre[:, 0]
            return self.act(pre)


class AuxiliaryLoss(OverwritingCase):
    """A loss is taken of a pre-activation that the block left in an attribute."""

    class block(KeptOnSelf.block):
        pass

    def loss_terms(self, model, result):
        return [result, *(block.pre.relu() for block in model)]


class SavedBeforeActivation(Images):
    """A convolution's output goes into an in-place activation and, cloned before, to a skip connection."""

    def build(self):
        class Skip(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1)
                self.act, self.out = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1)

            def forward(self, x):
                pre = self.conv(self.norm(x))
                skip = pre.clone()
                return self.out(self.act(pre)) + skip

        return Skip()


class KeywordCallOfActivation(OverwritingCase):
    """The activation is called with its input as a keyword, which hooks and tracing treat differently."""

    class block(Perceptron):
        def hidden(self, x):
            pre = self.fc1(self.norm(x))
            return self.act(input=pre) + 0.1 * pre
