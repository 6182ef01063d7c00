"""Named cases: blocks whose samples or tokens cannot be computed a few at a time, or do more than compute."""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .cases import DEFAULT, S2A_IN_TILES, TILES, Case
from .overwriting import Perceptron


IN_TILES = TILES[:2]


class TilesCase(Case):
    settings = IN_TILES
    batches = (6, 6, 5, 7)
    block: type[nn.Module]

    def build(self):
        return nn.Sequential(self.block(), self.block())


# Time comes first: what looks like samples are the steps of a sequence.


class TimeFirst(TilesCase):
    shape = (6, 16)
    batches = (4, 4, 3, 5)
    batch_dim = 1


class Lstm(TimeFirst):
    """LSTM blocks over [time, batch, channels]."""

    recurrent = nn.LSTM

    def build(self):
        recurrent = self.recurrent

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.cell = nn.LayerNorm(16), recurrent(16, 16)

            def forward(self, x):
                return x + self.cell(self.norm(x))[0]

        return nn.Sequential(Block(), Block())


class Gru(Lstm):
    """GRU blocks over [time, batch, channels]."""

    recurrent = nn.GRU


class LstmByDefault(Case):
    """Two LSTM blocks on [128, 64, 64], in the default setting."""

    settings = (DEFAULT,)
    shape, batch_dim, batches = (128, 64), 1, (64,)

    def build(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.cell = nn.LayerNorm(64), nn.LSTM(64, 64)

            def forward(self, x):
                return x + self.cell(self.norm(x))[0]

        return nn.Sequential(Block(), Block())


class CausalAttentionOverTime(TimeFirst):
    """Causal attention over the first dimension."""

    class block(Perceptron):
        def hidden(self, x):
            h = self.norm(x).transpose(0, 1)
            h = F.scaled_dot_product_attention(h, h, h, is_causal=True).transpose(0, 1)
            return self.act(self.fc1(h))


class CausalConvolutionOverTime(TimeFirst):
    """Causal convolution over the first dimension."""

    class block(Perceptron):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(16, 16, 3)

        def forward(self, x):
            h = F.pad(self.norm(x).permute(1, 2, 0), (2, 0))
            return x + self.fc2(self.act(self.fc1(self.conv(h).permute(2, 0, 1))))


class TemporalShift(TimeFirst):
    """A quarter of the channels come from the step before."""

    class block(Perceptron):
        def hidden(self, x):
            h = self.norm(x)
            before = torch.cat([torch.zeros_like(h[:1, :, :4]), h[:-1, :, :4]])
            return self.act(self.fc1(torch.cat([before, h[..., 4:]], -1)))


class CumulativeSumOverTime(TimeFirst):
    """A cumulative mean over the first dimension."""

    class block(Perceptron):
        def hidden(self, x):
            h = self.norm(x)
            count = torch.arange(1, len(h) + 1).view(-1, 1, 1)
            return self.act(self.fc1(h.cumsum(0) / count))


class FramesOfVideos(TilesCase):
    """The batch is videos times frames, and attention is over the frames of one video."""

    batches = (4, 4, 8, 6)

    class block(Perceptron):
        def hidden(self, x):
            h = self.norm(x).unflatten(0, (-1, 2)).transpose(1, 2)
            h = F.scaled_dot_product_attention(h, h, h).transpose(1, 2).flatten(0, 1)
            return self.act(self.fc1(h))


# Tokens mix inside what looks like an MLP.


class TokensMixed(TilesCase):
    shape = (8, 16)

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def build(self):
        class Block(nn.Module):
            def __init__(self, mlp):
                super().__init__()
                self.norm, self.mlp = nn.LayerNorm(16), mlp

            def forward(self, x):
                return x + self.mlp(self.norm(x))

        return nn.Sequential(Block(self.Mlp()))  # not repeated: only the MLP could be tiled


class CumulativeSumOfTokens(TokensMixed):
    """A cumulative sum over tokens inside an MLP."""

    class Mlp(TokensMixed.Mlp):
        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)).cumsum(1) / 4)


