"""What the layers of a denoiser see while recorded calls are replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.kernels import code_range

from .sampling import replay
from .trajectory import Progress, Trajectories

ROWS = 64
"""Rows of a layer's input that are looked at per call: enough over many calls, and it bounds time and memory."""


@dataclass
class LayerInput:
    """What was seen of one layer's input; S steps, C input channels."""

    largest: Tensor
    """[S] largest magnitude at each step."""
    second_moment: Tensor
    """[C] mean square of each channel over all steps."""
    conditioning: bool
    """The layer is fed one row an image (a time or class embedding), not one a pixel or token."""


def observe_inputs(
    denoiser: nn.Module, layers: Mapping[str, nn.Module], trajectories: Trajectories, progress: Progress | None = None
) -> dict[str, LayerInput]:
    """Replay all recorded calls and collect ranges and moments; layers that were never called are missing."""
    steps = len(trajectories.timesteps)
    seen: dict[str, LayerInput] = {}
    counts: dict[str, int] = {}

    def look(name: str, x: Tensor, step: int) -> None:
        rows = as_rows(layers[name], x)
        if name not in seen:
            seen[name] = LayerInput(torch.zeros(steps), torch.zeros(rows.shape[1]), x.ndim == 2)
            counts[name] = 0
        entry = seen[name]
        entry.largest[step] = torch.maximum(entry.largest[step], rows.abs().max().cpu())
        entry.second_moment += rows.square().sum(0).cpu()
        counts[name] += len(rows)

    replay_with(denoiser, layers, trajectories, look, progress)
    for name, entry in seen.items():
        entry.second_moment /= counts[name]
    return seen


@torch.no_grad()
def scale_errors(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    trajectories: Trajectories,
    candidates: Mapping[str, Tensor],
    bits: Mapping[str, int],
    seed: int,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Squared error at a layer's output from rounding its input, for K candidate scales a layer: [2, S, K] each.

    Errors of different channels are taken as independent, so that a channel counts by the square of its weights. The first
    axis parts the recorded shards into two halves, one to choose on and one to judge by.
    """
    steps = len(trajectories.timesteps)
    errors = {name: torch.zeros(2, steps, len(scales)) for name, scales in candidates.items()}
    weights = {name: layer_matrix(layers[name]).square().sum((0, 2)) for name in candidates}
    generator = torch.Generator().manual_seed(seed)
    half = 0

    def look(name: str, x: Tensor, step: int) -> None:
        rows = as_rows(layers[name], x)
        rows = rows[torch.randint(len(rows), (min(ROWS, len(rows)),), generator=generator).to(rows.device)]
        scales = candidates[name].to(rows.device)[:, None, None]
        rounded = rounded_to(rows[None], scales, bits[name])
        error = (rounded - rows).square().mean(1) @ weights[name]
        errors[name][half, step] += error.cpu()

    chosen = {name: layers[name] for name in candidates}
    for half in (0, 1):
        shards = trajectories.shards[half::2] or trajectories.shards
        replay_with(denoiser, chosen, trajectories, look, progress, shards)
    return errors


def rounded_to(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`values` after quantizing and dequantizing."""
    low, high = code_range(bits)
    return torch.round(values / scale).clamp_(low, high) * scale


def replay_with(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    trajectories: Trajectories,
    look: Callable[[str, Tensor, int], None],
    progress: Progress | None = None,
    shards: Sequence[Any] | None = None,
) -> None:
    """Replay recorded calls and hand each layer's input, with the step, to `look`."""
    chosen = trajectories.shards if shards is None else shards
    step = 0

    def watcher(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, arguments: look(name, arguments[0].float(), step)

    with _hooks({name: (layer, watcher(name)) for name, layer in layers.items()}):
        for index, shard in enumerate(chosen):
            for call in trajectories.calls([shard]):
                step = call.step
                replay(denoiser, call)
            if progress is not None:
                progress(index + 1, len(chosen))


@contextmanager
def _hooks(watchers: Mapping[str, tuple[nn.Module, Callable[[nn.Module, tuple[Tensor, ...]], None]]]) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(watcher) for layer, watcher in watchers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The input of a Linear or Conv2d as one row a position: [..., C] or [B, C, H, W] to [N, C]."""
    return x.movedim(1, -1).flatten(0, -2) if isinstance(layer, nn.Conv2d) else x.flatten(0, -2)


def layer_matrix(layer: nn.Module) -> Tensor:
    """The weight of a Linear or Conv2d in float32: [out, in, taps]."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float().flatten(2) if weight.ndim == 4 else weight.detach().float()[:, :, None]
