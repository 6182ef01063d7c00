"""Named cases: masks, norms, complex and zero-dimensional numbers, forms of a call. What is kept has to be what counts."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from peft_s2a import quantize_activations, restore_activations

from .cases import DEFAULT, FOUR_BITS, TILES, Case
from .overwriting import Perceptron


class NumericsCase(Case):
    settings = (DEFAULT,)
    shape = (12, 16)


class Attention(nn.Module):
    def __init__(self, heads=4, width=16):
        super().__init__()
        self.heads, self.norm, self.qkv = heads, nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        with torch.no_grad():
            self.qkv.weight[: 2 * width] *= 3  # or hardly anything would depend on the scores

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, mask)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class MaskCase(NumericsCase):
    has_float64 = False

    def mask(self, x):
        raise NotImplementedError

    def train_what(self, model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("qkv.weight" in name or "norm" in name)

    def build(self):
        make = self.mask

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = Attention(), Attention()

            def forward(self, x):
                mask = make(x)
                return self.second(self.first(x, mask), mask)

        return Model()


class MaskedByMinimum(MaskCase):
    """Whole rows are masked by `finfo.min`: padded images."""

    lowest = torch.finfo(torch.float32).min

    def mask(self, x):
        mask = x.new_zeros(len(x), 1, 12, 12)
        mask[0] = self.lowest
        mask[1, :, :, 7:] = self.lowest
        return mask


class MaskedByBillion(MaskedByMinimum):
    """Whole rows are masked by -1e9."""

    lowest = -1e9


class MaskedByBillionOfHeads(MaskedByBillion):
    """The same, in a mask with an axis of heads."""

    def mask(self, x):
        return super().mask(x).repeat(1, 4, 1, 1)


class QueriesMasked(MaskedByMinimum):
    """The rows of padded queries are masked by `finfo.min`."""

    def mask(self, x):
        mask = x.new_zeros(len(x), 1, 12, 12)
        mask[:, :, 6:] = self.lowest
        return mask


class BiasWithOffset(MaskCase):
    """An additive bias of 1e5 and a little more."""

    def mask(self, x):
        return 1e5 + torch.arange(12, dtype=x.dtype).sub(6).abs().mul(-0.25).expand(1, 1, 12, 12)


class BiasOfHeadsWithOffset(BiasWithOffset):
    """The same, in a mask with an axis of heads."""

    def mask(self, x):
        return super().mask(x).repeat(1, 4, 1, 1)


class AlibiFarOut(MaskCase):
    """ALiBi from position 1500 on."""

    base = 2.0

    def mask(self, x):
        slopes = self.base ** -torch.arange(1, 5, dtype=x.dtype).view(1, 4, 1, 1)
        return slopes * (1500 + torch.arange(12, dtype=x.dtype)).expand(1, 1, 12, 12)


class AlibiWithOtherSlopes(AlibiFarOut):
    """ALiBi from position 1500 on, as it is for numbers of heads that are no powers of two."""

    base = 2 ** (2 / 3)


class MaskChangedInPlace(MaskCase):
    """A mask is made as a sum, and changed in place afterwards."""

    def mask(self, x):
        biases = 0.5 * torch.sin(torch.arange(4 * 12 * 12, dtype=x.dtype)).view(1, 4, 12, 12)
        mask = biases + x.new_zeros(len(x), 1, 12, 12)
        mask[..., :3] = -1e4
        return mask


class MaskTermChangedInPlace(MaskCase):
    """A term of a mask is changed in place after the sum was made, as a buffer that is filled anew is."""

    def build(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = Attention(), Attention()

            def forward(self, x):
                biases = 0.5 * torch.sin(torch.arange(4 * 12 * 12, dtype=x.dtype)).view(1, 4, 12, 12)
                lengths = x.new_zeros(len(x), 1, 12, 12)
                mask = biases + lengths
                biases.mul_(-20)
                return self.second(self.first(x, mask), mask)

        return Model()


class InfiniteMaskOfHeads(MaskCase):
    """A float32 mask of several heads holds -inf."""

    def mask(self, x):
        mask = torch.cos(torch.arange(4 * 12 * 12, dtype=x.dtype)).view(1, 4, 12, 12).repeat(len(x), 1, 1, 1)
        return mask.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf)


class InfiniteRowsOfHeads(MaskCase):
    """A float32 mask of several heads holds -inf in all but one place of a row."""

    def mask(self, x):
        mask = torch.cos(torch.arange(4 * 12 * 12, dtype=x.dtype)).view(1, 4, 12, 12) - 8e4
        mask[..., 6:, 3:] = -torch.inf
        return mask


class LargeMaskOfHeads(MaskCase):
    """A float32 mask of several heads, of about 3000."""

    def mask(self, x):
        return 3000 + 2 * torch.cos(torch.arange(4 * 12 * 12, dtype=x.dtype)).view(1, 4, 12, 12)


class BooleanMaskOfWholeRows(MaskCase):
    """A boolean mask that leaves some samples one token."""

    def mask(self, x):
        mask = torch.ones(len(x), 1, 12, 12, dtype=torch.bool)
        mask[0, :, :, 1:] = False
        return mask


class ManyTokens(NumericsCase):
    """128 images of 197 tokens with a class token unlike the others: rows that a norm looks at may all be of one position."""

    settings = (FOUR_BITS,)
    shape, batches = (197, 16), (128, 127)
    error, cosine, norm = 0.15, 0.985, 0.05

    def train_what(self, model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)

    def build(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)

            def forward(self, x):
                return self.fc(self.norm(x))

        return Model()

    def inputs(self, step, batch, generator):
        x = torch.randn(batch, *self.shape, generator=generator)
        x[:, 0] *= torch.tensor([10.0] * 2 + [0.1] * 14)
        return (x,), {}


class ComplexFilter(NumericsCase):
    """GFNet's global filter: a product in the frequency domain."""

    shape = (8, 8, 16)

    class block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)
            self.filter = nn.Parameter(torch.randn(8, 5, 16, 2) * 0.3)

        def forward(self, x):
            spectrum = torch.fft.rfft2(self.norm(x), dim=(1, 2), norm="ortho")
            spectrum = spectrum * torch.view_as_complex(self.filter)
            return x + self.fc(torch.fft.irfft2(spectrum, s=(8, 8), dim=(1, 2), norm="ortho"))

    def build(self):
        return nn.Sequential(self.block(), self.block())

    def train_what(self, model):
        super().train_what(model)
        for block in model:
            block.filter.requires_grad_(True)