class TokenShift(TokensMixed):
    """RWKV's token shift inside an MLP: each token is mixed with the one before."""

    class Mlp(TokensMixed.Mlp):
        def forward(self, x):
            before = F.pad(x, (0, 0, 1, 0))[:, :-1]
            return self.fc2(self.act(self.fc1(0.7 * x + 0.3 * before)))


class FirstTokenAddedLater(TokensMixed):
    """From the second step on an MLP adds its first token to all others."""

    class Mlp(TokensMixed.Mlp):
        add_first = False

        def forward(self, x):
            h = self.act(self.fc1(x))
            return self.fc2(h + h[:, :1] if self.add_first else h)

    def before(self, model, step):
        model[0].mlp.add_first = step > 0


# Samples influence one another.


class BatchFormer(TilesCase):
    """Attention over the batch behind a gate that starts at zero and opens as it is trained."""

    class block(Perceptron):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            x = super().forward(x)
            h = self.norm(x).transpose(0, 1)
            return x + self.gate * F.scaled_dot_product_attention(h, h, h).transpose(0, 1)

    def before(self, model, step):
        if step == 1:
            for block in model:
                block.gate.data.fill_(0.5)


class ReZero(TilesCase):
    """The batch's mean behind a gate that starts at zero."""

    class block(Perceptron):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(16))

        def forward(self, x):
            x = super().forward(x)
            return x + self.gate * x.mean(0, keepdim=True)


class PythonGate(TilesCase):
    """The batch's mean behind a number that is zero at first."""

    class block(Perceptron):
        gate = 0.0

        def forward(self, x):
            x = super().forward(x)
            return x + self.gate * x.mean(0, keepdim=True)

    def before(self, model, step):
        for block in model:
            block.gate = 0.0 if step == 0 else 0.5


class WeakMean(TilesCase):
    """Coupling that is weaker than any tolerance: 0.004 of the batch's mean."""

    class block(Perceptron):
        def forward(self, x):
            h = self.fc2(self.hidden(x))
            return x + h + 0.004 * h.mean(0, keepdim=True)


class MeanOfLargeBatches(TilesCase):
    """The batch's mean is subtracted only where there are more than two samples."""

    class block(Perceptron):
        def forward(self, x):
            h = self.fc2(self.hidden(x))
            return x + h - (h.mean(0, keepdim=True) if len(x) > 2 else 0)


class MeanOfLargeBatchesOnly(TilesCase):
    """The batch's mean is subtracted, in a batch of more than four."""

    settings = (TILES[0],)
    batches = (4, 4, 9, 10)

    class block(Perceptron):
        def forward(self, x):
            h = self.fc2(self.hidden(x))
            return x + h - (h.mean(0, keepdim=True) if len(x) > 4 else 0)


class ScaledByBatchSize(TilesCase):
    """The residual is divided by the batch size, which a tile does not have."""

    class block(Perceptron):
        def forward(self, x):
            return x + self.fc2(self.hidden(x)) / max(len(x), 3)


class ExpertsOfFixedCapacity(TilesCase):
    """A mixture of experts that each take the first three tokens sent to them."""

    class block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.router = nn.LayerNorm(16), nn.Linear(16, 2)
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
            self.act = nn.GELU()

        def forward(self, x):
            rows = self.norm(x).flatten(0, 1)
            weights, chosen = self.router(rows).softmax(-1).max(-1)
            out = torch.zeros_like(rows)
            for index, expert in enumerate(self.experts):
                took = (chosen == index).nonzero()[:12, 0]
                out = out.index_add(0, took, self.act(expert(rows[took])) * weights[took, None])
            return x + out.view_as(x)


