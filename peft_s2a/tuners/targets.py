"""Where the structures go: the modules of a model that each of them can serve, and those it is put on by default.

What the rules of `anatomy` propose is checked before it is kept, against a forward pass on fake tensors where one can be
made: a structure sits on nothing that is not called, that does not keep the positions it reads, or that the result does
not depend on.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from peft_s2a.anatomy import (
    BATCH_NORMS,
    FUSED_NAMES,
    KEY_NAMES,
    Attention,
    Usage,
    ends,
    find_attention,
    find_blocks,
    find_mlps,
    find_stages,
    find_stem,
    find_task_heads,
    has_running_statistics,
    held_aside,
    hidden_in_heads,
    input_width,
    is_normalisation,
    observe,
    output_width,
    projections,
    saved_whole,
    side_entry,
    visible_modules,
)
from peft_s2a.config import STRUCTURES, S2AConfig, _S2ABaseConfig
from peft_s2a.registration import PREFIX
from peft_s2a.tuners import bias, side
from peft_s2a.tuners.bias import BiasLayer
from peft_s2a.tuners.ladder import LadderRung
from peft_s2a.tuners.prompt import PromptLayer


logger = logging.getLogger(__name__)

STRUCTURE_OF_LAYER = {
    PromptLayer.attribute: "prompt",
    side.SideLayer.attribute: "side",
    LadderRung.attribute: "ladder",
}


def resolve_targets(model: nn.Module, config: _S2ABaseConfig) -> dict[str, list[str]]:
    """Which modules each requested structure sits on.

    Args:
        model: the base model, possibly with adapters already.
        config: the configuration of the adapter to be added. `modules_to_save` has been resolved.

    Returns:
        structure ("bias", "prompt", "side", or "ladder" in ladder mode) -> full module names; under "statistics" the
        batch normalisations whose running statistics are frozen or belong to the adapter. What the defaults propose
        and a module cannot carry is left out, logged, and noted in `config.dropped_targets`.

    Raises:
        NoMatchingPeftModuleError: (a ValueError) if a requested structure has no place to go, or if recorded targets
            are not in this model.
        ValueError: if recorded targets do not fit the modules or the structures of the configuration, or a module
            that the user named cannot carry any of them.
    """
    ladder = getattr(config, "side_mode", "residual") == "ladder"
    structures = ("ladder",) if ladder else config.structures
    # In the order of the model, and where it is known that of use, which a ladder follows.
    order = {name: index for index, (name, _) in enumerate(visible_modules(model))}
    if config.structure_targets is not None:
        targets = config.structure_targets
        _check_recorded_targets(model, config, structures)
    else:
        checks = _Checks(model)
        if config.target_modules is None and checks.usage is None:
            logger.warning(
                "No input could be made that %s takes: where its structures sit by default is not checked.",
                type(model).__name__,
            )
        find = _default_targets if config.target_modules is None else _named_targets
        targets = find(model, config, structures, checks)
        # Of structures that nobody asked for, those without a place do not stand in the way of the others.
        if structures == STRUCTURES and any(targets.values()):
            _log_left_out(model, config, [structure for structure, names in targets.items() if not names])
            targets = {structure: names for structure, names in targets.items() if names}
        for structure in structures:
            if structure in targets and not targets[structure]:
                _raise_no_place(model, config, structure, checks)
        if ladder:
            checks.refuse_heads_without_features(find_task_heads(model))
        if statistics := find_statistics(model, config):
            targets["statistics"] = statistics
        config.dropped_targets = checks.report(structures) or None
        if ladder and checks.usage is not None:
            called = {name: index for index, name in enumerate(checks.usage.calls)}
            order = {name: called.get(name, index) for name, index in order.items()}
    last = len(order)  # of modules in heads that other adapters train
    return {structure: sorted(names, key=lambda name: order.get(name, last)) for structure, names in targets.items()}


class _Checks:
    """Tells which modules cannot carry a structure, from a forward pass on fake tensors (`anatomy.observe`).

    Where no such pass can be made nothing is known, and nothing objected to.

    Args:
        model: the model, possibly with adapters already.

    Attributes:
        usage: how the forward pass uses the model; None if it could not be followed.
        attention: the attention layers, as `find_attention` gives them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.usage: Usage | None = observe(model)
        self.attention = find_attention(model)
        self._held_aside = held_aside(model)
        self._names = {id(module): name for name, module in visible_modules(model)}
        self._dropped: dict[tuple[str, str], list[str]] = {}

    def keep(self, structure: str, names: Iterable[str]) -> list[str]:
        """Those of `names` that can carry `structure`. Parts that the result does not depend on are left out quietly;
        others are remembered for the report."""
        kept = []
        for name in names:
            if not self.is_used(name):
                continue
            if reason := self.objection(structure, name):
                self._dropped.setdefault((structure, reason), []).append(name)
            else:
                kept.append(name)
        return kept

    def report(self, structures: Iterable[str]) -> dict[str, dict[str, str]]:
        """Logs what was left out of the structures, and returns it: structure -> name -> reason."""
        found: dict[str, dict[str, str]] = {}
        for structure in structures:
            reasons = {
                reason: list(dict.fromkeys(names))
                for (kind, reason), names in self._dropped.items()
                if kind == structure
            }
            if not reasons:
                continue
            found[structure] = {name: reason for reason, names in reasons.items() for name in names}
            told = [f"{', '.join(names)}: it {reason}" for reason, names in list(reasons.items())[:3]]
            if others := list(reasons.values())[3:]:
                told.append(f"{sum(map(len, others))} other modules, see `dropped_targets` of the configuration")
            logger.warning("No %s on %s.", structure, "; on ".join(told))
        return found

    def is_used(self, name: str) -> bool:
        """Whether the result depends on the module, as far as that can be told."""
        if self.usage is None or not self.usage.knows(name):
            return True
        is_reached = name not in self.usage.dead if self.usage.reached is None else name in self.usage.reached
        return name in self.usage.calls and is_reached

    def objection(self, structure: str, name: str) -> str | None:
        """Why the module cannot carry the structure, as a predicate of it; None if it can, or nothing is known."""
        module = self.model.get_submodule(name)
        if id(module) in self._held_aside and projections(module) in ([module], []):
            return "is called through a list that its parent keeps, past any wrapper"
        if self.usage is None or name not in self.usage.calls:
            return None
        check: Callable[[str], str | None] = {
            "side": self._side, "prompt": self._prompt, "ladder": self._ladder
        }.get(structure, lambda name: None)  # fmt: skip
        return check(name)

    def _side(self, name: str) -> str | None:
        host = self.model.get_submodule(name)
        parent_name, _, own_name = name.rpartition(".")
        entry = side_entry(self.model.get_submodule(parent_name), own_name)
        if not projections(host):
            return "holds no linear layer or convolution"
        first, last = ends(host, entry)
        read = self.usage.calls.get(name if entry is None else f"{parent_name}.intermediate".lstrip("."), ())
        for before, after in zip(read, self.usage.calls[name]):
            x, y = before.input, after.output
            if x is None or y is None:
                return "does not read and return single tensors"
            if not before.reads:
                return "reads a constant"
            if isinstance(first, nn.Linear):
                fits = x[:-1] == y[:-1]
                fits = fits and (x[-1], y[-1]) == (first.in_features, output_width(last))
            else:
                fits = len(x) == len(y) and len(x) in (3, 4)
                fits = fits and (x[1], y[1]) == (input_width(first), output_width(last))
                fits = fits and len(first.kernel_size) == len(x) - 2 and x[0] == y[0]
            if not fits:
                return f"turns {tuple(x)} into {tuple(y)}, between which no branch of its first and last layer fits"
        return None

    def _prompt(self, name: str) -> str | None:
        if name not in self.attention:  # the pattern on the image
            calls = self.usage.calls[name]
            is_image = all(call.input is not None and len(call.input) == 4 and call.reads for call in calls)
            return None if is_image else "does not read an image"
        parts = self.attention[name]
        queries, outputs = (
            self.usage.calls.get(self._names.get(id(layer), ""), ()) for layer in (parts.query, parts.output)
        )
        if len(queries) != len(outputs) or not queries:
            return "does not call its query and output projections equally often"
        for query, output in zip(queries, outputs):
            q, attended = query.output, output.input
            if q is None or attended is None or len(q) < 3 or len(attended) < 3:
                return "has no sequence of queries"
            if q[:-1].numel() != attended[:-1].numel() or attended[-1] != parts.width:
                return "does not keep its tokens between the query and the output projection"
        return None

    def _ladder(self, name: str) -> str | None:
        layers = projections(self.model.get_submodule(name))
        for call in self.usage.calls[name]:
            if call.input is None or not call.reads:
                return "does not read features"
            samples = call.input[0] == self._samples
            if (
                not layers
                or len(call.input) < 3
                or not samples
                or input_width(layers[0]) not in (call.input[1], call.input[-1])
            ):
                return "does not read a batch of features of the width of its first layer"
        return None

    @property
    def _samples(self) -> int:
        return next(call.input[0] for calls in self.usage.calls.values() for call in calls if call.input is not None)

    def refuse_heads_without_features(self, heads: list[str]) -> None:
        """A ladder joins the features that all heads read, which must be tensors of one width."""
        if self.usage is None:
            return
        calls = {name: self.usage.calls[name][0] for name in heads if name in self.usage.calls}
        width = input_width(projections(self.model.get_submodule(heads[0]))[0]) if heads else None
        unfit = [
            name
            for name, call in calls.items()
            if call.input is None or width not in (call.input[-1], call.input[min(1, len(call.input) - 1)])
        ]
        if unfit:
            raise NoMatchingPeftModuleError(
                f"A ladder joins the features that the heads of {type(self.model).__name__} read, but {unfit[0]!r} reads "
                "no single tensor of the others' width (several feature maps, say). Use `side_mode='residual'` instead of "
                "a ladder."
            )


