"""`ActivationQuantizationConfig`: which operators keep what for backward, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .backends import BACKENDS
from .codec import LARGEST_GROUP, WIDTHS
from .quantizer import ROUNDINGS, Quantizer


WIDE_HEAD = 32  # channels; attention with wider heads has smaller groups by default
OPERATOR_KINDS = ("activation", "gated_activation", "norm", "softmax", "attention", "linear")


_LARGEST_LEVEL = 1e4  # of slopes that activation functions have


@dataclass
class ActivationQuantizationConfig:
    """How a model's activations are quantised. Written to JSON and read back unchanged.

    Args:
        bits: width of a code, 1, 2, 3, 4 or 8, for every operator; or a dict from operator kind ("activation",
            "gated_activation", "norm", "softmax", "attention", "linear"), module name or "default" to a width. A
            module name, or the end of one ("mlp.activation"), is for all operators in that module and the modules
            inside. It goes before a kind, a longer name before a shorter one; "name:kind" is for the operators of one
            kind and goes before the name alone. What is not named gets "default", else 4. Piecewise-linear activation
            functions, max pooling and dropout are exact and ignore it.
        group_size: neighbouring values that share bounds, which take two bytes and a quarter. None: 32, and 16 for
            attention with heads of more than 32 channels, whose gradients suffer most from coarse groups.
        rounding: "nearest", or "stochastic": unbiased, seeded by torch's default CPU generator.
        levels: fitted derivative levels of activation functions: a dict from module name (or its end) to ``2 ** bits``
            ascending numbers. None: the shipped tables.
        backend: "auto", "reference", "compiled" or "triton". "auto" takes Triton on CUDA and the compiled kernels on
            the CPU, and the reference where those cannot be had.
        mlp_tiles: tiles a frozen MLP's tokens are taken in: "auto" (by size), or a number; 1 switches tiling off.
        skip_modules: names (or ends of names) of modules to leave in full precision, with everything in them.
        compress_linear_inputs: also keep the inputs of trained Linear and Conv2d layers as codes.
    """

    bits: int | dict[str, int] = 4
    group_size: int | None = None
    rounding: str = "nearest"
    levels: dict[str, Sequence[float]] | None = None
    backend: str = "auto"
    mlp_tiles: int | str = "auto"
    skip_modules: list[str] | None = None
    compress_linear_inputs: bool = False

    def __post_init__(self) -> None:
        widths = self.bits if isinstance(self.bits, Mapping) else {"bits": self.bits}
        for key, bits in widths.items():
            if not isinstance(key, str) or type(bits) is not int or bits not in WIDTHS:
                where = "bits" if widths is not self.bits else f"bits[{key!r}]"
                raise ValueError(f"{where} must be one of {WIDTHS}, not {bits!r}")
            if ":" in key and key.rpartition(":")[2] not in OPERATOR_KINDS:
                raise ValueError(f"bits[{key!r}] must name one of the operator kinds {OPERATOR_KINDS} after the colon")
        if self.group_size is not None:
            _check_int("group_size", self.group_size, "or None")
            if self.group_size > LARGEST_GROUP:
                raise ValueError(f"group_size must be at most {LARGEST_GROUP}, not {self.group_size}")
        for name, allowed in (("rounding", ROUNDINGS), ("backend", BACKENDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        if self.mlp_tiles != "auto":
            _check_int("mlp_tiles", self.mlp_tiles, 'or "auto"')
        if not isinstance(self.compress_linear_inputs, bool):
            raise ValueError(f"compress_linear_inputs must be True or False, not {self.compress_linear_inputs!r}")
        if self.skip_modules is not None:
            if isinstance(self.skip_modules, str) or not all(isinstance(name, str) for name in self.skip_modules):
                raise ValueError(f"skip_modules must be a list of module names, not {self.skip_modules!r}")
            self.skip_modules = list(self.skip_modules)
        if isinstance(self.bits, Mapping):
            self.bits = dict(self.bits)
        if self.levels is not None:
            if not isinstance(self.levels, Mapping):
                raise ValueError(f"levels must be a dict from module name to numbers, not {self.levels!r}")
            self.levels = {name: [float(level) for level in levels] for name, levels in self.levels.items()}
            for name, levels in self.levels.items():
                if not all(abs(level) <= _LARGEST_LEVEL for level in levels):  # nor NaN
                    raise ValueError(
                        f"levels[{name!r}] must be derivatives of at most {_LARGEST_LEVEL:g}, not {levels}"
                    )
                self.quantizer("activation", name)  # checks their number against the module's bits

    def quantizer(self, kind: str, module_name: str = "", channels: int | None = None) -> Quantizer:
        """The settings of one operator.

        Args:
            kind: one of `OPERATOR_KINDS`.
            module_name: dotted name of the module it stands in.
            channels: of an attention head, if known.
        """
        if kind not in OPERATOR_KINDS:
            raise ValueError(f"operator kind must be one of {OPERATOR_KINDS}, not {kind!r}")
        bits = self.bits
        if isinstance(bits, dict):
            by_name = {name: width for name, width in bits.items() if name not in (*OPERATOR_KINDS, "default")}
            of_kind = {name.rpartition(":")[0]: width for name, width in bits.items() if name.endswith(f":{kind}")}
            given = {**by_name, **of_kind}
            matching = [name for name in given if any(_names(name, around) for around in _ancestors(module_name))]
            otherwise = bits.get(kind, bits.get("default", 4))
            bits = given[max(matching, key=len)] if matching else otherwise
        levels = _by_module_name(self.levels or {}, module_name) if kind == "activation" else None
        is_wide = kind == "attention" and (channels is None or channels > WIDE_HEAD)
        return Quantizer(
            bits=bits,
            group_size=self.group_size or (16 if is_wide else 32),
            rounding=self.rounding,
            levels=None if levels is None else tuple(levels),
            backend=self.backend,
        )

    def quantizers(self, module_name: str) -> dict[str, Quantizer]:
        """The settings of all kinds of operators in a module, and of "narrow_attention": heads of up to 32 channels."""
        settings = {kind: self.quantizer(kind, module_name) for kind in OPERATOR_KINDS}
        return {**settings, "narrow_attention": self.quantizer("attention", module_name, WIDE_HEAD)}

    def skips(self, module_name: str) -> bool:
        """Whether the module, or one that contains it, is named by ``skip_modules``."""
        around = _ancestors(module_name)
        return any(_names(name, ancestor) for name in self.skip_modules or () for ancestor in around)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ActivationQuantizationConfig":
        """The config that `to_dict` wrote; ValueError on unknown keys or values."""
        known = {f.name for f in fields(cls)}
        if unknown := set(data) - known:
            raise ValueError(f"unknown activation quantisation settings {sorted(unknown)}; known: {sorted(known)}")
        return cls(**data)


def _check_int(name: str, value: Any, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer {otherwise}".rstrip() + f", not {value!r}")


def _ancestors(module_name: str) -> list[str]:
    """The names of a module and of those around it."""
    parts = module_name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _names(name: str, module_name: str) -> bool:
    return module_name == name or module_name.endswith("." + name)


def _by_module_name(table: Mapping[str, Any], module_name: str, default: Any = None) -> Any:
    """The entry of the longest name that is ``module_name`` or an end of it."""
    matching = [name for name in table if _names(name, module_name)]
    return table[max(matching, key=len)] if matching else default
