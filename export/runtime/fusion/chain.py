"""What makes the input of a layer: a norm and the steps between, walked back from the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Node

from .graph import CannotFuseError, bound, value, word

CASTS = ("to", "float", "half", "bfloat16", "type_as", "contiguous")
MOVES = ("reshape", "view", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze")
"""Steps that leave every value as it is, and put it elsewhere."""


class Norm(NamedTuple):
    """A norm over groups of channels (`group`), or over the last axis (`layer`, `rms`)."""

    kind: str
    x: Node
    weight: Node | None
    bias: Node | None
    eps: float
    groups: int = 1


class Step(NamedTuple):
    """What follows a norm: `silu`, `move`, or `mul` and `add` with an operand that has fewer axes or shorter ones."""

    kind: str
    node: Node
    operand: Node | None = None


class Chain(NamedTuple):
    """A norm, the node that computes it, and the steps from it to the layer."""

    norm: Norm
    node: Node
    steps: Sequence[Step]


def chain_to(node: Any) -> Chain:
    """What makes `node`, the input of a layer. Raises CannotFuseError where that is no norm."""
    steps: list[Step] = []
    while (norm := read_norm(node)) is None:
        found = _followed(node)
        if found is None:
            raise CannotFuseError(f"its input comes from {_told(_blamed(steps) or node)}")
        node, step = found
        steps += [] if step is None else [step]
    return Chain(norm, node, steps[::-1])


def _told(node: Any) -> str:
    """What a node is called; of a gate that is multiplied with, its activation."""
    gates = [word(entry) for entry in node.args if isinstance(entry, Node)] if word(node) == "mul" else []
    return next((gate for gate in gates if gate in ("gelu", "silu")), word(node))


def _blamed(steps: Sequence[Step]) -> Node | None:
    """The last step before the layer that computes something; smoothing is the layer's own."""
    own = (step.node for step in steps if step.kind != "move" and not _has_one_axis(step.operand))
    return next(own, None)


def _has_one_axis(operand: Node | None) -> bool:
    return operand is not None and sum(size != 1 for size in value(operand).shape) <= 1


def _followed(node: Node) -> tuple[Node, Step | None] | None:
    """The tensor of the same values, or as many, that a node is made from, and what it does to it."""
    source = node.args[0] if node.args else None
    if not isinstance(value(node), Tensor) or not isinstance(source, Node) or changed(node):
        return None
    match word(node):
        case name if name in CASTS:
            return source, None
        case name if name in MOVES and value(node).dtype == value(source).dtype:
            return source, Step("move", node)
        case "dropout":
            options = {"p": 0.5, "training": True, "inplace": False} | bound(node, "input", "p", "training", "inplace")
            return None if options["inplace"] or (options["training"] and options["p"]) else (source, None)
        case "silu":
            return None if bound(node, "input", "inplace").get("inplace") else (source, Step("silu", node))
        case "truediv":
            return (source, None) if node.args[1] == 1 else None
        case "mul" | "add" as name if not node.kwargs:
            return _with_operand(name, node)
    return None


def changed(node: Node) -> bool:
    """Whether a node gives another kind of number than it is given, or on another device."""
    given, source = value(node), value(node.args[0]) if isinstance(node.args[0], Node) else None
    if not isinstance(source, Tensor) or source.device != given.device:
        return True
    return not given.is_floating_point() or not source.is_floating_point()


def _with_operand(name: str, node: Node) -> tuple[Node, Step] | None:
    """The factor or term that is as large as the result, where the other is smaller."""
    pair = [term for term in node.args if isinstance(term, Node) and isinstance(value(term), Tensor)]
    whole = [term for term in pair if value(term).shape == value(node).shape]
    if len(pair) != 2 or len(whole) != 1:
        return None
    (operand,) = (term for term in pair if term is not whole[0])
    return whole[0], Step(name, node, operand)


def read_norm(node: Any) -> Norm | None:
    """The norm that a node computes, or None. Raises CannotFuseError where no fused operation computes it."""
    if not isinstance(node, Node) or not isinstance(value(node), Tensor):
        return None
    match word(node):
        case "group_norm":
            return _group_norm(**bound(node, "input", "num_groups", "weight", "bias", "eps"))
        case "layer_norm":
            return _row_norm("layer", **bound(node, "input", "normalized_shape", "weight", "bias", "eps"))
        case "rms_norm":
            return _row_norm("rms", **({"eps": None} | bound(node, "input", "normalized_shape", "weight", "eps")))
        case "mul":
            return _rms_norm_by_hand(node)
    return None


def _group_norm(
    input: Node, num_groups: int, weight: Node | None = None, bias: Node | None = None, eps: float = 1e-5
) -> Norm:
    if weight is None or bias is None:
        raise CannotFuseError("its group norm has no weight or no bias")
    return Norm("group", widest(input), weight, bias, eps, num_groups)


def _row_norm(
    kind: str,
    input: Node,
    normalized_shape: Sequence[int],
    weight: Node | None = None,
    bias: Node | None = None,
    eps: float | None = 1e-5,
) -> Norm:
    if len(normalized_shape) != 1:
        raise CannotFuseError(f"its {kind} norm is over {len(normalized_shape)} axes")
    if eps is None:
        raise CannotFuseError(f"its {kind} norm leaves eps to torch")
    return Norm(kind, widest(input), weight, bias, eps)


def _rms_norm_by_hand(node: Node) -> Norm | None:
    """x * rsqrt(mean(x ** 2) + eps), as diffusers' RMSNorm has it before its weight."""
    x, root = node.args
    total = _made_by("rsqrt", root)
    mean, eps = total.args if total is not None and word(total) == "add" else (None, None)
    power = _made_by("mean", mean)
    if power is None or not isinstance(eps, float) or not isinstance(x, Node):
        return None
    over = bound(mean, "input", "dim", "keepdim")  # type: ignore[arg-type]
    is_last = over.get("dim") in (-1, (-1,), [-1]) and over.get("keepdim") is True
    squares = word(power) == "pow" and power.args[1] == 2 and widest(power.args[0]) is widest(x)
    return Norm("rms", widest(x), None, None, eps) if squares and is_last else None


def _made_by(name: str, node: Any) -> Node | None:
    """The first argument of a call that has that name."""
    if not isinstance(node, Node) or word(node) != name:
        return None
    return node.args[0] if isinstance(node.args[0], Node) else None


def widest(node: Any) -> Node:
    """A tensor before the casts that made it wider: the operations compute in float32 in any case."""
    while word(node) in CASTS and not changed(node):
        source = node.args[0]
        if value(source).dtype.itemsize > value(node).dtype.itemsize:
            break
        node = source
    return node
