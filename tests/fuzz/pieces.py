"""Blocks of which random networks are made. Each lists the choices that it leaves, the plainest first."""

import torch
import torch.nn.functional as F
from torch import nn


ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu, in place": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "gelu, tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "silu, in place": lambda: nn.SiLU(inplace=True),
    "mish": nn.Mish,
    "elu": nn.ELU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "hardswish": nn.Hardswish,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "prelu": nn.PReLU,
    "relu6": nn.ReLU6,
}
NORMS = ("layer", "rms", "group", "batch", "none")
YES_NO = (False, True)


class RMSNorm(nn.Module):
    """Written out, as language models do."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def token_norm(name, width):
    if name in ("group", "batch"):
        inner = nn.GroupNorm(4, width) if name == "group" else nn.BatchNorm1d(width)
        return nn.Sequential(Transposed(inner))
    return {"layer": nn.LayerNorm, "rms": RMSNorm, "none": nn.Identity}[name](width)


class Transposed(nn.Module):
    """Tokens last, and back."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class Piece(nn.Module):
    """A block of width C: tokens [B, N, C] or images [B, C, H, W] to the same shape."""

    choices: dict[str, tuple] = {}

    def __init__(self, width, **options):
        super().__init__()
        self.width, self.options = width, options
        self.make(width, **options)

    def make(self, width, **options):
        raise NotImplementedError


class Mlp(Piece):
    choices = {
        "norm": NORMS,
        "act": tuple(ACTIVATIONS),
        "gated": YES_NO,
        "dropout": (0.0, 0.2),
        "residual": ("sum", "none", "in place", "scaled", "gate", "exp"),
        "keep": ("none", "attribute", "list", "detached"),
        "touch": ("none", "write", "multiply in place", "slice", "clamp in place"),
        "bias": (True, False),
    }

    def make(self, width, norm, act, gated, dropout, residual, keep, touch, bias):
        self.norm, self.act = token_norm(norm, width), ACTIVATIONS[act]()
        self.fc1 = nn.Linear(width, 2 * width, bias=bias)
        self.gate_proj = nn.Linear(width, 2 * width, bias=bias) if gated else None
        self.fc2 = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.full((width,), 0.5)) if residual == "scaled" else None
        self.gate = nn.Parameter(torch.tensor(0.3)) if residual in ("gate", "exp") else None
        self.kept = []

    def forward(self, x):
        options = self.options
        pre = self.fc1(self.norm(x))
        if options["keep"] == "attribute":
            self.kept = pre
        elif options["keep"] == "list":
            self.kept = [*self.kept[-1:], pre]
        elif options["keep"] == "detached":
            self.kept = pre.detach()
        hidden = self.act(pre)
        if self.gate_proj is not None:
            hidden = hidden * self.gate_proj(x)
        if options["touch"] == "write":
            hidden = hidden + 0.0
            hidden[..., :3] = 0
        elif options["touch"] == "multiply in place":
            hidden = hidden + 0.0
            hidden.mul_(0.5)
        elif options["touch"] == "slice":
            hidden = torch.cat([hidden[..., 1:], hidden[..., :1]], -1)
        elif options["touch"] == "clamp in place":
            hidden = (hidden + 0.0).clamp_(-2, 2)
        y = self.fc2(self.drop(hidden))
        match options["residual"]:
            case "none":
                return y
            case "in place":
                y += x
                return y
            case "scaled":
                return x + self.scale * y
            case "gate":
                return x + self.gate.tanh() * y
            case "exp":
                return x + y * self.gate.exp()
        return x + y


