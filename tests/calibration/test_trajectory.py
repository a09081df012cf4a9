"""Recorded runs on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffpress.calibration.conditions import conditions
from diffpress.calibration.sampling import Sampling, denoiser_of, replay, sample, watch
from diffpress.calibration.trajectory import Trajectories, record
from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder

SAMPLING = Sampling(3, 3.0)


@pytest.fixture(scope="module")
def pipeline(tiny_class: Path) -> Any:
    return load_pipeline(PipelineFolder(tiny_class, "x"))


@pytest.fixture
def run(pipeline: Any, tmp_path: Path) -> Callable[..., Trajectories]:
    """A function: record so many conditions, two a shard."""

    def record_some(count: int = 5, seed: int = 0, **options: Any) -> Trajectories:
        wanted = conditions(pipeline, "builtin", count, seed)
        return record(pipeline, wanted, options.pop("sampling", SAMPLING), tmp_path / "runs", batch=2, **options)

    return record_some


def identities(trajectories: Trajectories) -> dict[str, tuple[int, int]]:
    """What tells whether a shard was written again."""
    stats = {path.name: path.stat() for path in trajectories.shards}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def contents(trajectories: Trajectories) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in trajectories.folder.iterdir()}


def test_calls_come_back_as_they_were(pipeline: Any, run: Callable[..., Trajectories]) -> None:
    live = []
    with watch(pipeline, lambda call: live.append(call)):
        sample(pipeline, conditions(pipeline, "builtin", 2, 0), SAMPLING)
    stored = list(run(2).calls())
    assert [call.step for call in stored] == [0, 1, 2]
    for ours, theirs in zip(stored, live, strict=True):
        assert ours.step == theirs.step
        assert ours.inputs.keys() == theirs.inputs.keys()
        assert all(torch.equal(ours.inputs[name], theirs.inputs[name]) for name in ours.inputs)
        assert torch.equal(ours.output, theirs.output)


def test_replay_equals_the_recorded_output_bit_for_bit(pipeline: Any, run: Callable[..., Trajectories]) -> None:
    calls = list(run(3).calls())
    # Two shards, three steps; guidance doubles the batch.
    assert [len(call.output) for call in calls] == [4, 4, 4, 2, 2, 2]
    for call in calls:
        assert torch.equal(replay(denoiser_of(pipeline), call), call.output)


def test_time_steps_are_the_schedulers(pipeline: Any, run: Callable[..., Trajectories]) -> None:
    trajectories = run(2)
    pipeline.scheduler.set_timesteps(3)
    assert trajectories.timesteps == [float(step) for step in pipeline.scheduler.timesteps]


def test_chosen_shards_only(run: Callable[..., Trajectories]) -> None:
    trajectories = run(5)
    everything = list(trajectories.calls())
    last = list(trajectories.calls(trajectories.shards[2:]))
    assert len(everything) == 9
    assert all(torch.equal(ours.output, theirs.output) for ours, theirs in zip(last, everything[6:], strict=True))


def test_finished_shards_are_kept(run: Callable[..., Trajectories]) -> None:
    done: list[tuple[int, int]] = []
    before = identities(run())
    assert identities(run(progress=lambda *step: done.append(step))) == before
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_recording_twice_gives_the_same_bytes(run: Callable[..., Trajectories]) -> None:
    first = contents(run())
    for path in run().shards:
        path.unlink()
    assert contents(run()) == first


@pytest.mark.parametrize("damage", ["deleted", "truncated", "emptied", "foreign"])
def test_only_a_damaged_shard_is_made_again(damage: str, run: Callable[..., Trajectories]) -> None:
    trajectories = run()
    before, sound = identities(trajectories), contents(trajectories)
    victim = trajectories.shards[1]
    if damage == "deleted":
        victim.unlink()
    elif damage == "foreign":
        victim.unlink()
        save_file({"a": torch.ones(1)}, victim)
    else:
        victim.write_bytes(victim.read_bytes()[: 0 if damage == "emptied" else -7])
    after = identities(run())
    assert {name for name in before if before[name] != after[name]} == {victim.name}
    assert contents(trajectories) == sound


@pytest.mark.parametrize("change", [{"seed": 1}, {"sampling": Sampling(4, 3.0)}, {"sampling": Sampling(3, 2.0)}])
def test_another_request_is_recorded_anew(change: dict[str, Any], run: Callable[..., Trajectories]) -> None:
    before = identities(run(2))
    after = identities(run(2, **change))
    assert before.keys() == after.keys()
    assert before["shard-00000.safetensors"] != after["shard-00000.safetensors"]


def test_shards_nobody_asked_for_are_removed(run: Callable[..., Trajectories]) -> None:
    run(5)
    assert [path.name for path in run(3).shards] == ["shard-00000.safetensors", "shard-00001.safetensors"]


def test_an_interruption_leaves_only_whole_shards(run: Callable[..., Trajectories], pipeline: Any) -> None:
    whole = contents(run())
    for path in run().shards:
        path.unlink()
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    handle = denoiser_of(pipeline).register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run()
    handle.remove()
    trajectories = run()
    assert contents(trajectories) == whole