class BestOfBatch(TilesCase):
    """The largest value of the batch scales it; the first batch does not reach it."""

    class block(Perceptron):
        def forward(self, x):
            return x + self.fc2(self.hidden(x)) / x.detach().abs().amax().clamp(min=2)

    def inputs(self, step, batch, generator):
        (x,), _ = super().inputs(step, batch, generator)
        return (x.clamp(-1, 1) if step == 0 else x,), {}


class MixupByFlag(TilesCase):
    """Mixup, switched on by a flag after the first step."""

    class block(Perceptron):
        mix = False

        def hidden(self, x):
            h = self.act(self.fc1(self.norm(x)))
            return 0.6 * h + 0.4 * h.flip(0) if self.mix else h

    def before(self, model, step):
        for block in model:
            block.mix = step > 0


class MixupByKeyword(TilesCase):
    """Mixup, switched on by a keyword after the first step."""

    def build(self):
        class Mixing(Perceptron):
            def forward(self, x, mix=False):
                h = self.act(self.fc1(self.norm(x)))
                return x + self.fc2(0.6 * h + 0.4 * h.flip(0) if mix else h)

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([Mixing(), Mixing()])

            def forward(self, x, mix):
                for block in self.blocks:
                    x = block(x, mix=mix)
                return x

        return Model()

    def inputs(self, step, batch, generator):
        args, _ = super().inputs(step, batch, generator)
        return args, {"mix": step > 0}


GLOBAL = {"mix": False}


class MixupByGlobal(TilesCase):
    """Mixup, switched on by a global after the first step."""

    class block(Perceptron):
        def hidden(self, x):
            h = self.act(self.fc1(self.norm(x)))
            return 0.6 * h + 0.4 * h.flip(0) if GLOBAL["mix"] else h

    def before(self, model, step):
        GLOBAL["mix"] = step > 0


class MixupOnChild(TilesCase):
    """Mixup, switched on by a flag of a child after the first step."""

    class block(Perceptron):
        def hidden(self, x):
            h = self.act(self.fc1(self.norm(x)))
            return 0.6 * h + 0.4 * h.flip(0) if getattr(self.act, "mix", False) else h

    def before(self, model, step):
        for block in model:
            block.act.mix = step > 0


class MixupByInput(TilesCase):
    """Samples are mixed where the input says so: after the first step its mean is large."""

    class block(Perceptron):
        def hidden(self, x):
            h = self.act(self.fc1(self.norm(x)))
            return 0.6 * h + 0.4 * h.flip(0) if x.mean() > 5 else h

    def inputs(self, step, batch, generator):
        (x,), _ = super().inputs(step, batch, generator)
        return (x + 10 * (step > 0),), {}


class ForwardReplacedLater(TilesCase):
    """A child's forward is replaced after the first step by one that mixes samples."""

    block = Perceptron

    def before(self, model, step):
        if step == 1:
            for block in model:
                block.act.forward = lambda x: F.gelu(x) + 0.3 * x.roll(1, 0)


class ChildReplacedLater(TilesCase):
    """A child is replaced after the first step by one that mixes samples."""

    block = Perceptron

    class Mixing(nn.Module):
        def forward(self, x):
            return F.gelu(x) + 0.3 * x.roll(1, 0)

    def before(self, model, step):
        if step == 1:
            for block in model:
                block.act = self.Mixing()


class LayerDrop(TilesCase):
    """LayerDrop by the generator of `random`."""

    def build(self):
        case = self

        class Block(Perceptron):
            def forward(self, x):
                return x if self.training and case.draw() < 0.4 else super().forward(x)

        return nn.Sequential(*(Block() for _ in range(4)))

    def draw(self):
        return random.random()


class LayerDropByNumpy(LayerDrop):
    """LayerDrop by numpy's generator."""

    def draw(self):
        return np.random.rand()


class LayerDropByTorch(LayerDrop):
    """LayerDrop by one number of torch's generator, taken out of its tensor."""

    def draw(self):
        return torch.rand(()).item()


class LayerDropByTorchList(LayerDrop):
    """LayerDrop by one number of torch's generator, of a list of one."""

    def draw(self):
        return torch.rand(1)


