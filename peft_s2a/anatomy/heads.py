"""The task heads of a model: what turns a backbone's features into the task's output, and is new for a new task."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_BACKBONE_MAPPING, MODEL_MAPPING, PreTrainedModel
from transformers.initialization import no_init_weights

from .layers import is_normalisation


PLAIN_HEAD_NAMES = ("classifier", "head", "fc", "score")
# The names that transformers gives to heads beside, or inside, a base model.
HEAD_NAME = re.compile(
    r"(?!.*pos)(classifier|head|fc|.*_(classifier|head|predictor)|.*(class|bbox|box|mask)_(embed|embedder))"
)
EXACTLY = "^"  # before a whole name, in `modules_to_save`
BACKBONE_NAMES = ("backbone", "encoder", "decoder", "vision_model", "text_model", "language_model", "model")
# PEFT refuses to train these as a whole.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def find_task_heads(model: nn.Module) -> list[str]:
    """The names of the modules that turn a backbone's features into the task's output.

    For transformers models these are all children with weights beside the base model, or those named so where the base
    model is no child of its own (CLIP, SigLIP, UperNet); and whatever, deep inside, changes with the number of labels
    (the class heads of detectors). A bare backbone has none. The projection of a language model to its vocabulary is
    none either: it is no new head, and often larger than all else that is trained. timm models say what their
    classifier is; in other modules it is a child with one of the usual names.

    PEFT finds the modules to be trained in full by the *ending* of their names. Where a name is also the ending of
    another module's, the parts of the module take its place, so that exactly these are trained.
    """
    timm_model = getattr(model, "timm_model", model)
    if hasattr(timm_model, "get_classifier"):
        classifier = timm_model.get_classifier()
        heads = list(classifier) if isinstance(classifier, (tuple, list)) else [classifier]
        names = [name for name, module in model.named_modules() if any(module is head for head in heads)]
    elif isinstance(model, PreTrainedModel):
        names = _transformers_heads(model)
    else:
        children = dict(model.named_children())
        names = [name for name in PLAIN_HEAD_NAMES if name in children][:1]
    names = [part for name in names for part in _without_containers(model, name)]
    modules = {name: model.get_submodule(name) for name in names}
    # Detectors share a head between a child and the decoder, which is what calls it.
    deepest: dict[frozenset[int], str] = {}
    for name, module in modules.items():
        weights = frozenset(id(parameter) for parameter in module.parameters())
        if weights and name.count(".") >= deepest.get(weights, "").count("."):
            deepest[weights] = name
    return _unmistakable(model, [name for name in modules if name in deepest.values()])


def is_bare_backbone(model: PreTrainedModel) -> bool:
    classes: list[type] = []
    for mapping in (MODEL_MAPPING, MODEL_FOR_BACKBONE_MAPPING):
        found = mapping.get(type(model.config), ())
        classes.extend(found if isinstance(found, (list, tuple)) else [found])
    return type(model) in classes


def saved_whole(keys: Iterable[str], name: str) -> bool:
    """Whether a module lies in one that is trained in full. By PEFT's rule the ending of a name decides; see `exact_keys`
    for whole names."""
    parts = name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(path == key[1:] if key.startswith(EXACTLY) else path.endswith(key) for path in paths for key in keys)


def exact_keys(model: nn.Module, names: list[str]) -> list[str]:
    """What `modules_to_save` has to hold for `names` to be trained in full, and nothing else: where a name is the ending of
    another module's too (LW-DETR's `class_embed`), "^" before it says that it is a whole one. PEFT finds no module by
    such a key; see `named_exactly`."""
    modules = dict(_outside_of_wrappers(model))
    found = []
    for name in names:
        own = modules.get(name)
        others = (other for other, module in modules.items() if other != name and module is not own)
        is_ambiguous = any(other.endswith(name) and other not in names for other in others)
        found.append(f"{EXACTLY}{name}" if is_ambiguous else name)
    return found


def named_exactly(keys: Iterable[str]) -> list[str]:
    """The whole names among the keys of `modules_to_save`."""
    return [key[1:] for key in keys if key.startswith(EXACTLY)]


def _outside_of_wrappers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by all of their names in the base model: of what adapters train whole the parts of the original, and none of
    the layers of adapters."""
    hidden = tuple(
        f"{name}." for name, m in model.named_modules() if isinstance(m, (AuxiliaryTrainingWrapper, BaseTunerLayer))
    )
    for name, module in model.named_modules(remove_duplicate=False):
        if not name.startswith(hidden):
            yield name, module
            if isinstance(module, AuxiliaryTrainingWrapper):
                inner = _outside_of_wrappers(module.original_module)
                yield from ((f"{name}.{key}", part) for key, part in inner if key)


