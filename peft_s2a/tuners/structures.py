"""The layers that hold an adapter's parameters."""

from __future__ import annotations

from peft_s2a.tuners.batch_norm import BatchNormLayer
from peft_s2a.tuners.bias import BiasLayer
from peft_s2a.tuners.ladder import LadderRung, LadderTop
from peft_s2a.tuners.layer import S2ALayer
from peft_s2a.tuners.prompt import InputPromptLayer, PromptLayer
from peft_s2a.tuners.side import SideLayer


LAYERS: tuple[type[S2ALayer], ...] = (
    BiasLayer,
    BatchNormLayer,
    PromptLayer,
    InputPromptLayer,
    SideLayer,
    LadderRung,
    LadderTop,
)
PARAMETER_NAMES = {name for layer in LAYERS for name in (*layer.adapter_layer_names, *layer.other_param_names)}
