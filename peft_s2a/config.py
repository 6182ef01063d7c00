"""The configurations of the S2A tuners: what a user sets, validated when it is set."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import PeftType

from peft_s2a.activations.config import ActivationQuantizationConfig
from peft_s2a.patterns import check_pattern
from peft_s2a.registration import add_peft_types


add_peft_types()

STRUCTURES = ("bias", "prompt", "side")
SIDE_MODES = ("residual", "ladder")
SIDE_ACTIVATIONS = ("gelu", "linear")
SIDE_INITIALISATIONS = ("orthogonal", "svd")
HOW_TO_LOAD = "pip install peft-s2a, then `import peft_s2a` before PEFT or transformers load the adapter"


def _check_choice(config: PeftConfig, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {_short(value)}.")


# A configuration may come from a stranger's file. These are far above what is of use, and below what does harm.
LARGEST_SIZE = 8192
LARGEST_ALPHA = 1e6
LONGEST_NAME = 1000
MOST_NAMES = 100_000


def _check_size(config: PeftConfig, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {_short(value)}.")
    if value > LARGEST_SIZE:
        raise ValueError(f"`{name}` must be at most {LARGEST_SIZE}, got {_short(value)}.")


def _check_bool(config: PeftConfig, name: str) -> None:
    if not isinstance(getattr(config, name), bool):
        raise ValueError(f"`{name}` must be True or False, got {_short(getattr(config, name))}.")


def _short(value: Any) -> str:
    """`repr(value)`, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to print larger ones
        return "a huge integer"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check_names(config: PeftConfig, name: str) -> None:
    value = getattr(config, name)
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"`{name}` must be None, a string or a list of strings, got {_short(value)}.")
    _check_lengths(name, value)


def _check_lengths(what: str, names: Collection[str]) -> None:
    if len(names) > MOST_NAMES:
        raise ValueError(f"`{what}` must hold at most {MOST_NAMES} names, got {len(names)}.")
    if any(len(name) > LONGEST_NAME for name in names):
        raise ValueError(f"`{what}` must hold names of at most {LONGEST_NAME} characters.")


