"""What computes layers and attention on the CPU: C++, one library for each tier of processors."""

from .attention import compute_attention
from .layer import compute_conv2d, compute_linear, computes
from .library import TierError, processor_tiers, shared_library, tier, why_no_library
from .panels import panel_bytes

__all__ = [
    "TierError",
    "compute_attention",
    "compute_conv2d",
    "compute_linear",
    "computes",
    "panel_bytes",
    "processor_tiers",
    "shared_library",
    "tier",
    "why_no_library",
]
