"""A written graph against the module it came from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..errors import ArtifactError
from .graph import Part, packed_layers
from .sessions import open_session, run_session

BATCHES = (1, 3)
"""Neither is the size that was traced."""
EPSILON = 2.0**-23
"""Rounding of float32."""


class Agreement(NamedTuple):
    """How closely a graph follows torch, over all checked batches."""

    max_abs_error: float
    relative_error: float
    tolerance: float


@torch.no_grad()
def check_graph(part: Part, graph: Path, batches: Sequence[int] = BATCHES) -> Agreement:
    """Run torch and onnxruntime on random inputs of several batch sizes.

    Raises ArtifactError where the root mean square of the difference, over that of torch's output, is past the tolerance.
    """
    session, generator = open_session(graph, threads=torch.get_num_threads()), torch.Generator().manual_seed(0)
    worst, relative, limit = 0.0, 0.0, tolerance(part.module)
    for batch in batches:
        inputs = part.example(batch, generator)
        expected = part.module(*inputs.values())
        found = torch.from_numpy(run_session(session, {name: value.numpy() for name, value in inputs.items()}))
        if found.shape != expected.shape:
            raise ArtifactError(
                f"{graph.name} gives {tuple(found.shape)} where torch gives {tuple(expected.shape)}, at batch {batch}."
            )
        difference = found - expected
        worst = max(worst, float(difference.abs().max()))
        relative = max(relative, float(difference.square().mean().sqrt() / expected.square().mean().sqrt()))
    if not relative <= limit:
        raise ArtifactError(
            f"{graph.name} differs from torch by {relative:.2g} (relative root mean square), allowed is {limit:.2g}. "
            "Nothing was written; report this model with the versions of torch and onnxruntime."
        )
    return Agreement(worst, relative, limit)


def tolerance(module: nn.Module) -> float:
    """Relative difference that rounding explains.

    Floats: every layer adds errors of sqrt(its sum's length) roundings. A rounding that moves a value over the edge
    between two codes moves it by a whole code, and the next layers' codes with it: at most the coarsest code's width.
    """
    weights = [weight for weight in module.parameters() if weight.ndim > 1]
    layers = packed_layers(module)
    longest = max([weight[0].numel() for weight in weights] + [layer.weight.shape[1] for layer in layers], default=1)
    rounding = (len(weights) + len(layers)) * math.sqrt(longest) * EPSILON
    if not layers:
        return rounding
    return rounding + 2.0 ** -(min(layer.activation_bits for layer in layers) - 1)
