"""What computes: number formats and one folder per operation."""

from .fp8_conv2d import fp8_conv2d
from .fp8_linear import fp8_linear
from .integer_linear import integer_linear
from .packing import pack_codes, packed_form, unpack_codes
from .quantization import FP8_MAX, code_range, dequantize, dequantize_groups, quantize, spread_groups, to_fp8
from .quantized_conv2d import quantized_conv2d
from .quantized_linear import quantized_linear
from .weight_only_conv2d import weight_only_conv2d
from .weight_only_linear import weight_only_linear

__all__ = [
    "FP8_MAX",
    "code_range",
    "dequantize",
    "dequantize_groups",
    "fp8_conv2d",
    "fp8_linear",
    "integer_linear",
    "pack_codes",
    "packed_form",
    "quantize",
    "quantized_conv2d",
    "quantized_linear",
    "spread_groups",
    "to_fp8",
    "unpack_codes",
    "weight_only_conv2d",
    "weight_only_linear",
]