def find_statistics(model: nn.Module, config: _S2ABaseConfig) -> list[str]:
    """The normalisations with running statistics, but for those in modules that are trained in full.

    Raises:
        ValueError: if the adapter is to have statistics of its own in a head that another adapter trains in full.
    """
    hidden = dict(hidden_in_heads(model))
    found = [
        name
        for name, module in {**dict(visible_modules(model)), **hidden}.items()
        if has_running_statistics(module) and not _is_saved_whole(config, name)
    ]
    shared = [name for name in found if name in hidden]
    if shared and not config.freeze_batch_norm_stats:
        raise ValueError(
            f"With `freeze_batch_norm_stats=False` the adapter would have statistics of its own in {shared[0]!r}, which "
            "another adapter trains in full. Freeze them, or train this head too (`modules_to_save`)."
        )
    return found


def recorded_in(state_dict: Iterable[str]) -> dict[str, list[str]]:
    """The targets of the adapter whose weights have these keys; see `resolve_targets`."""
    targets: dict[str, list[str]] = {}
    for key in state_dict:
        host, found, parameter = key.rpartition(f".{PREFIX}")
        name, _, attribute = host.rpartition(".")
        if found and attribute in STRUCTURE_OF_LAYER:
            targets.setdefault(STRUCTURE_OF_LAYER[attribute], []).append(name)
        elif found and PREFIX + parameter in BiasLayer.adapter_layer_names:
            targets.setdefault("bias", []).append(host)
    return {structure: list(dict.fromkeys(names)) for structure, names in targets.items()}