class ComplexActivations(ComplexFilter):
    """tanh and products of complex activations."""

    class block(ComplexFilter.block):
        def forward(self, x):
            spectrum = torch.fft.rfft2(self.norm(x), dim=(1, 2), norm="ortho")
            gate = torch.tanh(spectrum * torch.view_as_complex(self.filter) * 0.2)
            return x + self.fc(torch.fft.irfft2(spectrum * gate, s=(8, 8), dim=(1, 2), norm="ortho"))


class ComplexNorm(ComplexFilter):
    """The norm of a complex vector."""

    class block(ComplexFilter.block):
        def forward(self, x):
            spectrum = torch.fft.rfft2(self.norm(x), dim=(1, 2), norm="ortho") * torch.view_as_complex(self.filter)
            size = torch.linalg.vector_norm(spectrum, dim=-1, keepdim=True)
            return x + self.fc(torch.fft.irfft2(spectrum / (1 + size), s=(8, 8), dim=(1, 2), norm="ortho"))


class NormalizedTiny(NumericsCase):
    """`F.normalize` of vectors at and below its `eps`."""

    class block(Perceptron):
        def forward(self, x):
            h = self.fc2(self.hidden(x))
            return x + F.normalize(h * 1e-6, dim=-1, eps=8e-7)

    def build(self):
        return nn.Sequential(self.block(), self.block())