class SampleWiseNumpyDrop(TilesCase):
    """Stochastic depth whose draws, one a sample, are numpy's."""

    class block(Perceptron):
        def forward(self, x):
            keep = torch.from_numpy((np.random.rand(len(x), 1, 1) > 0.3).astype(np.float32)).to(x.dtype)
            return x + keep * self.fc2(self.hidden(x))


# What is trained changes, or depends on the tile.


class OuterParameterTrainedLater(TilesCase):
    """Blocks read a parameter of the model around them; it is frozen at the first step and trained later."""

    def build(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.prompt = nn.Parameter(torch.randn(16))

        model = Model()

        class Block(Perceptron):
            def hidden(self, x):
                return self.act(self.fc1(self.norm(x) + model.prompt))

        model.blocks = nn.Sequential(Block(), Block())
        model.forward = model.blocks.forward
        return model

    def train_what(self, model):
        super().train_what(model)
        model.prompt.requires_grad_(False)

    def before(self, model, step):
        model.prompt.requires_grad_(step > 0)


class EmbeddingTrainedLater(TilesCase):
    """A tensor that is passed to the blocks needs a gradient from the second step on."""

    def build(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = nn.Embedding(3, 16)
                self.blocks = nn.ModuleList([self.Block(), self.Block()])

            class Block(Perceptron):
                def forward(self, x, added):
                    return x + self.fc2(self.act(self.fc1(self.norm(x) + added)))

            def forward(self, x):
                for block in self.blocks:
                    x = block(x, self.embedding.weight.mean(0))
                return x

        return Model()

    def before(self, model, step):
        model.embedding.weight.requires_grad_(step > 0)


class ParameterOfOneOfTwoLater(TilesCase):
    """One parameter is trained at first, another one in its place later."""

    block = Perceptron

    def before(self, model, step):
        for block in model:
            block.norm.requires_grad_(step % 2 == 0)
            block.fc1.bias.requires_grad_(step % 2 == 1)


class ExpertsOfSomeTiles(TilesCase):
    """The parameters of an expert are used only by samples above a threshold: by some tiles, and not by others."""

    class block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
            self.act = nn.GELU()

        def forward(self, x):
            h = self.norm(x)
            above = x[:, 0, 0] > 0
            out = torch.zeros_like(h)
            for expert, mask in zip(self.experts, (above, ~above)):
                if mask.any():
                    out[mask] = self.act(expert(h[mask]))
            return x + out

    def inputs(self, step, batch, generator):
        (x,), _ = super().inputs(step, batch, generator)
        order = x[:, 0, 0].argsort(descending=step % 2 == 0)
        return (x[order],), {}


class SumOfSomeTiles(TilesCase):
    """Two parameters that get the same gradient are used by the samples of the last tiles only."""

    settings = (TILES[1], TILES[2])
    batches = (6, 8, 5, 8)

    class block(Perceptron):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))

        def forward(self, x):
            h = self.norm(x)
            if x[:, 0, 0].max() > 0:
                h = h + (self.a + self.b) * (x[:, :1, :1] > 0)
            return x + self.fc2(self.act(self.fc1(h)))

    def inputs(self, step, batch, generator):
        (x,), _ = super().inputs(step, batch, generator)
        x[:, 0, 0] = torch.where(torch.arange(batch) < 2, -3.0, 3.0)
        return (x,), {}


class FrozenThenPerTile(TilesCase):
    """A scale is used from the second half of the samples on, wherever a value says so."""

    class block(Perceptron):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(16))

        def forward(self, x):
            h = self.norm(x)
            if x[:, 0, 0].max() > 1:
                h = h * self.scale
            return x + self.fc2(self.act(self.fc1(h)))

    def inputs(self, step, batch, generator):
        (x,), _ = super().inputs(step, batch, generator)
        x = x.clamp(-0.9, 0.9)
        x[-1, 0, 0] = 2.0 if step else 0.0
        return (x,), {}


