"""Recorded sampling runs on disk: what the denoiser saw at every step and what it answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .conditions import Condition
from .sampling import Call, Sampling, sample, watch, watch_guided
from .shard import Answer, Shard, holds, names_of, read_call, record_of

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""
Form = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Names, dtypes and shapes of what one call holds."""


@dataclass(frozen=True)
class Trajectories:
    """A folder of recorded runs; tensors are read one step at a time through a memory map."""

    folder: Path

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.safetensors"))

    @property
    def timesteps(self) -> list[float]:
        """The time steps the denoiser was asked for, in sampling order."""
        return list(_read(self.shards[0])["timesteps"])

    @property
    def updates(self) -> list[int]:
        """The step of every update of the sample by the scheduler; some schedulers update it twice a step."""
        return list(_read(self.shards[0])["updates"])

    def steps(self, shard: Path) -> list[int]:
        """The step of every call of one shard."""
        return list(_read(shard)["steps"])

    def images(self, shard: Path) -> int:
        """How many images were sampled in one shard."""
        return len(json.loads(_read(shard)["request"])[1])

    def forms(self, shard: Path) -> list[Form]:
        """The form of every call of one shard; no tensor is read."""
        with safe_open(shard, framework="pt") as file:
            record, stored = record_of(file), file.keys()
            parts = {name: file.get_slice(name) for name in stored}
            return [
                tuple(
                    (name, parts[held].get_dtype(), tuple(parts[held].get_shape()))
                    for name, held in names_of(stored, record["same"], index).items()
                )
                for index in range(len(record["steps"]))
            ]

    def call(self, shard: Path, index: int) -> Call:
        """One recorded call of one shard."""
        with safe_open(shard, framework="pt") as file:
            return read_call(file, record_of(file), index)

    def calls(self, shards: Sequence[Path] | None = None) -> Iterator[Call]:
        """Every recorded call, shard by shard, in the order in which the denoiser was called."""
        for path in self.shards if shards is None else shards:
            with safe_open(path, framework="pt") as file:
                record = record_of(file)
                for index in range(len(record["steps"])):
                    yield read_call(file, record, index)


def _read(shard: Path) -> dict[str, Any]:
    with safe_open(shard, framework="pt") as file:
        return record_of(file)


def record(
    pipeline: Any,
    conditions: Sequence[Condition],
    sampling: Sampling,
    folder: Path,
    batch: int = 4,
    progress: Progress | None = None,
    answer: Answer | None = None,
) -> Trajectories:
    """Sample every condition and write what the denoiser saw, `batch` runs a shard; finished shards are kept.

    Memory holds one shard, however many conditions there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = [list(conditions[start : start + batch]) for start in range(0, len(conditions), batch)]
    for index, group in enumerate(groups):
        path = folder / f"shard-{index:05d}.safetensors"
        request = json.dumps([asdict(sampling), [asdict(condition) for condition in group]], sort_keys=True)
        if not holds(path, request):
            observe(pipeline, group, sampling, answer).write(path, request)
        if progress is not None:
            progress(index + 1, len(groups))
    for extra in Trajectories(folder).shards[len(groups) :]:
        extra.unlink()
    return Trajectories(folder)


def observe(pipeline: Any, conditions: Sequence[Condition], sampling: Sampling, answer: Answer | None = None) -> Shard:
    """What is recorded of one call of the pipeline."""
    shard = Shard(answer)
    with watch(pipeline, shard.receive), watch_guided(pipeline, shard.receive_guided):
        sample(pipeline, conditions, sampling)
    return shard


def recording_bytes(short: Shard, steps: int) -> int:
    """Disk that a recorded run of so many steps takes, told from a shorter one of one image."""
    first = sum(size for size, step in zip(short.sizes, short.steps, strict=True) if step == 0)
    later = len(short.timesteps) - 1
    # What stays the same is held with the first step.
    each = (sum(short.sizes) - first) / later if later else first
    return first + round(each * (steps - 1))
