"""A written graph against the module it came from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..runtime import Attention, AttentionOverride, attention_overrides
from .graph import Part, packed_layers
from .sessions import open_session, run_session

BATCHES = (1, 3)
"""Neither is the size that was traced."""
EPSILON = 2.0**-23
"""Rounding of float32."""
JITTER = 8 * EPSILON
"""What engines differ by in front of a quantiser, of a tensor's root mean square: sums in another order."""
DRAWS = 32
"""Of that noise, at most, until it explains a difference: one value at an edge may move much, and few draws find it."""
MARGIN = 2.0
"""How much further apart than torch and jittered torch an engine may be: both errors add up."""


class Agreement(NamedTuple):
    """How closely a graph follows torch, at the worst of all checked batches."""

    max_abs_error: float
    relative_error: float
    tolerance: float


@torch.no_grad()
def check_graph(part: Part, graph: Path, batches: Sequence[int] = BATCHES) -> Agreement:
    """Run torch and onnxruntime on random inputs of several batch sizes.

    Raises ArtifactError where the root mean square of the difference, over that of torch's output, is more than
    rounding explains: in every layer, and at the edges between two codes of a quantiser.
    """
    session, generator = open_session(graph, threads=torch.get_num_threads()), torch.Generator().manual_seed(0)
    worst, relative, moved = 0.0, 0.0, 0.0
    for batch in batches:
        inputs = part.example(batch, generator)
        expected = part.module(*inputs.values())
        found = torch.from_numpy(run_session(session, {name: value.numpy() for name, value in inputs.items()}))
        if found.shape != expected.shape:
            raise ArtifactError(
                f"{graph.name} gives {tuple(found.shape)} where torch gives {tuple(expected.shape)}, at batch {batch}."
            )
        worst = max(worst, float((found - expected).abs().max()))
        relative = max(relative, _relative(found, expected))
        for _ in range(DRAWS):
            with jittered(part.module, generator):
                moved = max(moved, _relative(part.module(*inputs.values()), expected))
            if relative <= rounding(part.module) + MARGIN * moved:
                break
    tolerance = rounding(part.module) + MARGIN * moved
    # Written so that NaN fails too.
    if not relative <= tolerance:
        raise ArtifactError(
            f"{graph.name} differs from torch by {relative:.2g} (relative root mean square), rounding explains "
            f"{tolerance:.2g}. Nothing was written; report this model with the versions of torch and onnxruntime."
        )
    return Agreement(worst, relative, tolerance)


def rounding(module: nn.Module) -> float:
    """Relative difference by float rounding: every layer adds the square root of its sums' length, in roundings."""
    weights = [weight for weight in module.parameters() if weight.ndim > 1]
    layers = packed_layers(module)
    longest = max([weight[0].numel() for weight in weights] + [layer.columns for layer in layers], default=1)
    return (len(weights) + len(layers)) * math.sqrt(longest) * EPSILON


@contextmanager
def jittered(module: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Add noise as small as rounding in front of every quantiser.

    A value at the edge between two codes then falls to the other side, and moves all that follow by whole codes. What
    this does to torch's own output is what another engine may differ by.
    """

    def moved(x: Tensor) -> Tensor:
        return x + JITTER * x.square().mean().sqrt() * torch.randn(x.shape, generator=generator)

    def jitter(layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *others = arguments
        return (moved(x), *others)

    def jittered_attention(own: AttentionOverride) -> Attention:
        attend = own.attend

        def answer(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Tensor:
            return attend(moved(query), moved(key), moved(value), *others, **options)

        return answer

    rounding_layers = [layer for layer in packed_layers(module) if layer.edit.activation_bits is not None]
    handles = [layer.register_forward_pre_hook(jitter) for layer in rounding_layers]
    attentions = [(own, own.attend) for own in attention_overrides(module)]
    for own, _ in attentions:
        own.attend = jittered_attention(own)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for own, attend in attentions:
            own.attend = attend


def _relative(found: Tensor, expected: Tensor) -> float:
    # A float32 rounding below nothing keeps an output of zeros from dividing by zero.
    size = expected.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return float((found - expected).square().mean().sqrt() / size)
