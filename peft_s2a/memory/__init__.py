"""Memory of a training step: measured, estimated, reported."""

from .estimate import estimate_memory, extrapolate_memory, image_batch, largest_batch_size
from .profile import profile_memory
from .report import KeptBytes, MemoryReport, PeakBytes
from .sharding import blocks_to_shard


__all__ = [
    "KeptBytes",
    "MemoryReport",
    "PeakBytes",
    "blocks_to_shard",
    "estimate_memory",
    "extrapolate_memory",
    "image_batch",
    "largest_batch_size",
    "profile_memory",
]
