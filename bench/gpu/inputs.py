"""Random arguments of every operation, by the names that the operation has for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from shapes import Attention, Conv, Form, Images, Linear, Spec, Tokens
from torch import Tensor

from diffpress.kernels import code_range, pack_blocks, pack_codes, pack_semi_structured, to_fp8

Arguments = dict[str, Any]
BLOCK = 64
"""Side of the blocks of a sparse weight."""
ACTIVATION_SCALE = 2.5 / 127
"""Of inputs that spread by 1: some of them are clipped."""


class Source:
    """Random tensors on a device, from a seed."""

    def __init__(self, seed: int, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(self.dtype)

    def codes(self, *shape: int, bits: int = 8) -> Tensor:
        low, high = code_range(bits)
        return torch.randint(low, high + 1, shape, generator=self.generator, device=self.device, dtype=torch.int8)

    def scales(self, *shape: int, largest: float) -> Tensor:
        """Between a third of `largest` and that."""
        part = (torch.rand(*shape, generator=self.generator, device=self.device) + 0.5) / 1.5
        return part * largest

    def one(self, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([value], dtype=dtype, device=self.device)


def arguments(spec: Spec, source: Source) -> Arguments:
    """What the operation of a row is called with, in its order."""
    return MAKERS[spec.op](spec.shape, spec.form, source)


def _weight(source: Source, form: Form, depth: int, columns: int) -> Arguments:
    """Packed codes and their scales, so that outputs spread about as much as inputs."""
    groups = (-(-depth // form.group),) if form.group else ()
    scale = source.scales(columns, *groups, largest=2 / code_range(form.bits)[1] / depth**0.5)
    return {"weight": pack_codes(source.codes(columns, depth, bits=form.bits), form.bits), "weight_scale": scale}


def _quantized(source: Source, form: Form, depth: int, columns: int) -> Arguments:
    return {
        **_weight(source, form, depth, columns),
        "activation_scale": source.one(ACTIVATION_SCALE),
        "zero_point": source.one(-11, torch.int32),
        "bias": source.normal(columns),
    }


def _quantized_linear(shape: Linear, form: Form, source: Source) -> Arguments:
    x = source.normal(shape.rows, shape.depth)
    quantized = _quantized(source, form, shape.depth, shape.columns)
    return {"x": x, **quantized, "weight_bits": form.bits, "activation_bits": 8}


def _integer_linear(shape: Linear, form: Form, source: Source) -> Arguments:
    rows, depth, columns = shape
    fused = form.activation != "none"
    return {
        "codes": source.codes(rows, depth),
        **_weight(source, form, depth, columns),
        "activation_scale": source.scales(rows, largest=ACTIVATION_SCALE),
        "zero_point": None,
        "bias": source.normal(columns),
        "residual": None if fused else source.normal(rows, columns),
        "weight_bits": form.bits,
        "group_size": form.group,
        "activation": form.activation,
        "dtype": source.dtype,
    }


def _weight_only_linear(shape: Linear, form: Form, source: Source) -> Arguments:
    x = source.normal(shape.rows, shape.depth)
    weight = _weight(source, form, shape.depth, shape.columns)
    bias = source.normal(shape.columns)
    return {"x": x, **weight, "bias": bias, "weight_bits": form.bits, "group_size": form.group}


def _lora_linear(shape: Linear, form: Form, source: Source) -> Arguments:
    main = _weight_only_linear(shape, form, source)
    branch = {
        "down": source.normal(form.rank, shape.depth) / shape.depth**0.5,
        "up": source.normal(shape.columns, form.rank),
    }
    first = {name: main.pop(name) for name in ("x", "weight", "weight_scale")}
    return {**first, **branch, "bias": main.pop("bias"), "branch_scale": 0.5, **main}


def _fp8(source: Source, depth: int, columns: int) -> Arguments:
    scale = source.scales(columns, largest=2 / depth**0.5)
    weight = to_fp8(source.normal(columns, depth), source.one(1.0))
    return {"weight": weight, "weight_scale": scale}


def _fp8_linear(shape: Linear, _form: Form, source: Source) -> Arguments:
    x, scale = source.normal(shape.rows, shape.depth), source.scales(shape.rows, largest=0.02)
    weight = _fp8(source, shape.depth, shape.columns)
    return {"x": x, **weight, "activation_scale": scale, "bias": source.normal(shape.columns)}


def _block_sparse_linear(shape: Linear, form: Form, source: Source) -> Arguments:
    rows, depth, columns = shape
    integers = form.input_bytes == 1
    blocks = (-(-columns // BLOCK), -(-depth // BLOCK))
    order = torch.rand(blocks, generator=source.generator, device=source.device).argsort(1)
    mask = order < max(1, round(blocks[1] * form.kept))
    weight = source.codes(columns, depth) if integers else source.normal(columns, depth) / depth**0.5
    values, column_index, row_pointer = pack_blocks(weight, mask, BLOCK)
    return {
        "x": source.codes(rows, depth) if integers else source.normal(rows, depth),
        "values": values,
        "column_index": column_index,
        "row_pointer": row_pointer,
        "weight_scale": source.scales(columns, largest=2 / 127 / depth**0.5) if integers else None,
        "activation_scale": source.one(ACTIVATION_SCALE) if integers else None,
        "bias": source.normal(columns),
        "outputs": columns,
        "dtype": source.dtype,
    }


def _semi_structured_linear(shape: Linear, _form: Form, source: Source) -> Arguments:
    x, weight = source.normal(shape.rows, shape.depth), source.normal(shape.columns, shape.depth)
    values, positions = pack_semi_structured(weight / shape.depth**0.5)
    return {"x": x, "values": values, "positions": positions, "bias": source.normal(shape.columns)}


def geometry(shape: Conv) -> Arguments:
    """How a convolution's window moves."""
    pairs = {"kernel_size": shape.kernel, "stride": shape.stride, "padding": shape.kernel // 2, "dilation": 1}
    return {name: [value] * 2 for name, value in pairs.items()}


def image(shape: Conv | Images, source: Source) -> Tensor:
    """Noise [B, C, H, W] with the channels last, as fast convolutions have it."""
    x = source.normal(shape.batch, shape.height, shape.width, shape.channels)
    return x.permute(0, 3, 1, 2)


def _quantized_conv2d(shape: Conv, form: Form, source: Source) -> Arguments:
    quantized = _quantized(source, form, shape.as_linear().depth, shape.outputs)
    bits = {"weight_bits": form.bits, "activation_bits": 8}
    return {"x": image(shape, source), **quantized, **geometry(shape), **bits}


def _integer_conv2d(shape: Conv, form: Form, source: Source) -> Arguments:
    return {
        "codes": source.codes(shape.batch, shape.height, shape.width, shape.channels),
        **_quantized(source, form, shape.as_linear().depth, shape.outputs),
        "residual": None,
        **geometry(shape),
        "weight_bits": form.bits,
        "activation": form.activation,
        "dtype": source.dtype,
    }


def _weight_only_conv2d(shape: Conv, form: Form, source: Source) -> Arguments:
    weight = _weight(source, form, shape.as_linear().depth, shape.outputs)
    bits = {"weight_bits": form.bits, "group_size": form.group}
    return {"x": image(shape, source), **weight, "bias": source.normal(shape.outputs), **geometry(shape), **bits}


def _fp8_conv2d(shape: Conv, _form: Form, source: Source) -> Arguments:
    scale, bias = source.one(0.02), source.normal(shape.outputs)
    weight = _fp8(source, shape.as_linear().depth, shape.outputs)
    return {"x": image(shape, source), **weight, "activation_scale": scale, "bias": bias, **geometry(shape)}


def _int8_attention(shape: Attention, form: Form, source: Source) -> Arguments:
    """Heads as parts of one projection; keys share an offset, as those of diffusion models do."""
    batch, heads, queries, keys, columns = shape
    q = source.normal(batch, queries, heads, columns).transpose(1, 2)
    k, v = source.normal(batch, keys, 2, heads, columns).permute(2, 0, 3, 1, 4)
    return {"q": q, "k": k + 2 * source.normal(columns), "v": v, "integer_values": form.integer_values}


def _quantize_rows(shape: Tokens, _form: Form, source: Source) -> Arguments:
    return {"x": source.normal(*shape), "scale": None, "zero_point": None, "bits": 8}


def _norm_modulate_quantize(shape: Tokens, _form: Form, source: Source) -> Arguments:
    scale, shift = source.normal(shape.batch, 2 * shape.channels).chunk(2, 1)
    given = {"x": source.normal(*shape) + 1, "weight": None, "bias": None, "scale": scale / 4, "shift": shift / 4}
    return {**given, "activation_scale": None, "zero_point": None, "norm": "layer", "eps": 1e-6, "bits": 8}


def _group_norm_silu_quantize(shape: Images, form: Form, source: Source) -> Arguments:
    x, weight, bias = image(shape, source) + 1, source.normal(shape.channels), source.normal(shape.channels)
    target = {"activation_scale": source.one(ACTIVATION_SCALE), "zero_point": source.one(-80, torch.int32)}
    rest = {"smoothing": None, "groups": shape.groups, "eps": 1e-5, "activation": form.words, "bits": 8}
    return {"x": x, "weight": weight, "bias": bias, **target, **rest}


MAKERS: dict[str, Callable[[Any, Form, Source], Arguments]] = {
    "block_sparse_linear": _block_sparse_linear,
    "fp8_conv2d": _fp8_conv2d,
    "fp8_linear": _fp8_linear,
    "group_norm_silu_quantize": _group_norm_silu_quantize,
    "int8_attention": _int8_attention,
    "integer_conv2d": _integer_conv2d,
    "integer_linear": _integer_linear,
    "lora_linear": _lora_linear,
    "norm_modulate_quantize": _norm_modulate_quantize,
    "quantize_rows": _quantize_rows,
    "quantized_conv2d": _quantized_conv2d,
    "quantized_linear": _quantized_linear,
    "semi_structured_linear": _semi_structured_linear,
    "weight_only_conv2d": _weight_only_conv2d,
    "weight_only_linear": _weight_only_linear,
}