def _check_recorded_targets(model: nn.Module, config: _S2ABaseConfig, structures: tuple[str, ...]) -> None:
    modules = dict(visible_modules(model))
    attention = find_attention(model)
    for structure, names in config.structure_targets.items():
        if structure not in (*structures, "statistics"):
            raise ValueError(
                f"`structure_targets` names {structure!r}, but this configuration trains only {structures}."
            )
        known = {**modules, **dict(hidden_in_heads(model))} if structure == "statistics" else modules
        missing = [name for name in names if name not in known]
        if missing:
            raise NoMatchingPeftModuleError(
                f"The configuration was made for modules that {type(model).__name__} does not have: {missing[:3]}"
                f"{' and others' if len(missing) > 3 else ''}. Use the base model that the adapter was trained with, "
                f"or a new {type(config).__name__} for a new model."
            )
        for name in names:
            is_stem = structure == "prompt" and isinstance(known[name], nn.Conv2d)
            if not is_stem and not _can_carry(structure, name, known[name], attention):
                raise ValueError(
                    f"`structure_targets` puts {structure!r} on {name!r}, a {type(known[name]).__name__}, which "
                    "cannot carry it. Use the base model that the adapter was trained with."
                )


def _can_carry(structure: str, name: str, module: nn.Module, attention: dict[str, Attention]) -> bool:
    if structure == "bias":
        return bias.can_serve(module)
    if structure == "prompt":
        return name in attention
    if structure == "statistics":
        return has_running_statistics(module)
    return side.can_serve(module)


