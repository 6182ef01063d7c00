"""S2A: fine-tuning vision backbones with little memory. A PEFT plugin: importing it registers the tuner types."""

from peft_s2a.activations.calibrate import calibrate_activations
from peft_s2a.activations.config import ActivationQuantizationConfig
from peft_s2a.activations.wrap import quantize_activations, restore_activations
from peft_s2a.card import write_cards
from peft_s2a.config import S2ABiasConfig, S2AConfig, S2APromptConfig, S2ASideConfig
from peft_s2a.loading import guard_loading
from peft_s2a.memory.estimate import estimate_memory
from peft_s2a.memory.profile import profile_memory
from peft_s2a.memory.report import MemoryReport
from peft_s2a.registration import register
from peft_s2a.tuners.model import S2AModel


__all__ = [
    "ActivationQuantizationConfig",
    "MemoryReport",
    "S2ABiasConfig",
    "S2AConfig",
    "S2AModel",
    "S2APromptConfig",
    "S2ASideConfig",
    "calibrate_activations",
    "estimate_memory",
    "profile_memory",
    "quantize_activations",
    "restore_activations",
]

register(
    {"S2A": S2AConfig, "S2A_BIAS": S2ABiasConfig, "S2A_PROMPT": S2APromptConfig, "S2A_SIDE": S2ASideConfig}, S2AModel
)
guard_loading()
write_cards()
