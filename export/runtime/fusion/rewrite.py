"""Layers that quantise what a norm gives, to layers on the codes that the norm makes itself."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from .chain import Chain, chain_to
from .codes import group_norm_codes, row_norm_codes
from .graph import VALUE, CannotFuseError, Writer, changes_in_place, value
from .outcome import Fusion

LINEAR, CONV2D = "diffpress.quantized_linear", "diffpress.quantized_conv2d"
REASONS = {
    "diffpress.weight_only_linear": "weight-only: its input stays in float",
    "diffpress.weight_only_conv2d": "weight-only: its input stays in float",
    "diffpress.fp8_linear": "float8: fused operations give integers",
    "diffpress.fp8_conv2d": "float8: fused operations give integers",
}


def fuse_(module: GraphModule, name_of: Callable[[Node], str]) -> list[Fusion]:
    """Rewrite a graph in place; returns what became of each packed layer in it, named by `name_of` its weight's node.

    Codes are those of the norm in float32, which the layers alone round to the dtype of the model first: in float32 they
    differ where a value lies between two codes, in half precision by what that rounding moves them as well.
    """
    nodes = list(module.graph.nodes)
    changes = [index for index, node in enumerate(nodes) if changes_in_place(node)]
    positions = {node: index for index, node in enumerate(nodes)}
    writer = Writer(module.graph)

    def outcome(layer: Node) -> Fusion:
        name = name_of(layer.args[1])  # type: ignore[arg-type]
        if str(layer.target) in REASONS:
            return Fusion(name, None, REASONS[str(layer.target)])
        writer.before(layer)
        try:
            chain = chain_to(layer.args[0])
            if bisect(changes, positions[layer]) != bisect(changes, positions[chain.node]):
                raise CannotFuseError("a tensor is changed in place between its norm and it")
            norm = _fuse_(writer, layer, chain)
        except CannotFuseError as error:
            writer.undo()
            return Fusion(name, None, str(error))
        writer.keep()
        return Fusion(name, norm, None)

    found = [outcome(layer) for layer in nodes if str(layer.target) in (LINEAR, CONV2D, *REASONS)]
    module.graph.lint()
    module.recompile()
    return found


def _fuse_(writer: Writer, layer: Node, chain: Chain) -> str:
    """Put the fused operation and a layer on codes in the place of `layer`; returns what the norm is called."""
    is_conv = str(layer.target) == CONV2D
    codes = (group_norm_codes if chain.norm.kind == "group" else row_norm_codes)(writer, chain, layer, is_conv)
    dtype, bits = value(layer.args[0]).dtype, layer.args[-2]  # type: ignore[arg-type]
    if is_conv:
        output = writer.function(
            torch.ops.diffpress.integer_conv2d, codes, *layer.args[1:6], None, *layer.args[6:10], bits, "none", dtype
        )
        # As the layer would have laid it out: what reads it may be outside of the graph.
        output = writer.method("contiguous", writer.method("permute", output, 0, 3, 1, 2))
    else:
        output = writer.function(
            torch.ops.diffpress.integer_linear, codes, *layer.args[1:6], None, bits, 0, "none", dtype
        )
    output.meta[VALUE] = value(layer)
    layer.replace_all_uses_with(output)
    _erase_(layer)
    return _called(chain)


def _erase_(node: Node) -> None:
    """Take out a node that nobody reads any more, and what was made for it alone."""
    if node.users or node.op not in ("call_function", "call_method") or changes_in_place(node):
        return
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        _erase_(source)


def _called(chain: Chain) -> str:
    kinds = [step.kind for step in chain.steps]
    modulated = any(step.operand is not None and value(step.operand).ndim == 3 for step in chain.steps)
    follows = ", silu" if "silu" in kinds else ", modulated" if modulated and chain.norm.kind != "group" else ""
    return f"{chain.norm.kind} norm{follows}"