class Attention(Piece):
    choices = {
        "norm": NORMS,
        "form": ("sdpa", "written out", "baddbmm", "module"),
        "mask": ("none", "causal", "bool", "additive", "rows masked", "minus infinity"),
        "heads": (4, 1, 2),
        "qk_norm": YES_NO,
        "dropout": (0.0, 0.2),
        "projections": ("qkv", "three"),
        "keep": YES_NO,
    }

    def make(self, width, norm, form, mask, heads, qk_norm, dropout, projections, keep):
        self.norm, self.heads = token_norm(norm, width), heads
        if form == "module":
            self.inner = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
            return
        if projections == "qkv":
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.q_norm, self.k_norm = (nn.LayerNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.out, self.weights = nn.Linear(width, width), None

    def mask(self, x):
        tokens = x.shape[1]
        match self.options["mask"]:
            case "causal":
                return torch.ones(tokens, tokens, dtype=torch.bool).tril()
            case "bool":
                mask = torch.ones(len(x), 1, tokens, tokens, dtype=torch.bool)
                mask[: len(x) // 2, ..., -2:] = False
                return mask
            case "additive":
                return torch.sin(torch.arange(self.heads * tokens * tokens, dtype=x.dtype)).view(
                    1, self.heads, tokens, tokens
                )
            case "rows masked":
                mask = x.new_zeros(len(x), 1, tokens, tokens)
                mask[:1] = torch.finfo(x.dtype).min
                mask[1:, ..., -2:] = torch.finfo(x.dtype).min
                return mask
            case "minus infinity":
                return x.new_full((tokens, tokens), float("-inf")).triu(1)
        return None

    def forward(self, x):
        options, normed = self.options, self.norm(x)
        mask = self.mask(x)
        if options["form"] == "module":
            if mask is not None:
                mask = ~mask if mask.dtype == torch.bool else mask
                mask = mask.expand(len(x), self.heads, *mask.shape[-2:]).flatten(0, 1)
            return x + self.inner(normed, normed, normed, attn_mask=mask, need_weights=options["keep"])[0]
        if options["projections"] == "qkv":
            q, k, v = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (f(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        p = options["dropout"] if self.training else 0.0
        if options["form"] == "sdpa":
            if mask is not None and mask.is_floating_point():
                mask = mask.to(q.dtype)
            y = F.scaled_dot_product_attention(q, k, v, mask, p)
        else:
            y = self.written_out(q, k, v, mask, p)
        return x + self.out(y.transpose(1, 2).flatten(2))

    def written_out(self, q, k, v, mask, p):
        scale = q.shape[-1] ** -0.5
        if self.options["form"] == "baddbmm":
            flat = [t.flatten(0, 1) for t in (q, k, v)]
            bias = q.new_zeros(1, 1, 1)
            scores = torch.baddbmm(bias, flat[0], flat[1].transpose(1, 2), beta=1.0, alpha=scale)
            scores = scores.unflatten(0, q.shape[:2])
        else:
            scores = (q * scale) @ k.transpose(-2, -1)
        if mask is not None:
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            else:
                scores = scores + mask
        weights = scores.softmax(-1)
        if self.options["keep"]:
            self.weights = weights
        return F.dropout(weights, p) @ v


class TokenMixing(Piece):
    choices = {
        "how": (
            "linear", "cumsum", "roll", "mean", "mean over samples", "roll samples", "lstm", "gru", "conv",
            "sort", "max", "first token", "flip", "einsum",
        ),
        "act": tuple(ACTIVATIONS),
        "strength": (1.0, 1e-3),
    }  # fmt: skip
    TOKENS = 6

    def make(self, width, how, act, strength):
        self.norm, self.act = nn.LayerNorm(width), ACTIVATIONS[act]()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.mix = {
            "linear": lambda: nn.Conv1d(self.TOKENS, self.TOKENS, 1),
            "lstm": lambda: nn.LSTM(width, width),
            "gru": lambda: nn.GRU(width, width, batch_first=True),
            "conv": lambda: nn.Conv1d(width, width, 3, padding=1, groups=2),
        }.get(how, nn.Identity)()

    def mixed(self, x):
        match self.options["how"]:
            case "linear":
                return self.mix(x)
            case "cumsum":
                return x.cumsum(1) / x.shape[1]
            case "roll":
                return x.roll(1, 1)
            case "mean":
                return x.mean(1, keepdim=True).expand_as(x)
            case "mean over samples":
                return x.mean(0, keepdim=True) + 0 * x
            case "roll samples":
                return x.roll(1, 0)
            case "lstm":  # over the first dimension, whatever that is
                return self.mix(x)[0]
            case "gru":
                return self.mix(x)[0]
            case "conv":
                return self.mix(x.transpose(1, 2)).transpose(1, 2)
            case "sort":
                return x.sort(1).values
            case "max":
                return x.amax(1, keepdim=True) + 0 * x
            case "first token":
                return x[:, :1] * x.sigmoid()
            case "flip":
                return x.flip(0)
        return torch.einsum("bnc,bmc->bnm", x, x).softmax(-1) @ x

    def forward(self, x):
        hidden = self.act(self.fc1(self.norm(x)))
        return x + self.fc2(hidden + self.options["strength"] * self.mixed(hidden))


class Experts(Piece):
    """Tokens are sent to one of two experts; the auxiliary loss stands on the module."""

    choices = {"how": ("soft", "top", "capacity"), "act": tuple(ACTIVATIONS)}

    def make(self, width, how, act):
        self.router, self.auxiliary = nn.Linear(width, 2), None
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), ACTIVATIONS[act](), nn.Linear(2 * width, width))
            for _ in range(2)
        )

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        self.auxiliary = weights.mean((0, 1)).square().sum()
        if self.options["how"] == "soft":
            return x + sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))
        tokens, chosen = x.flatten(0, 1), weights.flatten(0, 1).argmax(-1)
        y = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().flatten()
            if self.options["how"] == "capacity":
                rows = rows[: len(tokens) // 3]
            y = y.index_add(0, rows, expert(tokens[rows]) * weights.flatten(0, 1)[rows, i, None])
        return x + y.view_as(x)


class Cosine(Piece):
    """Normalised in other ways."""

    choices = {"how": ("normalize", "vector_norm", "glu", "log_softmax", "square", "softmax", "abs", "division")}

    def make(self, width, how):
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width // 2 if how == "glu" else width, width)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        y = self.fc1(x)
        match self.options["how"]:
            case "normalize":
                y = F.normalize(y, dim=-1) * self.scale.exp()
            case "vector_norm":
                y = y / (torch.linalg.vector_norm(y, dim=-1, keepdim=True) + 1e-3)
            case "glu":
                y = F.glu(y, -1)
            case "log_softmax":
                y = F.log_softmax(y, -1) / 4
            case "square":
                y = y.square() * 0.3 + y**3 * 0.1
            case "softmax":
                y = torch.softmax(y, 1) * y
            case "abs":
                y = y.abs() * y.sigmoid()
            case "division":
                y = y / (1 + y.abs())
        return x + self.fc2(y)


class Conv(Piece):
    choices = {
        "norm": ("batch", "group", "layer", "instance", "none"),
        "act": tuple(ACTIVATIONS),
        "kernel": (3, 1, 5),
        "groups": (1, 2, 8),
        "padding": ("zeros", "reflect", "same"),
        "bias": (True, False),
        "residual": ("sum", "none", "in place"),
        "order": ("norm, act, conv", "conv, norm, act", "conv, act, norm"),
        "extra": ("none", "squeeze", "max", "average", "dropout", "upsample", "shuffle", "blur"),
        "keep": YES_NO,
    }

    def make(self, width, norm, act, kernel, groups, padding, bias, residual, order, extra, keep):
        self.conv = nn.Conv2d(
            width, width, kernel, padding="same" if padding == "same" else kernel // 2, groups=groups, bias=bias,
            padding_mode="reflect" if padding == "reflect" else "zeros",
        )  # fmt: skip
        self.norm = {
            "batch": nn.BatchNorm2d,
            "group": lambda width: nn.GroupNorm(4, width),
            "layer": Channels,
            "instance": lambda width: nn.InstanceNorm2d(width, affine=True),
            "none": nn.Identity,
        }[norm](width)
        self.act, self.kept = ACTIVATIONS[act](), None
        self.out = nn.Conv2d(width, width, 1)  # blocks are planned from two layers on
        self.extra = {
            "squeeze": lambda: Squeeze(width),
            "max": lambda: nn.MaxPool2d(3, 1, 1),
            "average": lambda: nn.AvgPool2d(3, 1, 1),
            "dropout": lambda: nn.Dropout2d(0.2),
            "upsample": Resampled,
            "shuffle": lambda: nn.ChannelShuffle(4),
            "blur": lambda: nn.Conv2d(width, width, 3, padding=1, groups=width),
        }.get(extra, nn.Identity)()

    def forward(self, x):
        y = x
        for part in self.options["order"].split(", "):
            if part == "act" and y is x:
                y = y + 0.0
            y = getattr(self, part)(y)
            if part == "conv" and self.options["keep"]:
                self.kept = y
        y = self.out(self.extra(y))
        if self.options["residual"] == "none":
            return y
        if self.options["residual"] == "in place":
            y += x
            return y
        return x + y


class Channels(nn.LayerNorm):
    """Over the channels of an image, as ConvNeXt does."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Squeeze(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Resampled(nn.Module):
    def forward(self, x):
        y = F.max_pool2d(x, 2)
        return F.interpolate(y, size=x.shape[-2:], mode="nearest")


TOKEN_PIECES = {c.__name__: c for c in (Mlp, Attention, TokenMixing, Experts, Cosine)}
IMAGE_PIECES = {c.__name__: c for c in (Conv,)}
PIECES = {**TOKEN_PIECES, **IMAGE_PIECES}
