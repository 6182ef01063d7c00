"""How S2A becomes known to PEFT: new members of the `PeftType` enumeration, then PEFT's own registry."""

from __future__ import annotations

from aenum import extend_enum
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import PeftType, register_peft_method


PREFIX = "s2a_"
"""What the names of all S2A parameters start with."""
PEFT_TYPES = ("S2A", "S2A_BIAS", "S2A_PROMPT", "S2A_SIDE")


def add_peft_types() -> None:
    """Adds the S2A members to `peft.PeftType`. Harmless if they are there already."""
    for name in PEFT_TYPES:
        if name not in PeftType.__members__:
            extend_enum(PeftType, name, name)


def register(config_classes: dict[str, type], model_class: type) -> None:
    """Registers one configuration class per PEFT type, all served by one tuner. Harmless if done already.

    Args:
        config_classes: PEFT type -> configuration class.
        model_class: the tuner.
    """
    add_peft_types()
    for name, config_class in config_classes.items():
        if name not in PEFT_TYPE_TO_CONFIG_MAPPING:
            register_peft_method(name=name.lower(), config_cls=config_class, model_cls=model_class)
            # The registry takes each prefix once; the four types name their parameters alike.
            PEFT_TYPE_TO_PREFIX_MAPPING[name] = PREFIX  # type: ignore[index]