# Blocks that do more than compute.


class InputChangedInPlace(TilesCase):
    """The block adds a position to its input in place; the caller's tensor changes with it."""

    class block(Perceptron):
        def __init__(self):
            super().__init__()
            self.register_buffer("pos", torch.randn(1, 1, 16))

        def forward(self, x):
            x += self.pos
            return x + self.fc2(self.hidden(x))

    def build(self):
        class Model(nn.Module):
            def __init__(self, blocks):
                super().__init__()
                self.blocks = nn.ModuleList(blocks)

            def forward(self, x):
                first = x
                for block in self.blocks:
                    x = block(x)
                return x, first * 2

        return Model([self.block(), self.block()])


class InputScaledInPlace(InputChangedInPlace):
    """The block multiplies its input in place where samples are large."""

    class block(Perceptron):
        def forward(self, x):
            x.mul_(0.5)
            return x + self.fc2(self.hidden(x))


class LossKept(TilesCase):
    """A mixture of experts keeps its load-balancing loss, a batch's mean, on itself."""

    class block(Perceptron):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(16, 4)

        def forward(self, x):
            probabilities = self.router(x).softmax(-1)
            self.loss = probabilities.mean((0, 1)).pow(2).sum()
            return x + self.fc2(self.hidden(x)) * probabilities.amax(-1, keepdim=True)

    def loss_terms(self, model, result):
        return [result, *(block.loss for block in model)]


class LossAppendedToArgument(TilesCase):
    """The block appends its auxiliary loss to a list that it is given."""

    def build(self):
        class Model(nn.Module):
            class Block(Perceptron):
                def __init__(self):
                    super().__init__()
                    self.router = nn.Linear(16, 4)

                def forward(self, x, losses):
                    losses.append(self.router(x).softmax(-1).mean((0, 1)).pow(2).sum())
                    return x + self.fc2(self.hidden(x))

            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([self.Block(), self.Block()])

            def forward(self, x):
                losses = []
                for block in self.blocks:
                    x = block(x, losses)
                return x, losses

        return Model()


class AddedToDictArgument(TilesCase):
    """The block puts its features into a dict that it is given."""

    def build(self):
        class Model(nn.Module):
            class Block(Perceptron):
                def forward(self, x, features, name):
                    x = x + self.fc2(self.hidden(x))
                    features[name] = x.mean(1)
                    return x

            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([self.Block(), self.Block()])

            def forward(self, x):
                features = {}
                for index, block in enumerate(self.blocks):
                    x = block(x, features, str(index))
                return x, features

        return Model()


class AttentionMapKept(TilesCase):
    """The block keeps its attention map on itself."""

    class block(Perceptron):
        def hidden(self, x):
            h = self.norm(x)
            self.attention = (h @ h.mT / 4).softmax(-1)
            return self.act(self.fc1(self.attention @ h))


class FeatureKept(TilesCase):
    """The block keeps its features, for distillation; a loss is taken of them."""

    class block(Perceptron):
        def hidden(self, x):
            self.feature = self.act(self.fc1(self.norm(x)))
            return self.feature

    def loss_terms(self, model, result):
        return [result, *(block.feature for block in model)]


class CallsCounted(TilesCase):
    """The block counts its calls, and depends on the number."""

    class block(Perceptron):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x + self.fc2(self.hidden(x)) / self.calls


class RunningMean(TilesCase):
    """A running mean in a plain attribute, which the next step uses."""

    class block(Perceptron):
        running = None

        def forward(self, x):
            mean = x.detach().mean((0, 1))
            self.running = mean if self.running is None else 0.9 * self.running + 0.1 * mean
            return x + self.fc2(self.act(self.fc1(self.norm(x - self.running))))


