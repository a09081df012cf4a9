"""Reading and writing the nodes of a graph as TorchDynamo captures it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

VALUE = "example_value"
"""Where TorchDynamo keeps the fake tensor that a node gives."""
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "setitem")
CLOCK = ("to", "mul", "sum", "round", "clamp")
"""What makes scale and zero point of a step from their tables: twice the same of the same gives the same."""


class CannotFuseError(Exception):
    """Its words are the reason that is reported."""


def word(node: Node) -> str:
    """What a node is called, be it a function or a method; of a part, what it is a part of."""
    if node.op not in ("call_function", "call_method"):
        return "an input of the graph"
    if str(node.target).startswith("diffpress."):
        return "another packed layer"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if name == "getitem" and isinstance(node.args[0], Node) and not isinstance(value(node.args[0]), Tensor):
        return word(node.args[0])
    return "indexing" if name == "getitem" else name


def value(node: Node) -> Any:
    """The fake tensor that stands for what a node gives; None where it was not kept."""
    return node.meta.get(VALUE)


def bound(node: Node, *names: str) -> dict[str, Any]:
    """The arguments of a call, by name."""
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def changes_in_place(node: Node) -> bool:
    """Whether a node may write to a tensor that others read."""
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return node.op == "call_function" and (word(node) in IN_PLACE or node.kwargs.get("inplace") is True)


class Writer:
    """Puts nodes in front of one layer, each once, however many layers ask for it; what is not kept leaves no trace."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.kept: dict[Any, Node] = {}
        self.made: dict[Any, Node] = {}
        self.place: Node | None = None
        self._keys: dict[Node, Any] = {}

    def before(self, layer: Node) -> None:
        self.place = layer

    def keep(self) -> None:
        """What was made stays, for later layers as well."""
        self.kept |= self.made
        self.made = {}

    def undo(self) -> None:
        for node in reversed(self.made.values()):
            self.graph.erase_node(node)
            del self._keys[node]
        self.made = {}

    def function(self, target: Callable[..., Any], *arguments: Any, check: Callable[..., None] | None = None) -> Node:
        """A call of a function. Raises CannotFuseError with the words of `check`, if that refuses the arguments."""
        return self._call("call_function", target, arguments, {}, check)

    def method(self, name: str, *arguments: Any) -> Node:
        return self._call("call_method", name, arguments, {}, None)

    def again(self, node: Node, source: Node) -> Node:
        """What `node` does, to `source`, however that lies in memory."""
        target = "reshape" if node.target == "view" else node.target
        return self._call(node.op, target, (source, *node.args[1:]), node.kwargs, None)

    def _call(self, op: str, target: Any, arguments: Any, options: Any, check: Callable[..., None] | None) -> Node:
        assert self.place is not None
        key = (op, target, self._key(arguments), self._key(options))
        known = self.kept.get(key) or self.made.get(key)
        if known is not None:
            return known
        found = _computed(op, target, arguments, options, check)
        with self.graph.inserting_before(self.place):
            node = self.graph.create_node(op, target, arguments, dict(options))
        # Errors and profiles point at the layer's own line.
        node.meta |= {
            name: self.place.meta[name] for name in ("nn_module_stack", "stack_trace") if name in self.place.meta
        }
        node.meta[VALUE] = found
        self.made[key] = node
        self._keys[node] = key
        return node

    def _key(self, argument: Any) -> Any:
        """What is equal where arguments have the same value."""
        if isinstance(argument, Node):
            if argument not in self._keys:
                self._keys[argument] = self._call_key(argument) if word(argument) in CLOCK else argument
            return self._keys[argument]
        if isinstance(argument, list | tuple):
            return tuple(self._key(entry) for entry in argument)
        if isinstance(argument, dict):
            return tuple((name, self._key(entry)) for name, entry in argument.items())
        return argument

    def _call_key(self, node: Node) -> Any:
        return node.op, node.target, self._key(node.args), self._key(node.kwargs)


def _computed(op: str, target: Any, arguments: Any, options: Any, check: Callable[..., None] | None) -> Any:
    """What a new node gives, on fake tensors."""
    values, named = map_arg((arguments, options), value)
    with torch.no_grad():
        try:
            if check is not None:
                check(*values)
        except ValueError as error:
            raise CannotFuseError(str(error)) from error
        return getattr(values[0], target)(*values[1:], **named) if op == "call_method" else target(*values, **named)