def _transformers_heads(model: PreTrainedModel) -> list[str]:
    if is_bare_backbone(model):
        return []
    base_model = model.base_model
    vocabulary = _output_embeddings(model)
    children = {name: child for name, child in model.named_children() if child is not vocabulary}
    if base_model is not model:
        names = [name for name, child in children.items() if child is not base_model]
    else:
        candidates = {
            name: child
            for name, child in children.items()
            if not isinstance(child, PreTrainedModel) and _has_weights(child) and child is not vocabulary
        }
        names = [name for name in candidates if HEAD_NAME.fullmatch(name)]
        if not names and any(name in children for name in BACKBONE_NAMES):
            names = [name for name in candidates if name not in BACKBONE_NAMES[:2]]
    names = [name for name in names if not _holds(model.get_submodule(name), vocabulary)]
    is_dense = any(task in type(model).__name__ for task in ("Detection", "Segmentation"))
    if is_dense or not names:
        inside = [name for name in _label_dependent(model) if not _is_inside(name, names)]
        names += inside
        if is_dense and inside:
            # Of a detector's heads, those that tell the place stand beside those that tell the class.
            outermost: list[str] = []
            for name, module in model.named_modules():
                own_name = name.rpartition(".")[2]
                if (
                    HEAD_NAME.fullmatch(own_name)
                    and _has_weights(module)
                    and not _is_inside(name, [*names, *outermost])
                ):
                    outermost.append(name)
            names += [name for name in outermost if not any(_is_inside(other, [name]) for other in names)]
    return names


def _is_inside(name: str, others: Iterable[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in others)


def _holds(module: nn.Module, part: nn.Module | None) -> bool:
    return part is not None and any(inner is part for inner in module.modules())


def _output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The projection to a language model's vocabulary."""
    try:
        found = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _label_dependent(model: PreTrainedModel) -> list[str]:
    """The modules whose own weights change their shapes with the number of labels: what is new for a new task."""
    config = getattr(model, "config", None)
    if not _is_registered(type(config)) or not getattr(config, "num_labels", None):
        return []
    found = _changing(type(model), type(config), config.to_json_string(use_diff=False))
    modules = dict(_names_without_adapters(model))
    return [name for name in found if name in modules]


def _is_registered(config_class: type) -> bool:
    """Whether transformers knows a class of configurations. All of its values would be imported for the answer."""
    model_type = getattr(config_class, "model_type", None)
    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] is config_class


@functools.lru_cache(maxsize=32)
def _changing(model_class: type, config_class: type, config_json: str) -> tuple[str, ...]:
    """Names of modules of a class of model, from two of them made on the meta device."""
    import json

    shapes = []
    for extra in (0, 1):
        config = config_class.from_dict(json.loads(config_json))
        config.num_labels = config.num_labels + extra
        try:
            with torch.device("meta"), no_init_weights():
                made = model_class(config)
        except Exception:  # a class that cannot be made from its configuration alone has no answer here
            return ()
        shapes.append({name: parameter.shape for name, parameter in made.named_parameters()})
    changed = [name for name, shape in shapes[0].items() if shapes[1].get(name) != shape]
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in changed))


def _names_without_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            yield name, module


def _without_containers(model: nn.Module, name: str) -> list[str]:
    """`name`, or the names of the modules in it, if it is a list of modules that nobody calls."""
    module = model.get_submodule(name)
    if isinstance(module, AuxiliaryTrainingWrapper) or not isinstance(module, CONTAINERS):
        return [name]
    return [part for key, _ in module.named_children() for part in _without_containers(model, f"{name}.{key}")]


def _unmistakable(model: nn.Module, names: list[str]) -> list[str]:
    """`names`, with those that PEFT would mistake for other modules' replaced by their parts.

    A norm without parts that can be mistaken is left out: like any norm it has its offset and scale trained.
    """
    own = {id(module) for name in names for module in model.get_submodule(name).modules()}
    everything = dict(_outside_of_wrappers(model))
    found: list[str] = []
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, AuxiliaryTrainingWrapper):
            found.append(name)
            continue
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        others = [
            other
            for other, twin in everything.items()
            if other.endswith(name) and other != name and twin is not module
        ]
        nested = any(other.startswith(f"{name}.") for other in others)
        foreign = any(id(everything[other]) not in own for other in others)
        parts = [f"{name}.{key}" for key, child in module.named_children() if _has_weights(child)]
        own_weights = any(True for _ in module.parameters(recurse=False))
        if (nested or foreign) and parts and not own_weights:
            parts = [part for key in parts for part in _without_containers(model, key)]
            found.extend(_unmistakable(model, parts))
        elif not (foreign and is_normalisation(module)):
            found.append(name)
    return list(dict.fromkeys(found))
