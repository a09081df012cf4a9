"""Recorded sampling runs on disk: what the denoiser saw at every step and what it answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffpress.export.tensor_files import save_tensors

from .conditions import Condition
from .sampling import Call, Sampling, sample, watch, watch_guided

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""


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
        with safe_open(self.shards[0], framework="pt") as file:
            return list(_record_of(file)["timesteps"])

    def steps(self, shard: Path) -> list[int]:
        """The step of every call of one shard."""
        with safe_open(shard, framework="pt") as file:
            return list(_record_of(file)["steps"])

    def images(self, shard: Path) -> int:
        """How many images were sampled in one shard."""
        with safe_open(shard, framework="pt") as file:
            return len(json.loads(_record_of(file)["request"])[1])

    def call(self, shard: Path, index: int) -> Call:
        """One recorded call of one shard."""
        with safe_open(shard, framework="pt") as file:
            return _read_call(file, sorted(file.keys()), index, _record_of(file)["steps"][index])

    def calls(self, shards: Sequence[Path] | None = None) -> Iterator[Call]:
        """Every recorded call, shard by shard, in the order in which the denoiser was called."""
        for path in self.shards if shards is None else shards:
            with safe_open(path, framework="pt") as file:
                names = sorted(file.keys())
                for index, step in enumerate(_record_of(file)["steps"]):
                    yield _read_call(file, names, index, step)


def _read_call(file: Any, names: Sequence[str], index: int, step: int) -> Call:
    prefix = f"{index:05d}."
    own = {name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)}
    output, guided = own.pop("output"), own.pop("guided", None)
    return Call({name.removeprefix("inputs."): value for name, value in own.items()}, output, step, guided)


def record(
    pipeline: Any,
    wanted: Sequence[Condition],
    sampling: Sampling,
    folder: Path,
    batch: int = 4,
    progress: Progress | None = None,
    answer: Callable[[Call], Tensor] | None = None,
) -> Trajectories:
    """Sample every condition and write what the denoiser saw, `batch` runs a shard; finished shards are kept.

    Memory holds one shard, however many conditions there are. `answer` says what is written as the output of a call, where
    that is not what the denoiser itself answered.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = [list(wanted[start : start + batch]) for start in range(0, len(wanted), batch)]
    for index, group in enumerate(groups):
        path = folder / f"shard-{index:05d}.safetensors"
        request = json.dumps([asdict(sampling), [asdict(condition) for condition in group]], sort_keys=True)
        if not _holds(path, request):
            _record_shard(pipeline, group, sampling, path, request, answer)
        if progress is not None:
            progress(index + 1, len(groups))
    for extra in Trajectories(folder).shards[len(groups) :]:
        extra.unlink()
    return Trajectories(folder)


def _record_shard(
    pipeline: Any,
    group: list[Condition],
    sampling: Sampling,
    path: Path,
    request: str,
    answer: Callable[[Call], Tensor] | None,
) -> None:
    tensors: dict[str, Tensor] = {}
    steps: list[int] = []
    timesteps: dict[int, float] = {}

    def receive(call: Call) -> None:
        index = len(steps)
        tensors.update(
            {f"{index:05d}.inputs.{name}": value.contiguous().clone() for name, value in call.inputs.items()}
        )
        tensors[f"{index:05d}.output"] = (call.output if answer is None else answer(call)).contiguous().clone()
        steps.append(call.step)
        timesteps[call.step] = float(call.inputs["timestep"].flatten()[0])

    def receive_guided(guided: Tensor) -> None:
        tensors[f"{len(steps) - 1:05d}.guided"] = guided.contiguous().clone()

    with watch(pipeline, receive), watch_guided(pipeline, receive_guided):
        sample(pipeline, group, sampling)
    # One key: safetensors writes several in a random order, and the same request must give the same bytes.
    metadata = {"record": json.dumps({"request": request, "steps": steps, "timesteps": list(timesteps.values())})}
    save_tensors({name: value.cpu() for name, value in tensors.items()}, path, metadata)


def _holds(path: Path, request: str) -> bool:
    """Whether a readable shard of exactly this request is there already."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return _record_of(file).get("request") == request
    except (SafetensorError, OSError):
        return False


def _record_of(file: Any) -> dict[str, Any]:
    """What an open shard says of itself."""
    return json.loads((file.metadata() or {}).get("record", "{}"))
