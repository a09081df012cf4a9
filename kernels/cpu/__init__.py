"""What computes layers and attention on the CPU: C++ for processors that multiply bytes with AVX512-VNNI."""

from .attention import compute_attention
from .layer import compute_conv2d, compute_linear, computes
from .library import shared_library, why_no_library

__all__ = ["compute_attention", "compute_conv2d", "compute_linear", "computes", "shared_library", "why_no_library"]
