"""Recorded sampling runs on disk: what the denoiser saw at every step and what it answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from diffpress.export.errors import UnsupportedModelError

from .conditions import Condition
from .sampling import Call, Sampling, groups_of, sample, watch
from .schedulers import watch_guided
from .shard import Answer, Shard, around, holds, names_of, read_call, record_of

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""


class Form(NamedTuple):
    """What one call holds."""

    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    """Names, dtypes and shapes."""
    around: str
    """The rest of what the denoiser was called with, as JSON."""


@dataclass(frozen=True)
class Trajectories:
    """A folder of recorded runs, as one denoiser sees them; tensors are read one step at a time through a memory map."""

    folder: Path
    part: str | None = None
    """What the pipeline calls the denoiser; left out where it has one."""

    def of(self, part: str) -> Trajectories:
        """The same runs, as another denoiser sees them."""
        return replace(self, part=part)

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.safetensors"))

    @property
    def parts(self) -> list[str]:
        """The denoisers that were called, in the order in which they first were."""
        return list(_read(self.shards[0])["timesteps"])

    @property
    def answering(self) -> list[str]:
        """Those of them whose answers a scheduler is given; all of them where there is none."""
        record = _read(self.shards[0])
        found = {part for part, _ in record["updates"]}
        return [part for part in record["timesteps"] if not found or part in found]

    @property
    def timesteps(self) -> list[float]:
        """The time steps the denoiser was asked for, in sampling order."""
        record = _read(self.shards[0])
        return list(record["timesteps"][self._part(record)])

    @property
    def updates(self) -> list[int]:
        """The step of every update of the sample by the scheduler; some schedulers update it twice a step."""
        record = _read(self.shards[0])
        return [step for part, step in record["updates"] if part == self._part(record)]

    def steps(self, shard: Path) -> list[int]:
        """The step of every call of one shard."""
        record = _read(shard)
        return [record["steps"][place] for place in self._places(record)]

    def images(self, shard: Path) -> int:
        """How many images were sampled in one shard."""
        return len(json.loads(_read(shard)["request"])[1])

    def forms(self, shard: Path) -> list[Form]:
        """The form of every call of one shard; no tensor is read."""
        with safe_open(shard, framework="pt") as file:
            record, stored = record_of(file), file.keys()
            parts = {name: file.get_slice(name) for name in stored}
            return [
                Form(
                    tuple(
                        (name, parts[held].get_dtype(), tuple(parts[held].get_shape()))
                        for name, held in names_of(stored, record["same"], place).items()
                    ),
                    json.dumps(around(record, place)),
                )
                for place in self._places(record)
            ]

    def call(self, shard: Path, index: int) -> Call:
        """One recorded call of one shard."""
        with safe_open(shard, framework="pt") as file:
            record = record_of(file)
            return read_call(file, record, self._places(record)[index])

    def calls(self, shards: Sequence[Path] | None = None) -> Iterator[Call]:
        """Every recorded call, shard by shard, in the order in which the denoiser was called."""
        for path in self.shards if shards is None else shards:
            with safe_open(path, framework="pt") as file:
                record = record_of(file)
                for place in self._places(record):
                    yield read_call(file, record, place)

    def _part(self, record: Mapping[str, Any]) -> str:
        return self.part or next(iter(record["timesteps"]))

    def _places(self, record: Mapping[str, Any]) -> list[int]:
        """Of the calls of the denoiser among all that were recorded."""
        return [place for place, part in enumerate(record["parts"]) if part == self._part(record)]


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
    only: str | None = None,
) -> Trajectories:
    """Sample every condition and write what the denoisers saw, at most `batch` runs a shard; finished shards are kept.

    Memory holds one shard, however many conditions there are. Where `only` is given, nothing is written of other parts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = groups_of(pipeline, conditions, sampling, batch)
    for index, group in enumerate(groups):
        path = folder / f"shard-{index:05d}.safetensors"
        request = json.dumps([asdict(sampling), [asdict(condition) for condition in group]], sort_keys=True)
        if not holds(path, request):
            observe(pipeline, group, sampling, answer, only).write(path, request)
        if progress is not None:
            progress(index + 1, len(groups))
    for extra in Trajectories(folder).shards[len(groups) :]:
        extra.unlink()
    return Trajectories(folder, only)


def observe(
    pipeline: Any,
    conditions: Sequence[Condition],
    sampling: Sampling,
    answer: Answer | None = None,
    only: str | None = None,
) -> Shard:
    """What is recorded of one call of the pipeline (see `record`)."""
    shard = Shard(answer, only=only)
    with watch(pipeline, shard.receive), watch_guided(pipeline, shard.receive_guided):
        sample(pipeline, conditions, sampling)
    _check_order(pipeline, shard)
    return shard


def _check_order(pipeline: Any, shard: Shard) -> None:
    """Raises UnsupportedModelError where time steps turn back in a run, so that none comes before or after another."""
    for part, known in shard.timesteps.items():
        times = [known[step] for step in sorted(known)]
        if times != sorted(times) and times != sorted(times, reverse=True):
            asked = ", ".join(f"{time:g}" for time in times)
            raise UnsupportedModelError(
                f"{type(pipeline).__name__} asks its {part} for time steps that neither fall nor rise ({asked}), so that steps "
                "have no order. Give the pipeline another scheduler."
            )


def recording_bytes(short: Shard, steps: int) -> int:
    """Disk that a recorded run of so many steps takes, told from a shorter one of one image."""
    first = sum(size for size, step in zip(short.sizes, short.steps, strict=True) if step == 0)
    later = short.step_count() - 1
    rest = sum(short.sizes) - first
    # What stays the same is held with the first step.
    each = rest / later if rest else first / (later + 1)
    return first + round(each * (steps - 1))
