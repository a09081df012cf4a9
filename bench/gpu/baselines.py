"""What else one could call in the place of an operation, on random tensors of the same size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from inputs import Arguments, Source, image
from roofline import work_of
from shapes import OPERATIONS, Attention, Conv, Linear, Spec
from torch import Tensor, nn

Call = Callable[[], Any]
Baselines = dict[str, Callable[[], Call]]
"""By name, what prepares a call: it may raise where a library is missing or refuses the shape."""


def baselines(spec: Spec, given: Arguments, source: Source) -> Baselines:
    """What a row is compared with; `given` are the operation's own arguments."""
    if isinstance(spec.shape, Linear):
        return _linear(spec, source)
    if isinstance(spec.shape, Conv):
        return _conv(spec, source)
    if isinstance(spec.shape, Attention):
        return {"SDPA": lambda: partial(F.scaled_dot_product_attention, *(given[name] for name in "qkv"))}
    return _codes(spec, given, source)


def leads(spec: Spec) -> bool:
    """Whether it is its model's first shape: what has to be compiled for every size is asked for these alone."""
    return OPERATIONS[spec.op][0].get(spec.model, (spec.shape,))[0] == spec.shape


def fuses(spec: Spec) -> bool:
    """Whether the compiler has something to fuse, and is asked: without an activation it would call what torch calls."""
    return spec.form.activation != "none" and leads(spec)


def memo_key(spec: Spec, name: str) -> tuple[Any, ...]:
    """Baselines of linear layers and convolutions do not depend on which of our operations stands beside them."""
    own = None if isinstance(spec.shape, Linear | Conv) else spec.op
    return name, own, type(spec.shape), tuple(spec.shape), spec.form.activation, spec.dtype


def _linear(spec: Spec, source: Source) -> Baselines:
    shape, form = spec.shape, spec.form
    assert isinstance(shape, Linear)

    def layer() -> Call:
        x, weight, bias = source.normal(shape.rows, shape.depth), _matrix(shape, source), source.normal(shape.columns)
        return partial(_activated_linear, x, weight, bias, form.activation)

    found: Baselines = {"torch": layer}
    if fuses(spec):
        found["torch compiled"] = lambda: _compiled(layer())
    if form.cores == "int8":
        found["cuBLASLt int8"] = lambda: _int_mm(shape, source)
    if form.cores == "int8" and leads(spec):
        found["torchao int8, compiled"] = lambda: _torchao("Int8DynamicActivationInt8WeightConfig", shape, source)
    if form.cores == "fp8":
        found["cuBLASLt fp8"] = lambda: _scaled_mm(shape, source)
    if (form.cores, form.bits) == ("half", 4) and leads(spec):
        found["torchao int4, compiled"] = lambda: _torchao("Int4WeightOnlyConfig", shape, source, group_size=64)
        found["bitsandbytes NF4"] = lambda: _nf4(shape, source)
    return found


def _activated_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    y = F.linear(x, weight, bias)
    if activation != "geglu":
        return y
    value, gate = y.chunk(2, -1)
    return value * F.gelu(gate)


def _matrix(shape: Linear, source: Source) -> Tensor:
    return source.normal(shape.columns, shape.depth) / shape.depth**0.5


def _compiled(call: partial[Any]) -> Call:
    # Otherwise torch would give up compiling one function for ever new shapes.
    torch._dynamo.reset()
    compiled = torch.compile(call.func, dynamic=False)
    return partial(compiled, *call.args, **call.keywords)


def _int_mm(shape: Linear, source: Source) -> Call:
    """The bare product: what comes before and after it is not in it."""
    return partial(torch._int_mm, source.codes(shape.rows, shape.depth), source.codes(shape.columns, shape.depth).t())


def _scaled_mm(shape: Linear, source: Source) -> Call:
    x, weight = (source.normal(size, shape.depth).to(torch.float8_e4m3fn) for size in (shape.rows, shape.columns))
    scales = torch.ones(shape.rows, 1, device=source.device), torch.ones(1, shape.columns, device=source.device)
    return partial(torch._scaled_mm, x, weight.t(), *scales, out_dtype=torch.bfloat16)


def _torchao(config: str, shape: Linear, source: Source, **options: int) -> Call:
    quantization = import_module("torchao.quantization")
    layer = nn.Linear(shape.depth, shape.columns, device=source.device, dtype=source.dtype)
    quantization.quantize_(layer, getattr(quantization, config)(**options))
    return _compiled(partial(layer.forward, source.normal(shape.rows, shape.depth)))


def _nf4(shape: Linear, source: Source) -> Call:
    bitsandbytes = import_module("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(shape.depth, shape.columns, compute_dtype=source.dtype, quant_type="nf4")
    return partial(layer.to(source.device), source.normal(shape.rows, shape.depth))


def _conv(spec: Spec, source: Source) -> Baselines:
    shape = spec.shape
    assert isinstance(shape, Conv)

    def layer() -> Call:
        weight = source.normal(shape.outputs, shape.channels, shape.kernel, shape.kernel)
        weight = weight.to(memory_format=torch.channels_last)
        window = {"stride": shape.stride, "padding": shape.kernel // 2}
        x, bias = image(shape, source), source.normal(shape.outputs)
        return partial(_activated_conv, x, weight, bias, spec.form.activation, **window)

    found: Baselines = {"cuDNN channels last": layer}
    if fuses(spec):
        found["torch compiled"] = lambda: _compiled(layer())
    return found


def _activated_conv(x: Tensor, weight: Tensor, bias: Tensor, activation: str, *, stride: int, padding: int) -> Tensor:
    y = F.conv2d(x, weight, bias, stride, padding)
    return F.silu(y) if activation == "silu" else y


def _codes(spec: Spec, given: Arguments, source: Source) -> Baselines:
    """The reference, also compiled, and a copy that moves as many bytes."""
    reference = getattr(import_module(f"diffpress.kernels.{spec.op}.reference"), f"{spec.op}_reference")
    half = work_of(spec).bytes // 2
    room = torch.empty(2, half, dtype=torch.int8, device=source.device)
    eager = partial(reference, **given)
    found: Baselines = {"torch": lambda: eager, "copy": lambda: partial(room[0].copy_, room[1])}
    return {**found, "torch compiled": lambda: _compiled(eager)} if leads(spec) else found