def _log_left_out(model: nn.Module, config: _S2ABaseConfig, structures: list[str]) -> None:
    if structures and config.target_modules is None:
        logger.warning(
            "%s has no place for %s, and is adapted without. `target_modules` can name one.",
            type(model).__name__,
            " and ".join(structures),
        )


def _raise_no_place(model: nn.Module, config: _S2ABaseConfig, structure: str, checks: _Checks) -> None:
    serves = {
        "bias": "linear, convolution and normalisation layers",
        "prompt": "attention layers with a query and an output projection"
        + (" (or the first convolution of a network without attention)" if config.target_modules is None else ""),
        "side": "Linear, Conv1d, Conv2d, and modules that start and end with such layers",
        "ladder": "blocks of a transformer and stages of a convolutional network",
    }
    dropped = checks.report([structure]).get(structure, {})
    found = "has none" if config.target_modules is None else f"has none among target_modules={config.target_modules!r}"
    if config.exclude_modules or config.layers_to_transform is not None:
        found += ", `exclude_modules` and `layers_to_transform` considered"
    found += "".join(f"; {name!r} {reason}" for name, reason in list(dropped.items())[:3])
    others = [other for other in config.structures if other != structure]
    advice = (
        f", or train without it: `structures={tuple(others)!r}`" if others and isinstance(config, S2AConfig) else ""
    )
    raise NoMatchingPeftModuleError(
        f"The structure {structure!r} has no place to go in {type(model).__name__}: it serves {serves[structure]}, "
        f"and this model {found}. Name suitable modules in `target_modules`{advice}."
    )


def _in_selected_layers(config: _S2ABaseConfig, name: str) -> bool:
    """PEFT's rule: the first number in the name is the layer's index; modules outside the layers are not selected."""
    selected = config.layers_to_transform
    if selected is None or selected == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)(?:\.|$)", name)
        if match is not None:
            return int(match["index"]) in ([selected] if isinstance(selected, int) else selected)
    return False


def is_excluded(config: _S2ABaseConfig, name: str) -> bool:
    """Whether the name is in `exclude_modules` or in a head that is trained in full; as PEFT decides it."""
    excluded = config.exclude_modules
    if isinstance(excluded, str) and re.fullmatch(excluded, name):
        return True
    if not isinstance(excluded, str) and any(name == key or name.endswith(f".{key}") for key in excluded or ()):
        return True
    return _is_saved_whole(config, name)


def _is_saved_whole(config: _S2ABaseConfig, name: str) -> bool:
    return saved_whole(config.modules_to_save or (), name)


