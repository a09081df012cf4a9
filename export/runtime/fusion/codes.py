"""The fused operation that gives the codes of one layer, from the chain that makes its input."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from diffpress.kernels.fused_checks import check_group_norm, check_norm_modulate

from .chain import Chain, Step
from .graph import CannotFuseError, Writer, value, word


def group_norm_codes(writer: Writer, chain: Chain, layer: Node, is_conv: bool) -> Node:
    """int8 codes as the layer takes them: [B, H, W, C] of a convolution, else laid out as its input is.

    Raises CannotFuseError where a step comes between that the fused operation does not compute.
    """
    norm, x = chain.norm, chain.norm.x
    axis: int | None = 1
    activation, smoothing = "none", None
    for step in chain.steps:
        if step.kind == "move":
            axis = channel_axis(axis, step.node)
        elif step.kind == "silu" and activation == "none" and smoothing is None:
            activation = "silu"
        elif step.kind == "mul" and smoothing is None and is_channelwise(step, axis):
            smoothing = writer.method("flatten", step.operand)
        else:
            raise CannotFuseError(f"{word(step.node)} follows its group norm")
    if is_conv and moves(chain):
        raise CannotFuseError(f"{word(moves(chain)[0])} comes between its norm and it")
    flat = value(x).ndim == 3
    codes = writer.function(
        torch.ops.diffpress.group_norm_silu_quantize,
        writer.method("unsqueeze", x, -1) if flat else x,
        norm.weight,
        norm.bias,
        *layer.args[3:5],
        smoothing,
        norm.groups,
        norm.eps,
        activation,
        layer.args[-1],
        check=check_group_norm,
    )
    if is_conv:
        return codes
    codes = writer.method("permute", codes, 0, 3, 1, 2)
    return _moved(writer, writer.method("squeeze", codes, -1) if flat else codes, chain)


def row_norm_codes(writer: Writer, chain: Chain, layer: Node, is_conv: bool) -> Node:
    """int8 codes laid out as the input of a linear layer is: y = (norm(x) w + b) (1 + scale) + shift, times any vectors.

    Raises CannotFuseError where a step comes between that the fused operation does not compute, or the layer is a convolution.
    """
    norm = chain.norm
    if is_conv:
        raise CannotFuseError(f"a {norm.kind} norm is over the last axis, and not over the channels of a convolution")
    axis: int | None = value(norm.x).ndim - 1
    weight, bias, scale, shift = norm.weight, norm.bias, None, None
    for step in chain.steps:
        plain, modulation = scale is None and shift is None, is_modulation(step) and not moves(chain, step)
        if step.kind == "move":
            axis = channel_axis(axis, step.node)
        elif step.kind == "mul" and is_channelwise(step, axis):
            weight = _times(writer, weight, step.operand) or step.operand
            bias, shift = _times(writer, bias, step.operand), _times(writer, shift, step.operand)
        elif step.kind == "add" and plain and is_channelwise(step, axis):
            bias = (
                step.operand if bias is None else writer.function(torch.add, writer.method("float", bias), step.operand)
            )
        elif step.kind == "mul" and plain and modulation:
            scale = _a_picture(writer, _less_one(writer, step.operand), norm.x)
        elif step.kind == "add" and shift is None and modulation:
            shift = _a_picture(writer, step.operand, norm.x)
        else:
            raise CannotFuseError(f"{word(step.node)} follows its {norm.kind} norm")
    codes = writer.function(
        torch.ops.diffpress.norm_modulate_quantize,
        norm.x,
        weight,
        bias,
        scale,
        shift,
        *layer.args[3:5],
        norm.kind,
        norm.eps,
        layer.args[-1],
        check=check_norm_modulate,
    )
    return _moved(writer, writer.function(operator.getitem, codes, 0), chain)


def moves(chain: Chain, before: Step | None = None) -> list[Node]:
    """The nodes of a chain that put values elsewhere, of the steps before one."""
    steps = chain.steps if before is None else chain.steps[: chain.steps.index(before)]
    return [step.node for step in steps if step.kind == "move"]


def _moved(writer: Writer, codes: Node, chain: Chain) -> Node:
    """Codes where the layer looks for them: what is done to each value by itself may be done before values are moved."""
    for node in moves(chain):
        codes = writer.again(node, codes)
    return codes


def is_channelwise(step: Step, axis: int | None) -> bool:
    """Whether the operand of a step is a vector over the axis of channels, whose number is `axis`."""
    assert step.operand is not None
    shape, result = value(step.operand).shape, value(step.node).shape
    own = None if axis is None else axis - len(result) + len(shape)
    return own == 0 and all(size == 1 for size in shape[1:])


def is_modulation(step: Step) -> bool:
    """Whether the operand of a step is [B or 1, 1, C]: a vector for each image."""
    shape = () if step.operand is None else value(step.operand).shape
    return len(shape) == 3 and shape[1] == 1


def channel_axis(axis: int | None, move: Node) -> int | None:
    """Where a move leaves the axis of channels; None where it does not stay one axis."""
    before, after = value(move.args[0]).shape, value(move).shape  # type: ignore[arg-type]
    if axis is None:
        return None
    if word(move) in ("permute", "transpose"):
        # No two axes of this one are equally long.
        sizes = list(range(len(before)))
        moved = getattr(torch.empty(sizes, device="meta"), word(move))(*move.args[1:], **move.kwargs)
        return list(moved.shape).index(axis)
    if after[: axis + 1] == before[: axis + 1]:
        return axis
    is_last = axis == len(before) - 1 and after[-1] == before[-1]
    return len(after) - 1 if is_last else None


def _times(writer: Writer, factor: Node | None, vector: Node | None) -> Node | None:
    """A product in float32, which a product of two tensors in half precision would not be."""
    return None if factor is None else writer.function(torch.mul, writer.method("float", factor), vector)


def _less_one(writer: Writer, factor: Node | None) -> Node:
    """The scale in 1 + scale: the fused operation adds the one itself."""
    assert factor is not None
    total = factor
    if _adds_axis(total):
        total = total.args[0]  # type: ignore[assignment]
    terms = [term for term in total.args if isinstance(term, Node)]
    if word(total) == "add" and not total.kwargs and 1 in total.args and len(terms) == 1:
        return terms[0]
    return writer.function(torch.sub, writer.method("float", factor), 1)


def _adds_axis(node: Node) -> bool:
    """Whether a node gives [B, C] as [B, 1, C]."""
    if word(node) == "unsqueeze":
        return True
    return word(node) == "indexing" and node.args[1] in ((slice(None), None), (slice(None), None, slice(None)))


def _a_picture(writer: Writer, modulation: Node | None, x: Node) -> Node:
    """A modulation [B or 1, 1, C] as [B, C], read where it lies."""
    assert modulation is not None
    rows = modulation
    if value(rows).ndim == 3:
        rows = writer.method("select", rows, 1, 0)
    if value(rows).shape[0] == value(x).shape[0]:
        return rows
    return writer.method("expand_as", rows, writer.method("select", x, 1, 0))
