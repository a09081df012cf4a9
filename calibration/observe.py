"""What the layers of a denoiser see while recorded calls are replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.kernels import quantize_dequantize
from diffpress.kernels.windows import output_size

from .replaying import Key, OncePerInput, looked_at, observed_shards, replay_with, spread_evenly
from .trajectory import Progress, Trajectories

ROWS = 64
"""Rows of a layer's input that are looked at per call: enough over many calls, and it bounds time and memory."""
KEPT_ROWS = 512
"""Rows of a layer's input that are kept, over all calls."""
PROBED = 16
"""Rows by which it is told whether a layer is fed the same at every step."""
STEP_SHARDS = 4
"""Of these, those that say which range suits which step: two to choose by, two to evaluate by."""

Look = Callable[[str, Tensor, int], None]
"""Called with the name of a layer, what it is fed, and the step."""


@dataclass
class LayerInput:
    """What was seen of one layer's input over all steps; C input channels."""

    low: Tensor
    """[C] smallest value of each channel, 0 where it is never negative."""
    high: Tensor
    """[C] largest value of each channel, 0 where it is never positive."""
    second_moment: Tensor
    """[C] mean square of each channel."""
    rows: Tensor
    """[R, C] a sample; R <= KEPT_ROWS."""
    conditioning: bool
    """The layer is fed one row an image (a time or class embedding), or the same at every step (the prompt)."""
    macs: int = 0
    """Multiplications of all calls that were looked at."""

    @property
    def largest(self) -> Tensor:
        """[C] largest magnitude of each channel."""
        return torch.maximum(-self.low, self.high)


class RangeCandidates(NamedTuple):
    """K candidates for how a layer's input is rounded."""

    scale: Tensor
    """[K]"""
    zero_point: Tensor | None
    """[K] whole numbers, None where zero is code zero."""


