"""What runs inside a loaded pipeline."""

from .attention import (
    Attended,
    Attention,
    OnIntegers,
    attend_on_integers_,
    attended,
    computes_attention,
    why_not_on_integers,
)
from .clock import StepClock, attach_clock_, find_timestep
from .packed import PackedConv2d, PackedEmbedding, PackedLayer, PackedLinear, pack_layer, why_not_packable

__all__ = [
    "Attended",
    "Attention",
    "OnIntegers",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLayer",
    "PackedLinear",
    "StepClock",
    "attach_clock_",
    "attend_on_integers_",
    "attended",
    "computes_attention",
    "find_timestep",
    "pack_layer",
    "why_not_on_integers",
    "why_not_packable",
]
