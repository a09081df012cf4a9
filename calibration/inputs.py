"""What a denoiser is called with, taken apart into tensors and what is around them, and put together as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from diffpress.export.errors import UnsupportedModelError

Node = Any
"""JSON for a value: itself where that is one, a list for a list, and for all else a dict of one word and what it needs."""
NUMBER = "number"
PLAIN = (bool, int, float, str, type(None))


class Inputs(dict[str, Tensor]):
    """The tensors of one call by their paths, such as `added_cond_kwargs/time_ids`, in the order in which they are found."""

    def __init__(self, tensors: Mapping[str, Tensor], around: Mapping[str, Node] | None = None) -> None:
        """`around`: what each argument is, its tensors named by path; left out: dicts of tensors, as the paths say."""
        super().__init__(tensors)
        self.around = dict(_nested(tensors) if around is None else around)

    @classmethod
    def of(cls, arguments: Mapping[str, Any], numbers: Iterable[str] = ()) -> Self:
        """Of `arguments` by name; those that are called as in `numbers` are held as tensors even where they are numbers.

        Raises UnsupportedModelError where one is of a type that cannot be kept.
        """
        tensors: dict[str, Tensor] = {}
        around: dict[str, Node] = {}
        for name, value in arguments.items():
            if name in numbers and type(value) in (int, float):
                tensors[name], around[name] = torch.as_tensor(value), {NUMBER: name}
            else:
                around[name] = _taken_apart(value, name, tensors)
        return cls(tensors, around)

    @classmethod
    def like(cls, inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | None = None) -> Self:
        """Of the same call, with other `tensors` in their places."""
        known = inputs if isinstance(inputs, cls) else cls(inputs)
        return cls({**known, **(tensors or {})}, known.around)

    def given(self, place: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """The arguments as they were given, `place(path, tensor)` instead of each tensor."""
        return {name: _put_together(node, lambda path: place(path, self[path])) for name, node in self.around.items()}

    def listed(self) -> dict[str, int]:
        """The arguments that are lists, with how long each is."""
        return {name: len(node) for name, node in self.around.items() if isinstance(node, list)}

    def within(self, argument: str) -> list[str]:
        """The paths of the tensors of one argument."""
        return [path for path in self if path == argument or path.startswith(f"{argument}/")]


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, Node]:
    around: dict[str, Node] = {}
    for path in tensors:
        *outer, last = path.split("/")
        place = around
        for key in outer:
            pairs = place.setdefault(key, {"dict": {}})
            place = pairs["dict"]
        place[last] = {"tensor": path}
    return {name: _as_pairs(node) for name, node in around.items()}


def _as_pairs(node: Node) -> Node:
    if "dict" not in node:
        return node
    return {"dict": [[key, _as_pairs(value)] for key, value in node["dict"].items()]}


def _taken_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Node:
    if type(value) in PLAIN:
        return value
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        tensors[path] = torch.from_numpy(np.array(value))
        return {"array": path}
    if isinstance(value, (torch.dtype, torch.device)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    word, parts = _parts_of(value, path)
    return _group(word, value, [[key, _taken_apart(own, f"{path}/{key}", tensors)] for key, own in parts])


def _parts_of(value: Any, path: str) -> tuple[str, list[tuple[Any, Any]]]:
    """What kind of group a value is, and what is in it by place or by name."""
    if type(value) in (list, tuple, torch.Size):
        return type(value).__name__, list(enumerate(value))
    if type(value) is dict and all(type(key) in (str, int) for key in value):
        return "dict", list(value.items())
    if _is_found_again(type(value)):
        if hasattr(value, "_fields"):
            return "class", list(value._asdict().items())
        if is_dataclass(value):
            return "class", [(field.name, getattr(value, field.name)) for field in fields(value)]
    raise UnsupportedModelError(
        f"The denoiser is called with a {type(value).__name__} as {path!r}, which cannot be recorded; tensors, arrays, "
        "numbers, words, None, and lists, tuples, dicts and dataclasses of them can."
    )


def _is_found_again(kind: type) -> bool:
    """Whether a class can be had by its name: one that is made inside a function cannot."""
    return "." not in kind.__qualname__ and getattr(import_module(kind.__module__), kind.__qualname__, None) is kind


def _group(word: str, value: Any, parts: list[list[Any]]) -> Node:
    if word == "list":
        return [node for _, node in parts]
    if word == "dict":
        return {"dict": parts}
    if word == "class":
        return {"class": [type(value).__module__, type(value).__qualname__], "dict": parts}
    return {word: [node for _, node in parts]}


def _put_together(node: Node, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(node, list):
        return [_put_together(own, tensor) for own in node]
    if not isinstance(node, dict):
        return node
    word, held = next(iter(node.items()))
    if word == "class":
        kind = getattr(import_module(held[0]), held[1])
        return kind(**{key: _put_together(own, tensor) for key, own in node["dict"]})
    if word == "dict":
        return {key: _put_together(own, tensor) for key, own in held}
    return WORDS[word](held, tensor)


def _number(path: str, tensor: Callable[[str], Tensor]) -> Any:
    """As it was given; a tensor where somebody has put one for each of several images."""
    found = tensor(path)
    return found if found.ndim else found.item()


WORDS: dict[str, Callable[[Any, Callable[[str], Tensor]], Any]] = {
    "tensor": lambda path, tensor: tensor(path),
    NUMBER: _number,
    "array": lambda path, tensor: tensor(path).cpu().numpy()[()],
    "dtype": lambda name, _: getattr(torch, name),
    "device": lambda name, _: torch.device(name),
    "tuple": lambda parts, tensor: tuple(_put_together(own, tensor) for own in parts),
    "Size": lambda parts, _: torch.Size(parts),
}
"""By the word in a node: what it stands for."""


def first_answer(output: Any, *, apart: bool = False) -> Tensor:
    """What a denoiser answers, as one tensor: of several things that it gives, the first.

    Several tensors that are the first together are stacked where they stand for an image each (`apart`), and are
    otherwise laid beside each other, image by image. Raises UnsupportedModelError where there is no tensor.
    """
    first = output if isinstance(output, (Tensor, list)) else next(_values(output), None)
    tensors = list(_tensors(first))
    if not tensors:
        raise UnsupportedModelError(
            f"The denoiser answers with a {type(output).__name__} whose first part holds no tensor; what it makes is not known."
        )
    return _as_one(tensors, apart) if isinstance(first, (list, tuple)) else tensors[0]


def _values(output: Any) -> Iterator[Any]:
    if isinstance(output, Mapping):
        return iter(output.values())
    if isinstance(output, tuple):
        return iter(output)
    return iter(getattr(output, "__dict__", {}).values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for own in value:
            yield from _tensors(own)


def _as_one(tensors: list[Tensor], apart: bool) -> Tensor:
    shapes = {tensor.shape for tensor in tensors}
    if apart and len(shapes) == 1:
        return torch.stack(tensors)
    if not apart and len({tensor.shape[:1] for tensor in tensors}) == 1:
        return torch.cat([tensor.flatten(1) for tensor in tensors], 1)
    return torch.cat([tensor.flatten() for tensor in tensors])[None]
