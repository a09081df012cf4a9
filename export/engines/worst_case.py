"""Codes by which an engine shows that its sums of products saturate or lose bits, one layer of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import ArtifactError
from .engine import Array, Engine

GRAPH = "worst_case"
OUTPUT = "outputs"
ROWS, COLUMNS, OUTPUTS = 4, 1030, 33
"""Of the linear layer: no multiple of what a processor adds at once, and more than 1,024 products a sum."""
CHANNELS, SIDE, KERNEL = 127, 3, 3
"""Of the convolution."""
KEYS, HEAD = 34, 64
"""Of attention."""
TOLERANCE = 2.0**-16
"""Of attention, whose softmax rounds: 128 roundings of an output of at most 1. Saturated scores move it by a tenth."""


class WorstCase(NamedTuple):
    """Inputs of the graph, its weights, and the output that int64 gives, of every kind of layer."""

    inputs: dict[str, Array]
    weights: dict[str, Array]
    expected: dict[str, Array]


def worst_case() -> WorstCase:
    """Activations whose uint8 codes are 255, 0 and 128, weights of 127, -127 and -128, in runs and in turn."""
    tokens, image = _activations(COLUMNS, ROWS).T[None], _activations(CHANNELS, SIDE * SIDE)
    image = image.reshape(1, CHANNELS, SIDE, SIDE)
    linear, kernel = _weights(OUTPUTS, COLUMNS), _weights(OUTPUTS, CHANNELS * KERNEL * KERNEL)
    query, key, value, attended = _attention()
    return WorstCase(
        {"tokens": tokens, "image": image, "query": query, "key": key, "value": value},
        {"linear": linear, "conv2d": kernel},
        {
            "linear": _exactly(tokens @ linear.astype(np.int64).T),
            "conv2d": _exactly(_convolved(image, kernel.reshape(OUTPUTS, CHANNELS, KERNEL, KERNEL))),
            "attention scores": attended,
            "attention values": np.broadcast_to(value.mean(2, keepdims=True), value.shape).astype(np.float32),
        },
    )


def findings(engine: Engine, graph: Path) -> dict[str, str | None]:
    """For every kind of layer None where it is right, else what is wrong. `graph` is what `write_worst_case` wrote."""
    case = worst_case()
    inputs = {name: array.astype(np.float32) for name, array in case.inputs.items()}
    (output,) = engine.open(graph, threads=1).run(inputs).values()
    sizes = np.cumsum([array.size for array in case.expected.values()])
    return {
        name: _what_is_wrong(found.reshape(expected.shape), expected, 0.0 if name in case.weights else TOLERANCE)
        for (name, expected), found in zip(case.expected.items(), np.split(output.ravel(), sizes[:-1]), strict=True)
    }


def require_exact(engine: Engine, graph: Path) -> None:
    """Raises ArtifactError where sums of products are not exact in this engine on this machine."""
    for kind, wrong in findings(engine, graph).items():
        if wrong is not None:
            raise ArtifactError(
                f"{engine.name} {engine.version()} computes {kind} on codes wrong on this machine: {wrong}. Use another "
                "version of it, or another machine; `diffpress doctor` says more."
            )


def _what_is_wrong(found: Array, expected: Array, tolerance: float) -> str | None:
    wrong = ~(np.abs(found.astype(np.float64) - expected) <= tolerance)
    if not wrong.any():
        return None
    return f"{wrong.sum()} of {wrong.size} sums, such as {found[wrong][0]:g} instead of {expected[wrong][0]:g}"


def _exactly(sums: Array) -> Array:
    """int64 as what float32 can hold of it, which is what an engine casts its sums to."""
    return sums.astype(np.float32)


def _activations(length: int, count: int) -> Array:
    """Codes less 128 [length, count]: the largest, the smallest, 0, and all in turn, of count columns in turn."""
    patterns = np.array([[127], [-128], [0], [127]]) + np.zeros(length, np.int64)
    patterns[3] = np.resize([127, -128, 0, 127, 127], length)
    return np.resize(patterns, (count, length)).T


def _weights(rows: int, columns: int) -> Array:
    """int8 [rows, columns]: rows of the largest, of the smallest, and of both in turn."""
    weights = np.resize(np.array([[127], [-128], [-127]], np.int8), (rows, 1)) + np.zeros(columns, np.int8)
    weights[2::3] = np.resize(np.array([127, 127, -128, -127, 127], np.int8), columns)
    return weights


def _convolved(image: Array, kernel: Array) -> Array:
    """int64 [1, outputs, H, W], padded with zeros so that the size stays."""
    edge = KERNEL // 2
    padded = np.pad(image, ((0, 0), (0, 0), (edge, edge), (edge, edge))).astype(np.int64)
    sums = np.zeros((1, len(kernel), SIDE, SIDE), np.int64)
    for row in range(KERNEL):
        for column in range(KERNEL):
            window = padded[0, :, row : row + SIDE, column : column + SIDE]
            sums[0] += np.tensordot(kernel[:, :, row, column].astype(np.int64), window, axes=1)
    return sums


def _attention() -> tuple[Array, Array, Array, Array]:
    """Query, key and value [1, 1, KEYS, HEAD] of largest codes, and what attention makes of the values.

    Half the keys are alike and the other half their opposite, so that their mean is 0 and scores are 1 and -1; values are
    1 and 0. Values in turn over keys of one query are averaged where all scores are 0 (see `worst_case`).
    """
    size = HEAD**-0.25
    signs = np.resize([1.0, -1.0], (KEYS, 1)) + np.zeros(HEAD)
    query, key = np.full((KEYS, HEAD), size), size * signs
    value = (signs + 1) / 2
    share = np.e / (np.e + 1 / np.e)
    found = np.full((KEYS, HEAD), share, np.float32)
    return query[None, None], key[None, None], value[None, None], found[None, None]