class CacheOfFirstCall(TilesCase):
    """A position table that is made in the first call, of the batch's size, and reused."""

    class block(Perceptron):
        table = None

        def forward(self, x):
            if self.table is None or len(self.table) != len(x):
                self.table = torch.linspace(0, 1, len(x)).view(-1, 1, 1).to(x.dtype)
            return x + self.fc2(self.act(self.fc1(self.norm(x) + self.table)))


class Warmup(TilesCase):
    """A drop rate that grows with every call."""

    class block(Perceptron):
        rate = 0.0

        def forward(self, x):
            self.rate = min(1.0, self.rate + 0.1)
            return x + self.fc2(self.hidden(x)) * (1 - self.rate)


class ZerosFirst(TilesCase):
    """The first batch is zeros, on which a block that mixes samples looks as if it did not."""

    class block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(16, 32, bias=False), nn.GELU(), nn.Linear(32, 16, bias=False)
            self.norm = nn.LayerNorm(16)

        def forward(self, x):
            h = self.fc2(self.act(self.fc1(x)))
            return x + self.norm(h + h.mean(0, keepdim=True))

    def inputs(self, step, batch, generator):
        (x,), _ = super().inputs(step, batch, generator)
        return (x * (step > 0),), {}


class ConstantFirst(ZerosFirst):
    """The first batch holds one sample again and again."""

    class block(Perceptron):
        def forward(self, x):
            h = self.fc2(self.hidden(x))
            return x + h - 0.5 * (h - h.mean(0, keepdim=True))

    def inputs(self, step, batch, generator):
        (x,), _ = super().inputs(step, batch, generator)
        return (x[:1].expand_as(x).clone() if step == 0 else x,), {}


class InferenceBuffer(TilesCase):
    """A table is made under `inference_mode` in evaluation, and read by training in tiles afterwards."""

    class block(CacheOfFirstCall.block):
        def forward(self, x):
            if self.table is None:
                self.table = torch.linspace(0, 1, x.shape[1]).view(1, -1, 1).to(x.dtype)
                self.register_buffer("grid", self.table.clone())
            return x + self.fc2(self.act(self.fc1(self.norm(x) + self.grid)))

    def after_wrapping(self, model):
        dtype = next(model.parameters()).dtype
        with torch.inference_mode():
            model(torch.zeros(2, *self.shape, dtype=dtype))


class ShuffledBatch(TilesCase):
    """A permutation of the batch, drawn anew in every call."""

    class block(Perceptron):
        def forward(self, x):
            h = self.fc2(self.hidden(x))
            return x + 0.7 * h + 0.3 * h[torch.randperm(len(x))]


class SortedBatch(TilesCase):
    """Samples come back sorted by a score."""

    class block(Perceptron):
        def forward(self, x):
            x = x + self.fc2(self.hidden(x))
            return x[x.detach().mean((1, 2)).argsort(descending=True)]


class WholeBatchNorm(TilesCase):
    """Values are standardised over the batch, weakly."""

    class block(Perceptron):
        def forward(self, x):
            h = self.fc2(self.hidden(x))
            return x + h / (1 + 0.001 * h.std(0, correction=0, keepdim=True))


class Contrastive(TilesCase):
    """Similarities to all samples of the batch, of which the block keeps the nearest other sample."""

    class block(Perceptron):
        def forward(self, x):
            h = self.fc2(self.hidden(x))
            means = h.mean(1)
            similar = means @ means.T - 1e4 * torch.eye(len(x), dtype=x.dtype)
            return x + h + (similar / 1e3).softmax(-1).matmul(means)[:, None] * 0.1


class SecondResultOfBatch(TilesCase):
    """The block returns a batch's mean beside its result."""

    def build(self):
        class Returning(Perceptron):
            def forward(self, x):
                x = x + self.fc2(self.hidden(x))
                return x, x.mean()

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([Returning(), Returning()])

            def forward(self, x):
                found = []
                for block in self.blocks:
                    x, mean = block(x)
                    found.append(mean)
                return x, found

        return Model()


