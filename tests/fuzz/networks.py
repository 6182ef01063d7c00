"""Random cases: networks put together of `pieces`, and edits of small real models.

A case is a `Spec`, plain data that is drawn from a seed; so it can be printed, run again, and made smaller while it
still fails.
"""

import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_s2a import quantize_activations

from .cases import Case, Setting, StockFails, differences
from .pieces import ACTIVATIONS, IMAGE_PIECES, PIECES, TOKEN_PIECES, TokenMixing


WIDTH = 16
# What is done to a network beside its pieces; most concern one of its modules, picked by a number.
EDITS = (
    "hook keeps", "hook keeps, late", "hook changes", "hook changes, late", "pre-hook changes", "backward hook",
    "backward hook changes", "gradient hook", "eval", "switch mode", "switch gradients", "checkpoint", "checkpoint, reentrant",
    "share activation", "share block", "patch", "patch, late", "twice", "no_grad first", "no_grad inside", "in place between",
    "replace activation", "detach", "global", "flag", "activation called outside", "return all", "accumulate",
)  # fmt: skip
LAYOUTS = ("plain", "transposed", "expanded", "strided", "offset", "channels_last")
FAMILIES = ("vit", "swin", "resnet", "convnext", "beit", "dinov2", "segformer", "clip", "swinv2", "siglip")


@dataclass(frozen=True)
class Spec:
    """What a random case is made of."""

    seed: int
    base: str = "tokens"  # or "images", or a family of real models
    pieces: tuple[tuple[str, dict[str, Any]], ...] = ()
    edits: tuple[tuple[str, float], ...] = ()
    layout: str = "plain"
    batches: tuple[int, ...] = (4, 4)
    trained: str = "vectors"
    input_requires_grad: bool = False
    autocast: bool = False
    dtype: str = "float32"
    adapter: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """What differs from the plainest case."""
        plain = Spec(self.seed)
        said = [f"seed={self.seed}", f"base={self.base}"]
        for name, choices in self.pieces:
            piece = PIECES[name]
            special = [f"{k}={v}" for k, v in choices.items() if v != piece.choices[k][0]]
            said.append(f"{name}({', '.join(special)})")
        names = [f.name for f in fields(self) if f.name not in ("seed", "base", "pieces")]
        said += [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) != getattr(plain, name)]
        return ", ".join(said)

    def simpler(self) -> Iterator["Spec"]:
        """The same with one thing less."""
        for i in range(len(self.pieces)):
            if len(self.pieces) > 1:
                yield replace(self, pieces=self.pieces[:i] + self.pieces[i + 1 :])
        for i in range(len(self.edits)):
            yield replace(self, edits=self.edits[:i] + self.edits[i + 1 :])
        plain = Spec(self.seed)
        for name in ("layout", "trained", "input_requires_grad", "autocast", "dtype", "adapter", "options"):
            if getattr(self, name) != getattr(plain, name):
                yield replace(self, **{name: getattr(plain, name)})
        if len(self.batches) > 1:
            yield replace(self, batches=self.batches[:-1])
            yield replace(self, batches=self.batches[1:])
        for i, (name, options) in enumerate(self.pieces):
            for key, value in options.items():
                if value != (first := PIECES[name].choices[key][0]):
                    changed = (name, {**options, key: first})
                    yield replace(self, pieces=(*self.pieces[:i], changed, *self.pieces[i + 1 :]))


def draw(seed: int) -> Spec:
    """The random case of a seed."""
    r = random.Random(seed)
    base = r.choice(("tokens", "tokens", "tokens", "images", "images", "real"))
    pieces: list[tuple[str, dict[str, Any]]] = []
    if base == "real":
        base = r.choice(FAMILIES)
    else:
        pool = TOKEN_PIECES if base == "tokens" else IMAGE_PIECES
        for _ in range(r.choice((1, 2, 2, 3))):
            name = r.choice(list(pool))
            # each choice is plain half of the time, or pieces would hardly ever be alone in what is special of them
            picks = {k: v[0] if r.random() < 0.5 else r.choice(v) for k, v in pool[name].choices.items()}
            pieces.append((name, picks))
        if r.random() < 0.7:
            pieces.append(pieces[0])  # blocks of a kind share a recording
    edits = [(r.choice(EDITS), r.random()) for _ in range(r.choice((0, 1, 1, 2, 3)))]
    options: dict[str, Any] = {}
    if (tiles := r.choice(("auto", "auto", 1, 2, 3))) != "auto":
        options["mlp_tiles"] = tiles
    if r.random() < 0.25:
        options["compress_linear_inputs"] = True
    if r.random() < 0.2:
        options["backend"] = "reference"
    if r.random() < 0.15:
        options["group_size"] = r.choice((8, 7, 64))
    return Spec(
        seed,
        base,
        tuple(pieces),
        tuple(edits),
        r.choice(("plain", "plain", *LAYOUTS)),
        tuple(r.choice(((4, 4), (4, 4, 5, 3), (2, 6, 2), (1, 3), (7, 7)))),
        r.choice(("vectors", "all", "random", "last", "first")),
        r.random() < 0.2,
        r.random() < 0.15,
        r.choice(("float32",) * 8 + ("float64", "bfloat16")),
        r.choice((None, None, None, "lora", "s2a", "s2a-bias")),
        options,
    )