class ScalarFactor(NumericsCase):
    """A learned temperature: `x * t.exp()` with a zero-dimensional `t`."""

    class block(Perceptron):
        def __init__(self):
            super().__init__()
            self.t = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x + self.fc2(self.hidden(x)) * self.t.exp()

    def build(self):
        return nn.Sequential(self.block(), self.block())


class ScalarGate(ScalarFactor):
    """`tanh(g) * f(x)` with a scalar gate."""

    class block(ScalarFactor.block):
        def forward(self, x):
            return x + torch.tanh(self.t + 0.5) * self.fc2(self.hidden(x))


class WeightedLoss(ScalarFactor):
    """`exp(-log_var) * loss`, both zero-dimensional."""

    def build(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = ScalarFactor.block()

            def forward(self, x):
                return torch.exp(-self.block.t) * self.block(x).pow(2).mean()

        return Model()


class KeywordProducts(NumericsCase):
    """Products whose factors are given by keyword, and by `out=`."""

    class block(Perceptron):
        def hidden(self, x):
            h = self.norm(x)
            weights = torch.bmm(input=h, mat2=h.mT).div(4).softmax(dim=-1)
            h = torch.matmul(input=weights, other=h)
            return self.act(self.fc1(torch.mul(input=h, other=h.sigmoid())))

    def build(self):
        return nn.Sequential(self.block(), self.block())


class LinearChangedInPlace(NumericsCase):
    """The result of a trained linear layer, whose inputs are kept as codes, is changed in place."""

    def build(self):
        class Block(Perceptron):
            def forward(self, x):
                h = self.fc1(self.norm(x))
                h += 1
                h.mul_(0.5)
                return x + self.fc2(self.act(h)).add_(x)

        return nn.Sequential(Block(), Block())

    settings = (type(DEFAULT)("compressed inputs", (("compress_linear_inputs", True),)),)

    def train_what(self, model):
        model.requires_grad_(True)


class RestoredAfterWeightNorm(NumericsCase):
    """`weight_norm`, added after wrapping, changes a module's class too; then quantisation is undone."""

    def build(self):
        return nn.Sequential(Perceptron(), Perceptron())

    def after_wrapping(self, model):
        weight_norm(model[0].fc1)
        model[0].fc1.requires_grad_(True)
        model[0].fc1.bias.requires_grad_(True)
        restore_activations(model)

    def watched(self, model):
        return [type(module).__name__ for module in model.modules()]


class QuantizedAfterWeightNorm(NumericsCase):
    """`weight_norm` was there first."""

    def build(self):
        model = nn.Sequential(Perceptron(), Perceptron())
        weight_norm(model[0].fc1)
        return model


class QuantizedTwiceAroundWeightNorm(RestoredAfterWeightNorm):
    """`weight_norm` comes between two calls of `quantize_activations`."""

    def after_wrapping(self, model):
        weight_norm(model[0].fc1)
        if any("_activation_settings" in vars(module) for module in model.modules()):
            quantize_activations(model, DEFAULT.config())


class MasksInTiles(MaskCase):
    """A mask of the batch comes as a keyword to blocks in tiles."""

    settings = TILES[:2]

    def build(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([Attention(), Attention()])

            def forward(self, x):
                mask = x.new_zeros(len(x), 1, 12, 12)
                mask[1::2, :, :, 7:] = -1e4
                for block in self.blocks:
                    x = block(x, mask=mask)
                return x

        return Model()


class PaddingInTiles(MaskCase):
    """A padding mask [batch, tokens] comes beside the batch, to blocks in tiles."""

    settings = TILES[:2]

    def build(self):
        class Block(Attention):
            def forward(self, x, keep):
                return super().forward(x, keep[:, None, None, :])

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([Block(), Block()])

            def forward(self, x):
                keep = x[..., 0] < 1
                keep[:, 0] = True
                for block in self.blocks:
                    x = block(x, keep)
                return x

        return Model()
