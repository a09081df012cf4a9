"""Recorded calls once more, for whoever wants to see what layers are fed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor, nn

from .sampling import replay
from .trajectory import Progress, Trajectories

SHARDS = 8
"""Recorded shards that are looked at, spread over all: ranges settle long before learning has enough."""
MANY_STEPS = 16
"""From so many steps on shards are asked for some of them only, by turns: neighbours see nearly the same, images do not."""
TURNS = 4
"""Of these, the shards that look at all steps between them."""

Key = TypeVar("Key", bound=Hashable)
"""Stands for a layer: its name, or its name and a format."""
Made = TypeVar("Made")


def replay_with(
    denoiser: nn.Module,
    layers: Mapping[Key, nn.Module],
    trajectories: Trajectories,
    look: Callable[[Key, Tensor, int], None],
    progress: Progress | None = None,
    shards: Sequence[Path] | None = None,
) -> None:
    """Replay recorded calls and hand each layer's input, with the step, to `look`."""
    places = looked_at(trajectories, observed_shards(trajectories) if shards is None else shards)
    step = 0
    convert = OncePerInput(lambda _, x: x.float())

    def watcher(key: Key) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, arguments: look(key, convert(layer, arguments[0]), step)

    with _hooks([(layer, watcher(key)) for key, layer in layers.items()]):
        for index, (shard, positions) in enumerate(places.items()):
            for position in positions:
                call = trajectories.call(shard, position)
                step = call.step
                replay(denoiser, call)
            if progress is not None:
                progress(index + 1, len(places))


def looked_at(trajectories: Trajectories, shards: Sequence[Path], turns: int | None = None) -> dict[Path, list[int]]:
    """The places of the recorded calls that are replayed of each shard: those of every so many steps, by `turns`."""
    turns = turns or _turns(len(shards), len(trajectories.timesteps))
    return {
        shard: [place for place, step in enumerate(trajectories.steps(shard)) if step % turns == index % turns]
        for index, shard in enumerate(shards)
    }


def replayed_steps(shards: int, steps: int) -> float:
    """How many steps are replayed of so many shards of runs of so many `steps`."""
    return shards * steps / _turns(shards, steps)


def _turns(shards: int, steps: int) -> int:
    return min(TURNS, shards) if steps >= MANY_STEPS else 1


def observed_shards(trajectories: Trajectories) -> list[Path]:
    """At most SHARDS of what was recorded, spread evenly."""
    return spread_evenly(trajectories.shards, SHARDS)


def spread_evenly(shards: list[Path], count: int) -> list[Path]:
    """At most `count` of the `shards`, the first of them and others at equal distances."""
    return shards[:: max(1, -(-len(shards) // count))]


@contextmanager
def _hooks(watchers: Sequence[tuple[nn.Module, Callable[[nn.Module, tuple[Tensor, ...]], None]]]) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(watcher) for layer, watcher in watchers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class OncePerInput(Generic[Made]):
    """Layers that are fed one tensor in turn, as queries, keys and values are, have what is `made` of it made once."""

    def __init__(self, make: Callable[[nn.Module, Tensor], Made]) -> None:
        self.make = make
        self.latest: tuple[Tensor, int, Made] | None = None

    def __call__(self, layer: nn.Module, x: Tensor) -> Made:
        if self.latest is not None and isinstance(layer, nn.Linear):
            known, version, made = self.latest
            # The version tells whether something was added to it in place since.
            if x is known and x._version == version:
                return made
        made = self.make(layer, x)
        # A convolution makes other rows of the same tensor.
        self.latest = (x, x._version, made) if isinstance(layer, nn.Linear) else None
        return made
