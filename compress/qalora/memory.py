"""How much memory learning takes, told from one call of the denoiser before anything is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import ceil
from typing import NamedTuple

from torch import nn

from diffpress.calibration.observe import layer_matrix
from diffpress.calibration.sampling import Call, replay

from ..checkpoint import checkpoint_bytes
from ..layers import find_layers
from ..options import Order, Qalora
from ..overlay import is_large
from .blocks import find_blocks, tensors
from .layer import CODE_OFFSET_BITS, PART

FLOAT = 4
"""Bytes of a number that is learned or learned with."""
MOMENTS = {"adam": 2 * FLOAT, "adam8bit": 2}
"""Bytes that the optimizer keeps of a number."""
GRAPH = 4
"""What is kept for the way back, over a layer's input: as it was, rounded, and what lies between this layer and the next."""
ROUNDING = 5
"""Copies of a weight that are alive while its rounding is gone back through."""


class Needs(NamedTuple):
    """Bytes beside those of the weights."""

    state: int
    """All the time."""
    graph: int
    """While a batch is learned from."""


class _Seen(NamedTuple):
    """Numbers of one layer or block for a batch of one image."""

    weight: int
    learned: int
    inputs: int


def learning_needs(denoiser: nn.Module, call: Call, options: Qalora) -> dict[Order, Needs]:
    """What each order of learning takes, for a `call` of one image; `blocks` is missing where the denoiser has none."""
    found, _ = find_layers(denoiser, options)
    layers = {name: layer for name, layer in found.items() if not isinstance(layer, nn.Embedding)}
    blocks = find_blocks(denoiser)
    inputs = _input_sizes(denoiser, [*layers, *blocks], call)
    images = ceil(options.batch / options.accumulate)
    seen = {
        name: _Seen(layer_matrix(layer).numel(), _learned(layer, options.rank), images * inputs.get(name, 0))
        for name, layer in layers.items()
    }
    parts = [part for name in blocks if (part := [own for key, own in seen.items() if key.startswith(f"{name}.")])]
    sparing = is_large(denoiser) if options.checkpointing is None else options.checkpointing
    trained = 2 * FLOAT + MOMENTS[options.optimizer]
    always = sum(
        FLOAT * own.learned + (own.weight * CODE_OFFSET_BITS // 8 if options.gptq else 0) for own in seen.values()
    )
    whole = _graph(seen.values(), sparing)
    if sparing and parts and getattr(denoiser, "_supports_gradient_checkpointing", False):
        outside = [own for key, own in seen.items() if not any(key.startswith(f"{name}.") for name in blocks)]
        kept = FLOAT * images * sum(inputs.get(name, 0) for name in blocks)
        whole = _graph(outside, sparing) + kept + max(_graph(part, sparing) for part in parts)
    needs: dict[Order, Needs] = {"whole": Needs(always + trained * sum(own.learned for own in seen.values()), whole)}
    if parts:
        states = [(trained + FLOAT) * sum(own.learned for own in part) for part in parts]
        needs["blocks"] = Needs(always + max(states), max(_graph(part, sparing) for part in parts))
    return needs


def learning_disk_bytes(denoiser: nn.Module, options: Qalora) -> int:
    """Most disk that the checkpoints of learning take, whatever its order: single blocks take less than all together."""
    layers, _ = find_layers(denoiser, options)
    learned = sum(_learned(layer, options.rank) for layer in layers.values() if not isinstance(layer, nn.Embedding))
    return checkpoint_bytes(learned, FLOAT, MOMENTS[options.optimizer])


def _graph(layers: Iterable[_Seen], sparing: bool) -> int:
    """Bytes that are kept for the way back through these layers, and alive on it."""
    own = list(layers)
    weights = [layer.weight for layer in own] or [0]
    kept = 0 if sparing else 2 * FLOAT * sum(weights)
    largest = min(PART, max(weights)) if sparing else max(weights)
    return FLOAT * GRAPH * sum(layer.inputs for layer in own) + kept + ROUNDING * FLOAT * largest


def _learned(layer: nn.Module, rank: int) -> int:
    """Numbers that are learned about a layer, but for the few of its steps."""
    rows, columns = layer_matrix(layer).flatten(1).shape
    biases = rows if getattr(layer, "bias", None) is not None else 0
    return min(rank, rows, columns) * (rows + columns) + rows + biases


def _input_sizes(denoiser: nn.Module, names: Iterable[str], call: Call) -> Mapping[str, int]:
    """Numbers that each of the modules is fed with in one call; those never called are missing."""
    sizes: dict[str, int] = {}

    def look(name: str) -> Callable[..., None]:
        def count(_module: nn.Module, positional: tuple[object, ...], named: dict[str, object]) -> None:
            sizes[name] = sum(tensor.numel() for tensor in tensors((positional, named)))

        return count

    handles = [denoiser.get_submodule(name).register_forward_pre_hook(look(name), with_kwargs=True) for name in names]
    try:
        replay(denoiser, call)
    finally:
        for handle in handles:
            handle.remove()
    return sizes
