"""The one reading of a model: its blocks, attention layers, MLPs, stages, norms and heads, and how a forward pass uses
them.

Knows models of torch, transformers, timm and diffusers, and of PEFT only that wrappers stand for what they wrap. What
is done with the parts is for others to decide.
"""

from .heads import CONTAINERS, exact_keys, find_task_heads, is_bare_backbone, named_exactly, saved_whole
from .layers import (
    BATCH_NORMS,
    CONVOLUTIONS,
    NORMALISATIONS,
    POSITION_NETWORKS,
    has_running_statistics,
    held_aside,
    hidden_in_heads,
    input_width,
    is_normalisation,
    output_width,
    projections,
    visible_modules,
)
from .parts import (
    FUSED_NAMES,
    KEY_NAMES,
    QUERY_NAMES,
    VALUE_NAMES,
    Attention,
    ends,
    find_attention,
    find_blocks,
    find_mlps,
    find_stages,
    find_stem,
    side_entry,
)
from .usage import Call, Usage, observe


__all__ = [
    "BATCH_NORMS",
    "CONTAINERS",
    "CONVOLUTIONS",
    "FUSED_NAMES",
    "KEY_NAMES",
    "NORMALISATIONS",
    "POSITION_NETWORKS",
    "QUERY_NAMES",
    "VALUE_NAMES",
    "Attention",
    "Call",
    "Usage",
    "ends",
    "exact_keys",
    "find_attention",
    "find_blocks",
    "find_mlps",
    "find_stages",
    "find_stem",
    "find_task_heads",
    "has_running_statistics",
    "held_aside",
    "hidden_in_heads",
    "input_width",
    "is_bare_backbone",
    "is_normalisation",
    "named_exactly",
    "observe",
    "output_width",
    "projections",
    "saved_whole",
    "side_entry",
    "visible_modules",
]