class Network(nn.Module):
    """A stem, blocks, a head; what edits ask for is read here."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.images = spec.base == "images"
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1) if self.images else nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(PIECES[name](WIDTH, **options) for name, options in spec.pieces)
        self.head = nn.Linear(WIDTH, 5)
        self.edits = tuple(name for name, _ in spec.edits)
        self.mode = False

    def forward(self, x: Tensor) -> Any:
        x, seen = self.stem(x), []
        for index, block in enumerate(self.blocks):
            if "checkpoint" in self.edits:
                x = checkpoint(block, x, use_reentrant=False)
            elif "checkpoint, reentrant" in self.edits:
                x = checkpoint(block, x, use_reentrant=True)
            elif "no_grad inside" in self.edits and index == 0:
                with torch.no_grad():
                    x = block(x)
            else:
                x = block(x)
            if "detach" in self.edits and index == 0:
                x = x.detach() + 0.5 * x
            if "in place between" in self.edits:
                x += 0.1
            if "flag" in self.edits and self.mode:
                x = x + x.mean(0, keepdim=True)
            if "activation called outside" in self.edits:
                activation = next((m for m in block.modules() if isinstance(m, (nn.GELU, nn.SiLU, nn.ReLU))), None)
                x = x if activation is None else x + activation(x * 1.0)
            seen.append(x)
        y = self.head(x.mean((2, 3) if self.images else 1))
        return (y, seen) if "return all" in self.edits else y


class RandomCase(Case):
    """The case of a spec."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.batches = spec.batches
        self.input_requires_grad = spec.input_requires_grad
        self.dtype = getattr(torch, spec.dtype)
        # rounding of results in bfloat16 is not reproduced bit by bit, and decides about gradients
        self.bits_matter = spec.dtype != "bfloat16"
        self.has_float64 = not spec.autocast
        if spec.autocast or spec.dtype == "bfloat16":
            self.output_error = 4e-2
            self.error, self.cosine, self.norm = 0.15, 0.98, 0.08
        self.shape = (3, 9, 7) if spec.base == "images" else (TokenMixing.TOKENS, WIDTH)
        if spec.base not in ("tokens", "images"):
            self.shape = (3, 32, 32)
        self.kept: list[Any] = []
        self.handles: list[Any] = []

    @property
    def has(self) -> set[str]:
        return {name for name, _ in self.spec.edits}

    def build(self) -> nn.Module:
        if self.spec.base in ("tokens", "images"):
            model: nn.Module = Network(self.spec)
        else:
            from tests.families import FAMILIES as builders

            model = builders[self.spec.base]()
        for edit, number in self.spec.edits:
            self._edit(model, edit, number)
        if "checkpoint" in self.has or "checkpoint, reentrant" in self.has:
            # a checkpoint recomputes only if something was kept, and moves running statistics again only then
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.momentum, module.num_batches_tracked = 0.0, None
        return model

    def train_what(self, model: nn.Module) -> None:
        r = random.Random(self.spec.seed)
        parameters = list(model.parameters())
        for index, parameter in enumerate(parameters):
            parameter.requires_grad_(
                {
                    "vectors": parameter.dim() < 2,
                    "all": True,
                    "random": r.random() < 0.4,
                    "last": index >= len(parameters) - 2,
                    "first": index < 2,
                }[self.spec.trained]
            )

    def after_wrapping(self, model: nn.Module) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "s2a_up" in name or "lora_B" in name:
                    parameter.mul_(0.1)  # or random branches would saturate what is behind them
        for edit, number in self.spec.edits:
            if edit.endswith(", late"):
                self._edit(model, edit.removesuffix(", late"), number)
        if "global" in self.has:
            self.handles.append(nn.modules.module.register_module_forward_hook(lambda m, a, out: None))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def before(self, model: nn.Module, step: int) -> None:
        for edit, number in self.spec.edits:
            if edit == "switch mode":
                model.train(step % 2 == 0)
            elif edit == "switch gradients" and step > 0:
                parameters = list(model.parameters())
                parameter = parameters[int(number * len(parameters))]
                parameter.requires_grad_(not parameter.requires_grad)
            elif edit == "flag":
                for module in model.modules():
                    if isinstance(module, Network):
                        module.mode = step % 2 == 1

    def _edit(self, model: nn.Module, edit: str, number: float) -> None:
        modules = [m for name, m in model.named_modules() if name]
        module, kept = modules[int(number * len(modules))], self.kept
        activations = [
            (parent, name)
            for parent in model.modules()
            for name, child in parent.named_children()
            if type(child).__module__.startswith(("torch.nn.modules.activation", "transformers.activations"))
        ]

        def keep(module: nn.Module, args: Any, out: Any) -> None:
            kept.append(out)

        def scaled(module: nn.Module, args: Any, out: Any) -> Any:
            return out * 0.5 if isinstance(out, Tensor) else None

        match edit:
            case "hook keeps":
                module.register_forward_hook(keep)
            case "hook changes":
                module.register_forward_hook(scaled)
            case "pre-hook changes":
                module.register_forward_pre_hook(
                    lambda m, args: (args[0] * 0.5, *args[1:]) if args and isinstance(args[0], Tensor) else None
                )
            case "backward hook":
                module.register_full_backward_hook(lambda m, gi, go: kept.append(len(go)))
            case "backward hook changes":
                module.register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else g * 0.5 for g in gi))
            case "gradient hook":
                module.register_forward_hook(
                    lambda m, a, out: (
                        out.register_hook(lambda g: g * 0.5) and None
                        if isinstance(out, Tensor) and out.requires_grad
                        else None
                    )
                )
            case "eval":
                module.eval()
            case "share activation" if len(activations) > 1:
                first, last = activations[0], activations[-1]
                setattr(last[0], last[1], getattr(*first))
            case "replace activation" if activations:
                parent, name = activations[int(number * len(activations))]
                setattr(parent, name, ACTIVATIONS[random.Random(number).choice(list(ACTIVATIONS))]())
            case "share block" if isinstance(model, Network):
                model.blocks.append(model.blocks[0])
            case "patch":
                forward = module.forward
                module.forward = lambda *args, **kwargs: forward(*args, **kwargs)

    def inputs(self, step: int, batch: int, generator: torch.Generator) -> tuple[tuple, dict]:
        (x,), kwargs = super().inputs(step, batch, generator)
        match self.spec.layout:
            case "transposed":
                x = x.transpose(0, -1).contiguous().transpose(0, -1)
            case "expanded":
                x = x[:1].expand_as(x)
            case "strided":
                x = torch.stack([x, -x], -1)[..., 0]
            case "offset":
                x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
            case "channels_last" if x.dim() == 4:
                x = x.to(memory_format=torch.channels_last)
        return (x,), kwargs

    def call(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.kept.clear()
        context = torch.autocast("cpu", torch.bfloat16) if self.spec.autocast else nullcontext()
        with context:
            if "no_grad first" in self.has:
                with torch.no_grad():
                    model(*args, **kwargs)
            result = model(*args, **kwargs)
            if "twice" in self.has:
                result = [result, model(*(-x for x in args), **kwargs)]
            if "accumulate" in self.has:
                sum(t.float().square().mean() for t in self.loss_terms(model, result)).backward()
                result = model(*args, **kwargs)
        return result

    def watched(self, model: nn.Module) -> Any:
        return list(self.kept)


def failures(spec: Spec) -> list[str]:
    """In words, what differs from stock; nothing where the stock model itself cannot run the case."""
    setting = Setting("random", tuple(spec.options.items()), spec.adapter)
    try:
        return list(differences(lambda: RandomCase(spec), setting, spec.seed))
    except StockFails:
        return []


def share_planned(specs: list[Spec]) -> float:
    """The share of cases that run at least one block by a plan: the others say nothing about plans."""
    planned = 0
    for spec in specs:
        case = RandomCase(spec)
        try:
            model = quantize_activations(case.build(), dict(spec.options, bits=8))
            case.train_what(model)
            (x,), _ = case.inputs(0, 4, torch.Generator())
            model(x)
        except Exception:
            continue
        finally:
            case.close()
        planned += any(
            planner is not None and planner.reason is None and planner._chosen
            for m in model.modules()
            if (planner := getattr(getattr(m, "_activation_settings", None), "planner", None)) is not None
        )
    return planned / len(specs)


def smallest(spec: Spec, budget: int = 60) -> tuple[Spec, list[str]]:
    """A simpler case that fails too, found by leaving out one thing after another."""
    found = failures(spec)
    progress = True
    while progress and budget > 0:
        progress = False
        for simpler in spec.simpler():
            budget -= 1
            if budget < 0:
                break
            try:
                other = failures(simpler)
            except Exception as error:
                other = [f"{type(error).__name__}: {error}"]
            if other:
                spec, found, progress = simpler, other, True
                break
    return spec, found