def observe_inputs(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    trajectories: Trajectories,
    seed: int,
    progress: Progress | None = None,
    others: Sequence[Look] = (),
) -> dict[str, LayerInput]:
    """Replay all recorded calls and collect ranges, moments and a sample; layers that were never called are missing.

    `others` look on in the same replay.
    """
    steps = len(trajectories.timesteps)
    calls = sum(map(len, looked_at(trajectories, observed_shards(trajectories)).values()))
    kept = max(1, KEPT_ROWS // calls)
    generator = torch.Generator().manual_seed(seed)
    seen: dict[str, LayerInput] = {}
    counts: dict[str, int] = {}
    samples: dict[str, list[Tensor]] = {}
    probes: dict[str, _Probes] = {}
    reduce = OncePerInput(_reduced)
    first = latest = 0

    def look(name: str, x: Tensor, step: int) -> None:
        nonlocal first, latest
        # A step before the latest one is the first of another shard.
        first, latest = step if step < latest else first, step
        layer = layers[name]
        low, high, squares = reduce(layer, x)
        if name not in seen:
            seen[name] = _nothing_seen(len(low), x.ndim == 2)
            counts[name], samples[name], probes[name] = 0, [], _Probes()
        entry, rows = seen[name], row_count(layer, x)
        probes[name].look(rows_at(layer, x, torch.arange(0, rows, max(1, rows // PROBED))), step, first)
        entry.low, entry.high = torch.minimum(entry.low, low), torch.maximum(entry.high, high)
        entry.second_moment += squares
        entry.macs += _positions(layer, x) * layer_matrix(layer).numel()
        counts[name] += rows
        samples[name].append(_some_rows(layer, x, kept, generator).cpu())
        for other in others:
            other(name, x, step)

    replay_with(denoiser, layers, trajectories, look, progress)
    for name, entry in seen.items():
        entry.second_moment /= counts[name]
        kept_rows = torch.cat(samples.pop(name))
        entry.rows = kept_rows[_some(len(kept_rows), KEPT_ROWS, generator)]
        entry.conditioning |= steps > 1 and probes[name].still
    return seen


class _Probes:
    """Tells whether one layer is fed the same at every step of a run.

    Guidance may call the denoiser more than once a step, and more often or with more parts at some steps than at others:
    what is alike is compared.
    """

    def __init__(self) -> None:
        self._step, self._place = -1, 0
        self._known: dict[tuple[int, torch.Size], Tensor] = {}
        self._compared, self._moved = False, False

    def look(self, probe: Tensor, step: int, first: int) -> None:
        """See what the layer is fed at `step` of a run of which `first` is the first step that is looked at."""
        if step < self._step:
            # Another run, with prompts of its own.
            self._known = {}
        self._place = self._place + 1 if step == self._step else 0
        self._step = step
        # A layer that is not called at the first step does change with the step.
        self._moved |= step > first and not self._known
        known = self._known.setdefault((self._place, probe.shape), probe)
        self._compared |= known is not probe
        self._moved |= not torch.equal(known, probe)

    @property
    def still(self) -> bool:
        return self._compared and not self._moved


def _reduced(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each channel [C] of an input the smallest, the largest and the sum of squares."""
    # Along what lies together: the positions of [B, C, positions], or the rows of [N, C].
    x, along = (x.flatten(2), 2) if isinstance(layer, nn.Conv2d) else (x.flatten(0, -2)[None], 1)
    low, high = torch.aminmax(x, dim=along)
    squares = torch.linalg.vector_norm(x, dim=along).square()
    return low.amin(0).cpu(), high.amax(0).cpu(), squares.sum(0).cpu()


def _nothing_seen(channels: int, conditioning: bool) -> LayerInput:
    low, high, second_moment = torch.zeros(3, channels)
    return LayerInput(low, high, second_moment, torch.empty(0, channels), conditioning)


def _positions(layer: nn.Module, x: Tensor) -> int:
    """How often the weight of a Linear or Conv2d is multiplied with what it reads of `x`."""
    if not isinstance(layer, nn.Conv2d):
        return x[..., 0].numel()
    assert not isinstance(layer.padding, str)
    height, width = output_size(x.shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return len(x) * height * width


def _some(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` of the places of so many `rows`, drawn without repetition."""
    return torch.arange(rows) if rows <= count else torch.randperm(rows, generator=generator)[:count]


def _some_rows(layer: nn.Module, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` rows [N, C] of the input of a Linear or Conv2d, drawn without repetition."""
    return rows_at(layer, x, _some(row_count(layer, x), count, generator))


def row_count(layer: nn.Module, x: Tensor) -> int:
    """How many positions the input of a Linear [..., C] or Conv2d [B, C, H, W] has, each a row of C."""
    return x.numel() // x.shape[1 if isinstance(layer, nn.Conv2d) else -1]


def rows_at(layer: nn.Module, x: Tensor, places: Tensor) -> Tensor:
    """Those rows [N, C] that are at the `places` [N]."""
    places = places.to(x.device)
    if not isinstance(layer, nn.Conv2d):
        return x.flatten(0, -2)[places]
    positions = x.shape[2:].numel()
    return x.flatten(2)[places // positions, :, places % positions]


@torch.no_grad()
def rounding_errors(
    denoiser: nn.Module,
    layers: Mapping[Key, nn.Module],
    trajectories: Trajectories,
    grids: Mapping[Key, RangeCandidates],
    smoothings: Mapping[Key, Tensor],
    bits: Mapping[Key, int],
    seed: int,
    progress: Progress | None = None,
) -> dict[Key, Tensor]:
    """Squared error at a layer's output from rounding its input, for K candidates a layer: [2, S, K] each.

    Inputs are multiplied by the layer's smoothing [C] before they are rounded. Errors of different channels are taken as
    independent, so that a channel counts by the square of its weights. The first axis parts the recorded shards into two
    halves, one to choose on and one to evaluate by.
    """
    steps = len(trajectories.timesteps)
    errors = {key: torch.zeros(2, steps, len(grid.scale)) for key, grid in grids.items()}
    weights = {key: channel_weights(layers[key], smoothings[key]) for key in grids}
    generator = torch.Generator().manual_seed(seed)
    half = 0

    def look(key: Key, x: Tensor, step: int) -> None:
        rows = _some_rows(layers[key], x, ROWS, generator) * smoothings[key].to(x.device)
        errors[key][half, step] += range_errors(rows, weights[key], grids[key], bits[key]).cpu()

    chosen = {key: layers[key] for key in grids}
    shards = spread_evenly(trajectories.shards, STEP_SHARDS)
    for half in (0, 1):
        replay_with(denoiser, chosen, trajectories, look, progress, shards[half::2] or shards)
    return errors


def channel_weights(layer: nn.Module, smoothing: Tensor) -> Tensor:
    """How much the squared error of each channel [C] counts at the output, once inputs are multiplied by `smoothing`."""
    squares = layer_matrix(layer).square().sum((0, 2))
    return squares / smoothing.square().to(squares.device)


def range_errors(rows: Tensor, weights: Tensor, grid: RangeCandidates, bits: int) -> Tensor:
    """Mean squared error [K] at the output from rounding `rows` [R, C], channels weighted by `weights` [C]."""
    scale = grid.scale.to(rows.device)[:, None, None]
    zero_point = None if grid.zero_point is None else grid.zero_point.to(rows.device)[:, None, None]
    error = quantize_dequantize(rows[None], scale, bits, zero_point).sub_(rows)
    return error.square_().mean(1) @ weights


def input_rows(layer: nn.Module, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` rows [N, K], drawn at random, of what the K columns of a layer's weight are multiplied with."""
    return input_rows_at(layer, x, output_places(layer, x, count, generator))


def output_places(layer: nn.Module, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` of the positions, each with a row, of what a Linear or Conv2d makes of `x`: drawn at random."""
    if not isinstance(layer, nn.Conv2d):
        return _some(row_count(layer, x), count, generator)
    return torch.randint(_positions(layer, x), (count,), generator=generator)


def input_rows_at(layer: nn.Module, x: Tensor, places: Tensor) -> Tensor:
    """What the columns of a layer's weight are multiplied with at these positions of its output: [N, K]."""
    if not isinstance(layer, nn.Conv2d):
        return rows_at(layer, x, places)
    assert not isinstance(layer.padding, str)
    places = places.to(x.device)
    height, width = output_size(x.shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    image, place = places // (height * width), places % (height * width)
    top, left = place // width * layer.stride[0], place % width * layer.stride[1]
    padded = F.pad(x, (layer.padding[1],) * 2 + (layer.padding[0],) * 2)
    taps = [
        padded[image, :, top + row * layer.dilation[0], left + column * layer.dilation[1]]
        for row in range(layer.kernel_size[0])
        for column in range(layer.kernel_size[1])
    ]
    return torch.stack(taps, 2).flatten(1)


def layer_matrix(layer: nn.Module) -> Tensor:
    """The weight of a Linear or Conv2d in float32: [out, in, taps]."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float().flatten(2) if weight.ndim == 4 else weight.detach().float()[:, :, None]
