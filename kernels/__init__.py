"""What computes: number formats and one folder per operation."""

from .block_sparse_linear import block_sparse_linear, pack_blocks
from .fp8_conv2d import fp8_conv2d
from .fp8_linear import fp8_linear
from .fused_checks import LARGEST_HEAD
from .group_norm_silu_quantize import group_norm_silu_quantize
from .int8_attention import int8_attention
from .integer_conv2d import integer_conv2d
from .integer_linear import integer_linear
from .lora_linear import lora_linear
from .norm_modulate_quantize import norm_modulate_quantize
from .packing import pack_codes, packed_form, unpack_codes
from .quantization import (
    FP8_MAX,
    code_range,
    dequantize,
    dequantize_groups,
    quantize,
    quantize_dequantize,
    spread_groups,
    to_fp8,
)
from .quantize_rows import quantize_rows
from .quantized_conv2d import quantized_conv2d
from .quantized_linear import quantized_linear
from .semi_structured_linear import pack_semi_structured, semi_structured_linear
from .weight_only_conv2d import weight_only_conv2d
from .weight_only_linear import weight_only_linear

__all__ = [
    "FP8_MAX",
    "LARGEST_HEAD",
    "block_sparse_linear",
    "code_range",
    "dequantize",
    "dequantize_groups",
    "fp8_conv2d",
    "fp8_linear",
    "group_norm_silu_quantize",
    "int8_attention",
    "integer_conv2d",
    "integer_linear",
    "lora_linear",
    "norm_modulate_quantize",
    "pack_blocks",
    "pack_codes",
    "pack_semi_structured",
    "packed_form",
    "quantize",
    "quantize_dequantize",
    "quantize_rows",
    "quantized_conv2d",
    "quantized_linear",
    "semi_structured_linear",
    "spread_groups",
    "to_fp8",
    "unpack_codes",
    "weight_only_conv2d",
    "weight_only_linear",
]