@dataclass
class _S2ABaseConfig(PeftConfig):
    """What all S2A tuners share. The fields are described in [`S2AConfig`]."""

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules to adapt: a list of names or name endings, a regular expression, or 'all-linear'. Each "
            "requested structure attaches to those it can serve. None: chosen from the model's own modules."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone: a list of names or name endings, or an expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt. None: all of them."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list that holds the layers, if `layers_to_transform` is set."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules trained in full and saved with the adapter. None: the task head; []: none."},
    )
    freeze_batch_norm_stats: bool = field(
        default=True,
        metadata={
            "help": "Keep the running statistics of batch normalisation as they are. With False they follow the "
            "training images and are saved with the adapter."
        },
    )
    activation_quantization: ActivationQuantizationConfig | dict[str, Any] | None = field(
        default_factory=ActivationQuantizationConfig,
        metadata={"help": "How activations kept for backward are quantised. None: not at all."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start as the base model, exactly. False: a random start, for tests."},
    )
    structure_targets: dict[str, list[str]] | None = field(
        default=None,
        metadata={
            "help": "For each structure the full names of the modules it sits on. Filled in when the adapter is made, "
            "so that it is rebuilt in the same places; not meant to be set by hand."
        },
    )

    how_to_load: str | None = field(
        default=None,
        metadata={"help": "For readers of the file who lack this package; always the same, whatever is passed."},
    )

    dropped_targets: dict[str, dict[str, str]] | None = field(
        default=None,
        metadata={
            "help": "For each structure the modules that the defaults proposed and that cannot carry it, with the reason. "
            "Filled in when the adapter is made; not meant to be set by hand."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.how_to_load = HOW_TO_LOAD
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            _check_names(self, name)
        if isinstance(self.modules_to_save, str):
            raise ValueError(
                f"`modules_to_save` must be None or a list of names, got the string {_short(self.modules_to_save)}."
            )
        _check_names(self, "modules_to_save")
        self._check_patterns()
        for name in ("freeze_batch_norm_stats", "init_weights", "inference_mode"):
            _check_bool(self, name)
        layers = self.layers_to_transform
        if not all(type(layer) is int for layer in (layers if isinstance(layers, (list, tuple)) else [layers or 0])):
            raise ValueError(
                f"`layers_to_transform` must be None, an integer or a list of them, got {_short(layers)}."
            )
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if isinstance(self.activation_quantization, dict):
            self.activation_quantization = ActivationQuantizationConfig.from_dict(self.activation_quantization)
        elif not isinstance(self.activation_quantization, (ActivationQuantizationConfig, type(None))):
            raise ValueError(
                "`activation_quantization` must be an ActivationQuantizationConfig, a dict of its arguments or None, "
                f"got {_short(self.activation_quantization)}."
            )
        self._check_structure_targets()

    def _check_patterns(self) -> None:
        """Refuses regular expressions that could run for ever; PEFT takes these arguments for such."""
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_pattern(name, value)
            elif name in ("layers_pattern", "modules_to_save"):
                for item in value or ():
                    check_pattern(name, item)

    def _check_structure_targets(self) -> None:
        if self.structure_targets is None:
            return
        valid = isinstance(self.structure_targets, dict) and all(
            structure in (*STRUCTURES, "ladder", "statistics")
            and isinstance(names, (list, tuple))
            and all(isinstance(name, str) for name in names)
            for structure, names in self.structure_targets.items()
        )
        if not valid:
            raise ValueError(
                "`structure_targets` must map 'bias', 'prompt', 'side', 'ladder' or 'statistics' to lists of module "
                f"names, got {_short(self.structure_targets)}."
            )
        for structure, names in self.structure_targets.items():
            _check_lengths(f"structure_targets[{structure!r}]", names)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types: no sets, no nested dataclasses, in a reproducible order."""
        plain = dataclasses.asdict(self)
        return {key: sorted(value) if isinstance(value, set) else value for key, value in plain.items()}


@dataclass
class S2ABiasConfig(_S2ABaseConfig):
    """Trains offsets of linear, convolution and normalisation layers (BitFit, Zaken et al. 2022, arXiv:2106.10199).

    Args:
        train_norm_scale:
            Also train the scale of layer, group and RMS normalisations. Their normalised input is kept for backward
            in any case, so this costs no memory. Batch normalisation with frozen statistics is left out: there it
            would cost a whole activation.
        kwargs: the arguments shared by all S2A tuners, see [`S2AConfig`].
    """

    structures: ClassVar[tuple[str, ...]] = ("bias",)

    train_norm_scale: bool = field(default=True, metadata={"help": "Also train the scale of normalisations."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bool(self, "train_norm_scale")
        self.peft_type = PeftType.S2A_BIAS  # type: ignore[attr-defined]


@dataclass
class S2APromptConfig(_S2ABaseConfig):
    """Trains key/value tokens that every attention layer also attends to, through a gate that starts at zero.

    The joint form is a gated second attention (zero-init attention of LLaMA-Adapter, Zhang et al. 2023,
    arXiv:2303.16199, over prompts as in VPT, Jia et al. 2022, arXiv:2203.12119); models without attention get a
    zero-initialised pattern added to the image (visual prompting, Bahng et al. 2022, arXiv:2203.17274).

    Args:
        num_prompt_tokens: Prompt tokens per attention layer; the side of the square input pattern otherwise.
        kwargs: the arguments shared by all S2A tuners, see [`S2AConfig`].
    """

    structures: ClassVar[tuple[str, ...]] = ("prompt",)

    num_prompt_tokens: int = field(default=8, metadata={"help": "Prompt tokens per attention layer."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_size(self, "num_prompt_tokens")
        self.peft_type = PeftType.S2A_PROMPT  # type: ignore[attr-defined]


@dataclass
class S2ASideConfig(_S2ABaseConfig):
    """Trains low-rank branches beside modules of a backbone, or a ladder of them beside the whole backbone.

    Args:
        side_rank:
            Width r of a branch. None: 32, in "residual" mode at most the width of the features it reads.
        side_alpha: A branch is scaled by `side_alpha / side_rank`.
        side_mode:
            "residual": `y = base(x) + side_alpha / side_rank * U f(D x)` with frozen D, so that only tensors of width
            r are kept for backward. "ladder": a recurrent state of width r runs beside a backbone that needs no
            backward pass, and joins it before the head.
        side_activation: f: "gelu", or "linear" for branches that can be merged into a linear layer.
        side_init: D: "orthogonal" rows, or "svd", the top right-singular vectors of the layer beside it. They have
            length 1, and less beside modules that put out little.
        kwargs: the arguments shared by all S2A tuners, see [`S2AConfig`].
    """

    structures: ClassVar[tuple[str, ...]] = ("side",)

    side_rank: int | None = field(
        default=None, metadata={"help": "Width of a side branch. None: 32, less beside narrow layers."}
    )
    side_alpha: float = field(default=16.0, metadata={"help": "Side branches are scaled by side_alpha / side_rank."})
    side_mode: str = field(default="residual", metadata={"help": "'residual' or 'ladder'."})
    side_activation: str = field(default="gelu", metadata={"help": "'gelu', or 'linear' (mergeable)."})
    side_init: str = field(default="orthogonal", metadata={"help": "Frozen projection: 'orthogonal' or 'svd'."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side_rank is not None:
            _check_size(self, "side_rank")
        alpha = self.side_alpha
        is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if not is_number or not 0 < alpha <= LARGEST_ALPHA:  # NaN compares as False
            raise ValueError(f"`side_alpha` must be a positive number up to {LARGEST_ALPHA:g}, got {_short(alpha)}.")
        _check_choice(self, "side_mode", SIDE_MODES)
        _check_choice(self, "side_activation", SIDE_ACTIVATIONS)
        _check_choice(self, "side_init", SIDE_INITIALISATIONS)
        self.peft_type = PeftType.S2A_SIDE  # type: ignore[attr-defined]


@dataclass
class S2AConfig(S2ASideConfig, S2APromptConfig, S2ABiasConfig):
    """Structure-activation synergy (Jin et al. 2025, arXiv:2503.08154): any combination of the three structures.

    The paper names the structures (bias, prompt, side) and the 4-bit derivative-aware quantisation; their inner form
    is our choice and described where it is implemented.

    Args:
        structures: Which of "bias", "prompt" and "side" to train.
        target_modules:
            Modules to adapt, as in PEFT: names or name endings, a regular expression, or "all-linear". Every requested
            structure attaches to those of them that it can serve: bias to Linear, Conv and normalisations; side to
            Linear, Conv1d/2d and MLP or stage modules whose input and output are single tensors; prompt to attention
            modules. None chooses the targets from the model.
        exclude_modules: Modules to leave alone.
        layers_to_transform: Indices of the layers to adapt.
        layers_pattern: Name of the list that holds these layers.
        modules_to_save:
            Modules trained in full and saved with the adapter. None finds the task head by itself; [] is none. Names are
            endings, as in PEFT, or whole names where "^" stands before them.
        num_prompt_tokens: See [`S2APromptConfig`].
        side_rank, side_alpha, side_mode, side_activation, side_init: See [`S2ASideConfig`].
        train_norm_scale: See [`S2ABiasConfig`].
        freeze_batch_norm_stats:
            Keep the running statistics of batch normalisation as they are, so that an adapter reloads bit-exactly.
            With False they follow the training images and are saved with the adapter.
        activation_quantization:
            How activations kept for backward are quantised: an [`ActivationQuantizationConfig`], a dict of its
            arguments, or None to leave activations alone. Of several adapters in one model, the one added last
            decides.
        init_weights: Start exactly as the base model; False gives a random start, for tests.

    Raises:
        ValueError: if an argument is out of range, or if a ladder is combined with other structures.

    Examples:
        >>> from transformers import AutoModelForImageClassification
        >>> from peft import get_peft_model
        >>> from peft_s2a import S2AConfig
        >>> model = AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k", num_labels=10)
        >>> model = get_peft_model(model, S2AConfig())
    """

    structures: tuple[str, ...] = field(default=STRUCTURES, metadata={"help": "Which of bias, prompt, side to train."})  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.S2A  # type: ignore[attr-defined]
        if isinstance(self.structures, str) or not isinstance(self.structures, (list, tuple, set)):
            raise ValueError(
                f"`structures` must be a tuple of names out of {STRUCTURES}, got {_short(self.structures)}."
            )
        unknown = [structure for structure in self.structures if structure not in list(STRUCTURES)]
        if unknown or not self.structures:
            raise ValueError(
                f"`structures` must hold one or more of {STRUCTURES}, got {_short(tuple(self.structures))}."
            )
        self.structures = tuple(structure for structure in STRUCTURES if structure in self.structures)
        if self.side_mode == "ladder" and self.structures != ("side",):
            raise ValueError(
                "`side_mode='ladder'` runs beside a backbone without gradient, so it cannot be combined with other "
                f"structures: pass `structures=('side',)` instead of {self.structures!r}, or `side_mode='residual'`."
            )
