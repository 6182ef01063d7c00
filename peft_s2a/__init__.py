"""S2A: fine-tuning vision backbones with little memory, as a PEFT plugin. Importing registers the tuner types with PEFT."""

from peft_s2a.config import S2ABiasConfig, S2AConfig, S2APromptConfig, S2ASideConfig
from peft_s2a.registration import register
from peft_s2a.tuners.model import S2AModel


__all__ = ["S2ABiasConfig", "S2AConfig", "S2AModel", "S2APromptConfig", "S2ASideConfig"]

register(
    {"S2A": S2AConfig, "S2A_BIAS": S2ABiasConfig, "S2A_PROMPT": S2APromptConfig, "S2A_SIDE": S2ASideConfig}, S2AModel
)
