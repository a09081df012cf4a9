"""What runs inside a loaded pipeline."""

from .clock import StepClock, attach_clock_, find_timestep
from .packed import PackedConv2d, PackedEmbedding, PackedLayer, PackedLinear, pack_layer, why_not_packable

__all__ = [
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLayer",
    "PackedLinear",
    "StepClock",
    "attach_clock_",
    "find_timestep",
    "pack_layer",
    "why_not_packable",
]