def _default_targets(
    model: nn.Module, config: _S2ABaseConfig, structures: tuple[str, ...], checks: _Checks
) -> dict[str, list[str]]:
    if config.modules_to_save and checks.usage is not None and checks.usage.reached is not None:
        # A frozen backbone behind which only the head is trained leaves no other place (CLIPSeg).
        outside = (name for name, module in visible_modules(model) if bias.can_serve(module) and checks.is_used(name))
        if all(is_excluded(config, name) for name in outside):
            logger.warning(
                "Nothing but %s learns in %s: it is adapted instead of trained whole.",
                ", ".join(config.modules_to_save),
                type(model).__name__,
            )
            config.modules_to_save = []
    modules = dict(visible_modules(model))
    saved = (module for name, module in modules.items() if saved_whole(config.modules_to_save or (), name))
    tied = {id(parameter) for module in saved for parameter in module.parameters()}  # other names of the same heads
    names = {
        name
        for name, module in modules.items()
        if not any(id(parameter) in tied for parameter in module.parameters(recurse=False))
    }

    def keep(structure: str, proposed: Iterable[str]) -> list[str]:
        wanted = (
            name
            for name in proposed
            if name in names and _in_selected_layers(config, name) and not is_excluded(config, name)
        )
        return checks.keep(structure, wanted)

    attention = checks.attention
    targets: dict[str, list[str]] = {}
    if "bias" in structures:
        targets["bias"] = keep("bias", _default_bias_targets(model, config))
    if "prompt" in structures:
        stem = find_stem(model, checks.usage)
        targets["prompt"] = keep("prompt", attention) or (keep("prompt", [stem]) if stem else [])
    if "side" in structures:
        same_width = [
            name for name, parts in attention.items() if parts.query.in_features == parts.output.out_features
        ]
        targets["side"] = (
            keep("side", [*find_mlps(model), *same_width])
            or keep("side", find_stages(model))
            or keep("side", find_blocks(model))
            or keep("side", _single_projections(model))
        )
    if "ladder" in structures:
        targets["ladder"] = keep("ladder", find_blocks(model)) or keep("ladder", find_stages(model))
    return targets


def _default_bias_targets(model: nn.Module, config: _S2ABaseConfig) -> list[str]:
    """Leaves whose offset has an effect and can be merged: those that have a bias, and norms with only a scale.

    Left out are key projections (softmax does not see a constant added to all scores of a query, so their bias never
    gets a gradient), convolutions without a bias (a normalisation that has one follows them) and fused projections
    whose attention reads their weight directly.
    """
    modules = dict(visible_modules(model))
    found = []
    for name, module in modules.items():
        parent_name, _, own_name = name.rpartition(".")
        parent = modules.get(parent_name, model)
        reads_directly = own_name in FUSED_NAMES and isinstance(getattr(parent, "q_bias", None), nn.Parameter)
        if not bias.can_serve(module) or own_name in KEY_NAMES or reads_directly:
            continue
        has_bias = isinstance(getattr(module, "bias", None), nn.Parameter)
        trains_scale = getattr(config, "train_norm_scale", False) and is_normalisation(module)
        has_scale = isinstance(getattr(module, "weight", None), nn.Parameter)
        if has_bias or (trains_scale and has_scale and not isinstance(module, BATCH_NORMS)):
            found.append(name)
    return found


def _single_projections(model: nn.Module) -> list[str]:
    heads = find_task_heads(model)
    return [
        name
        for name, module in visible_modules(model)
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
        and getattr(module, "groups", 1) == 1
        and not any(name == head or name.startswith(f"{head}.") for head in heads)
    ]


def _named_targets(
    model: nn.Module, config: _S2ABaseConfig, structures: tuple[str, ...], checks: _Checks
) -> dict[str, list[str]]:
    """The structures that each module named by the user can carry."""
    modules = dict(visible_modules(model))
    is_shorthand = (
        isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    )
    if is_shorthand:
        # PEFT's own resolution does not see linear layers inside our wrappers.
        config.target_modules = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    blocks = find_blocks(model) if "ladder" in structures else ()
    targets: dict[str, list[str]] = {structure: [] for structure in structures}
    matched = [name for name in modules if check_target_module_exists(config, name)]
    for name in matched:
        objections = {}
        for structure in structures:
            suits = (
                name in blocks
                if structure == "ladder"
                else _can_carry(structure, name, modules[name], checks.attention)
            )
            if not suits:
                continue
            if reason := checks.objection(structure, name):
                objections[structure] = reason
            else:
                targets[structure].append(name)
        if objections and not is_shorthand and not any(name in names for names in targets.values()):
            structure, reason = next(iter(objections.items()))
            raise ValueError(
                f"`target_modules` names {name!r}, a {type(modules[name]).__name__}, on which {structure!r} cannot sit: "
                f"it {reason}. Leave it out with `exclude_modules`."
            )
    if not matched:
        message = f"Target modules {config.target_modules} not found in the base model. "
        if config.layers_to_transform is not None:
            message += f"Note: You specified 'layers_to_transform': {config.layers_to_transform}. "
        raise NoMatchingPeftModuleError(message + "Please check the target modules and try again.")
    return targets
