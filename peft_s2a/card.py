"""The model card of a saved adapter: what a reader of the Hub has to know who has never heard of this package."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from torch import nn

from peft_s2a import compat
from peft_s2a.config import _S2ABaseConfig
from peft_s2a.memory.report import MemoryReport, MiB


BEGIN, END = "<!-- peft-s2a -->", "<!-- /peft-s2a -->"
"""Around the section, so that it is replaced when the card is written again."""


def update_card(folder: str | os.PathLike, model: nn.Module, config: _S2ABaseConfig) -> None:
    """Adds to `folder/README.md` how to load the adapter and what it is, or makes such a card.

    Args:
        folder: where the adapter is saved.
        model: the `PeftModel`, or the transformers model that holds the adapter.
        config: the adapter's configuration.
    """
    path = os.path.join(folder, "README.md")
    card = ModelCard.load(path) if os.path.exists(path) else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")
    card.data["library_name"] = "peft"
    tags = {"peft", "s2a", *(f"s2a-{name}" for name in _structures(config))}
    card.data["tags"] = sorted({*(card.data.get("tags") or []), *tags})
    base_model = _base_model_name(model, config)
    if base_model is not None and not card.data.get("base_model"):
        card.data["base_model"] = base_model
    text = card.text
    if BEGIN in text and END in text:
        text = text[: text.index(BEGIN)] + text[text.index(END) + len(END) :]
    card.text = f"{text.rstrip()}\n\n{BEGIN}\n{_section(model, config, base_model)}\n{END}\n"
    card.save(path)


def _structures(config: _S2ABaseConfig) -> list[str]:
    is_ladder = getattr(config, "side_mode", None) == "ladder"
    return ["ladder"] if is_ladder else list(config.structures)


def _base_model_name(model: nn.Module, config: _S2ABaseConfig) -> str | None:
    name = config.base_model_name_or_path or getattr(getattr(model, "config", None), "_name_or_path", None)
    return name or None


def _section(model: nn.Module, config: _S2ABaseConfig, base_model: str | None) -> str:
    own_class = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(own_class).__name__
    from_transformers = type(own_class).__module__.startswith("transformers.")
    build = (
        f'{name}.from_pretrained("{base_model or "the base model"}")' if from_transformers else "...  # the base model"
    )
    quantisation = config.activation_quantization
    lines = [
        "## How to load this adapter",
        "",
        "It is an adapter of [peft-s2a](https://pypi.org/project/peft-s2a/), a plugin of PEFT, which knows its type "
        f"`{config.peft_type.value}` once the package has been imported.",
        "",
        "```bash",
        "pip install peft-s2a",
        "```",
        "",
        "```python",
        *([f"from transformers import {name}"] if from_transformers else []),
        "from peft import PeftModel",
        "import peft_s2a  # before the adapter is loaded",
        "",
        f"model = {build}",
        'model = PeftModel.from_pretrained(model, "this folder or repository")',
        "```",
        "",
        f"- Base model: {base_model or 'not recorded'}",
        f"- Structures: {', '.join(_structures(config))}",
        f"- Activations kept for backward: {_bits(quantisation)}",
    ]
    report: MemoryReport | None = getattr(model, "memory_report", None)
    if report is not None:
        lines.append(
            f"- Memory of a training step, measured on {report.device} at batch size {report.batch_size}: "
            f"{report.saved_bytes / MiB:.1f} MiB kept for backward, {report.peak_bytes / MiB:.1f} MiB at its peak"
        )
    return "\n".join(lines)


def _bits(quantisation: Any) -> str:
    if quantisation is None:
        return "full precision"
    if isinstance(quantisation.bits, int):
        return f"{quantisation.bits} bits"
    used = sorted({quantisation.bits.get("default", 4), *quantisation.bits.values()})
    return f"{' to '.join(map(str, (used[0], used[-1])))} bits, by operator" if len(used) > 1 else f"{used[0]} bits"


def _active_config(model: nn.Module) -> _S2ABaseConfig | None:
    """The configuration of the adapter that is active in `model`, if it is an S2A one."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return None
    active = getattr(model, "active_adapter", None) if hasattr(model, "get_base_model") else None
    name = active if isinstance(active, str) else next(iter(configs), None)
    config = configs.get(name)
    return config if isinstance(config, _S2ABaseConfig) else None


def _with_section(create: Callable) -> Callable:
    @functools.wraps(create)
    def create_or_update_model_card(self: nn.Module, output_dir: str) -> None:
        create(self, output_dir)
        if (config := _active_config(self)) is not None:
            update_card(output_dir, self, config)

    return create_or_update_model_card


def _with_card(upload: Callable) -> Callable:
    @functools.wraps(upload)
    def upload_modified_files(self: Any, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        # `push_to_hub` has just written a card that says nothing over the one that was saved.
        if (config := _active_config(self)) is not None:
            update_card(working_dir, self, config)
        return upload(self, working_dir, *args, **kwargs)

    return upload_modified_files


def write_cards() -> None:
    """Lets PEFT's and transformers' cards of S2A adapters say how to load them. Harmless if done already."""
    compat.replace_methods(
        {
            (PeftModel, "create_or_update_model_card"): _with_section,
            (compat.PushToHubMixin, "_upload_modified_files"): _with_card,
        }
    )
