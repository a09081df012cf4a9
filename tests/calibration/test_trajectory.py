"""Recorded runs on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffpress.calibration.conditions import conditions
from diffpress.calibration.sampling import Call, Sampling, denoiser_of, replay, sample, watch
from diffpress.calibration.shard import Shard
from diffpress.calibration.trajectory import Trajectories, observe, record, recording_bytes
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


def test_what_calls_see_alike_is_held_once(tiny_text: Path, tmp_path: Path) -> None:
    """The prompt's encoding is one tensor a shard, and is read back at every call; without guidance, so is the output."""
    pipeline = load_pipeline(PipelineFolder(tiny_text, "tiny"))
    wanted = conditions(pipeline, "builtin", 2, 0)
    live: list[Call] = []
    with watch(pipeline, live.append):
        sample(pipeline, wanted, Sampling(3, 1.0))
    runs = record(pipeline, wanted, Sampling(3, 1.0), tmp_path, batch=2)
    for ours, theirs in zip(runs.calls(), live, strict=True):
        assert torch.equal(ours.inputs["encoder_hidden_states"], theirs.inputs["encoder_hidden_states"])
        assert ours.guided is not None
        assert torch.equal(ours.guided, ours.output)
    with safe_open(runs.shards[0], framework="pt") as file:
        names = sorted(file.keys())
    assert names == [
        "00000.inputs.encoder_hidden_states",
        *(f"0000{call}.{name}" for call in range(3) for name in ("inputs.sample", "inputs.timestep", "output")),
    ]


def test_tensors_of_equal_bytes_and_another_form_are_held_apart() -> None:
    shard = Shard()
    inputs = {"timestep": torch.zeros(1), "flat": torch.zeros(4), "square": torch.zeros(2, 2)}
    for step in range(2):
        shard.receive(Call({**inputs, "whole": torch.zeros(4, dtype=torch.int32)}, torch.zeros(4), step))
    assert list(shard.tensors) == [f"00000.inputs.{name}" for name in ("timestep", "flat", "square", "whole")]
    assert shard.same["00000.output"] == "00000.inputs.flat"
    assert shard.same["00001.inputs.whole"] == "00000.inputs.whole"
    assert shard.sizes == [4 + 16 + 16 + 16, 0]


def test_what_was_expanded_is_held_as_any_other() -> None:
    """As the time step of one image is in some pipelines."""
    shard = Shard()
    for name, value in {"t": torch.tensor(0.5).expand(1), "x": torch.tensor([0.5]).expand(2, 3, 1)}.items():
        shard.receive(Call({"timestep": torch.tensor(1.0), name: value}, torch.zeros(1), 0))
        assert torch.equal(shard.tensors[f"{len(shard.steps) - 1:05d}.inputs.{name}"], value)


@pytest.mark.parametrize(("seen", "steps"), [(2, 3), (3, 3), (3, 10)])
def test_the_size_of_a_recording_is_told_from_a_shorter_one(
    seen: int, steps: int, tiny_text: Path, tmp_path: Path
) -> None:
    pipeline = load_pipeline(PipelineFolder(tiny_text, "tiny"))
    wanted = conditions(pipeline, "builtin", 1, 0)
    said = recording_bytes(observe(pipeline, wanted, Sampling(seen, 3.0)), steps)
    whole = observe(pipeline, wanted, Sampling(steps, 3.0))
    assert said == sum(whole.sizes) == sum(value.numel() * value.element_size() for value in whole.tensors.values())


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
