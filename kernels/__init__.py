"""What computes: number formats and one folder per operation."""

from .packing import pack_int4, unpack_int4
from .quantization import code_range, dequantize, quantize
from .quantized_conv2d import quantized_conv2d
from .quantized_linear import quantized_linear

__all__ = [
    "code_range",
    "dequantize",
    "pack_int4",
    "quantize",
    "quantized_conv2d",
    "quantized_linear",
    "unpack_int4",
]