class ShapeFromOutside(TilesCase):
    """The model tells its blocks the batch size in an attribute, and they reshape by it."""

    def build(self):
        class Block(Perceptron):
            def forward(self, x):
                h = self.norm(x) + self.size[0] / 10
                return x + self.fc2(self.act(self.fc1(h)))

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([Block(), Block()])

            def forward(self, x):
                for block in self.blocks:
                    block.size = x.shape
                    x = block(x)
                return x

        return Model()


class PerSampleList(TilesCase):
    """A list of numbers, one a sample, comes beside the batch."""

    def build(self):
        class Block(Perceptron):
            def forward(self, x, scales):
                scale = torch.tensor(scales[: len(x)], dtype=x.dtype).view(-1, 1, 1)
                return x + self.fc2(self.hidden(x)) * scale

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([Block(), Block()])

            def forward(self, x, scales):
                for block in self.blocks:
                    x = block(x, scales)
                return x

        return Model()

    def inputs(self, step, batch, generator):
        args, _ = super().inputs(step, batch, generator)
        return (*args, [1.0, 1.0, *(3.0 + i for i in range(batch - 2))]), {}


class SharedBlock(TilesCase):
    """One block runs twice in a forward pass."""

    def build(self):
        block = Perceptron()
        return nn.Sequential(block, Perceptron(), block)


class PositionsOfBatch(TilesCase):
    """A sinusoid over the position in the batch, so small at first that two samples hardly differ."""

    class block(Perceptron):
        def forward(self, x):
            position = torch.arange(len(x), dtype=x.dtype).view(-1, 1, 1)
            return x + self.fc2(self.hidden(x)) + 1e-3 * torch.sin(math.pi * position / 2 + 0.0) * x.detach()


class HookWhoseStateDecides(TilesCase):
    """A hook on the block itself mixes samples from the second step on."""

    block = Perceptron

    def after_wrapping(self, model):
        self.mix = False
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        for block in base:
            block.fc1.register_forward_hook(lambda m, args, out: out + 0.3 * out.roll(1, 0) if self.mix else None)

    def before(self, model, step):
        self.mix = step > 0


class HookAddedLater(TilesCase):
    """A hook that mixes samples is added to a child after the first step."""

    settings = (*IN_TILES, S2A_IN_TILES)
    block = Perceptron

    def before(self, model, step):
        if step == 1:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            for block in base:
                block.act.register_forward_hook(lambda m, args, out: out + 0.3 * out.roll(1, 0))


class GlobalHookLater(TilesCase):
    """A global hook that mixes samples is added after the first step."""

    block = Perceptron

    def before(self, model, step):
        if step == 1:

            def mix(module, args, output):
                return output + 0.3 * output.roll(1, 0) if isinstance(module, nn.GELU) else None

            self.handle = nn.modules.module.register_module_forward_hook(mix)

    def close(self):
        if hasattr(self, "handle"):
            self.handle.remove()


class TrainModeOfChild(TilesCase):
    """A child in train mode mixes samples; the block itself is always in train mode."""

    class block(Perceptron):
        def hidden(self, x):
            h = self.act(self.fc1(self.norm(x)))
            return h + 0.3 * h.roll(1, 0) if self.act.training else h

    def before(self, model, step):
        for block in model:
            block.act.train(step > 0)


class DropoutSwitchedOn(TilesCase):
    """Dropout whose rate is zero in the first step."""

    class block(Perceptron):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.0)

        def hidden(self, x):
            return self.drop(super().hidden(x))

    def before(self, model, step):
        for block in model:
            block.drop.p = 0.3 * (step > 0)


class BatchNormSwitchedOn(TilesCase):
    """Batch normalisation that takes live statistics from the second step on."""

    class block(Perceptron):
        def __init__(self):
            super().__init__()
            self.batch_norm = nn.BatchNorm1d(5)

        def hidden(self, x):
            return super().hidden(self.batch_norm(x))

    def before(self, model, step):
        for block in model:
            block.batch_norm.train(step > 0)
