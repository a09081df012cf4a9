"""What stages hand on: written down and read back as it was, and worn as it will be loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpress.calibration.sampling import denoiser_of, replay
from diffpress.compress.changes import Changes, Note, worn
from diffpress.compress.methods import METHODS, STAGES, method_of
from diffpress.compress.plan import plan_rows
from diffpress.compress.result import changes_of
from diffpress.compress.stage import Cost, Running, Subject, run_stage
from diffpress.compress.stage_folder import StageFolder
from diffpress.export.artifact import load_pipeline, write_pipeline
from diffpress.export.edits import Factorize
from diffpress.export.errors import UserError
from diffpress.export.folder import PipelineFolder

QUICK: dict[str, dict[str, Any]] = {
    "obs": {"share_of": "units"},
    "masks": {"share_of": "units", "iterations": 2, "batch": 1, "validation_images": 1},
    "magnitude": {"share_of": "units"},
    "modulation": {"rank": 1, "tolerance": 1},
    "ptq": {"weights": 4, "attention": "scores"},
    "inherit": {"speedup": 1.2, "trials": 3, "images": 2},
    "feedback": {"speedup": 1.4, "trials": 2, "iterations": 5, "batch": 1, "validation_images": 1},
    "qalora": {"weights": 4, "iterations": 2, "batch": 2, "rank": 2, "validation_images": 1, "order": "whole"},
}
"""Options with which a method is done in seconds; the rest as they are left out."""
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "obs": ({"remove": 0.99}, r"remove 0.99: 0\.\d+ of what can be removed is the most"),
    "masks": ({"kinds": ["channels"]}, r"prune: DiTTransformer2DModel has no channels that can be removed"),
    "magnitude": ({"keep": ["nothing.*"]}, r"'nothing.\*' fits nothing that could be removed"),
    "modulation": (
        {"rank": 300},
        r"norm1.linear reads class labels beside the time step, and 2 others like it",
    ),
    "ptq": ({"keep": ["nothing.*"]}, r"'nothing.\*' fits no layer"),
    "qalora": ({"keep": ["nothing.*"]}, r"'nothing.\*' fits no layer"),
    "inherit": ({"speedup": 1000}, r"speedup 1000: [\d.]+ is the most that can be reached"),
    "feedback": ({"region": (0, 9)}, r"steps.region: 0 to 9 are no blocks of this denoiser"),
}
"""What fits no subject, and what is said of it."""


def silent(stage: str, done: int, total: int) -> None:
    """The report of those who want none."""


def assert_same(found: Changes, expected: Changes) -> None:
    assert (found.edits, found.notes, found.history, found.settled) == (
        expected.edits,
        expected.notes,
        expected.history,
        expected.settled,
    )
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


@pytest.fixture
def changes(recorded: Callable[[str], Any], quantized: Callable[..., Any]) -> Changes:
    """Of every kind of edit."""
    return changes_of(quantized("tiny_class", weights=4, attention="all"), recorded("tiny_class").forms)


def test_changes_are_read_back_as_they_were_written(changes: Changes, tmp_path: Path) -> None:
    assert {edit.kind for edit in changes.edits} == {"pack", "quantize_attention"}
    folder = StageFolder(tmp_path / "quantize")
    assert folder.finished() is None
    folder.finish(changes)
    found = folder.finished()
    assert found is not None
    assert_same(found, changes)


@pytest.mark.parametrize("damage", ["words", "tensors", "absent"])
def test_a_damaged_stage_counts_as_unfinished(changes: Changes, tmp_path: Path, damage: str) -> None:
    folder = StageFolder(tmp_path)
    folder.finish(changes)
    if damage == "words":
        (tmp_path / "changes.json").write_text("{")
    elif damage == "tensors":
        (tmp_path / "changes.safetensors").write_bytes(b"nonsense")
    else:
        (tmp_path / "changes.safetensors").unlink()
    assert folder.finished() is None


def test_one_stage_after_the_other() -> None:
    first = Changes(notes={"a": Note("first"), "b": Note("first")}, history=({"loss": 1.0},), settled={"x.y": 1})
    later = Changes(notes={"b": Note("later")}, history=({"loss": 0.5},))
    both = first.then(later)
    assert both.notes == {"a": Note("first"), "b": Note("later")}
    assert both.history == ({"loss": 1.0}, {"loss": 0.5})
    assert both.settled == {"x.y": 1}


def test_of_what_one_stage_alone_changed_that_stage_speaks() -> None:
    edit = Factorize(component="transformer", module="a", rank=1)
    first = Changes((edit,), notes={"a": Note("first"), "b": Note("first")})
    later = {"a": Note("later"), "b": Note("later")}
    assert first.then(Changes(notes=later)).notes == {"a": Note("first"), "b": Note("later")}
    assert first.then(Changes((edit,), notes=later)).notes == later


def test_worn_changes_answer_as_the_loaded_artifact(subject: Subject, changes: Changes, tmp_path: Path) -> None:
    """Bit for bit, at every step; and off again, nothing is left of them."""
    source = PipelineFolder(Path(subject.pipeline.config._name_or_path), "tiny")
    write_pipeline(tmp_path / "out", source, changes.edits, {"transformer": changes.tensors}, subject.timesteps)
    loaded = denoiser_of(load_pipeline(PipelineFolder(tmp_path / "out", "out")))
    calls = list(subject.trajectories.calls(subject.trajectories.shards[:1]))
    with worn(subject.model, changes, subject.timesteps):
        found = [replay(subject.model, call) for call in calls]
    for call, answer in zip(calls, found, strict=True):
        assert torch.equal(answer, replay(loaded, call))
        assert torch.equal(replay(subject.model, call), call.output)


class Recording:
    """A method that remembers what it saw."""

    def __init__(self, changes: Changes) -> None:
        self.changes, self.runs, self.seen = changes, 0, torch.empty(0)

    def check(self, subject: Subject, options: Any) -> None:
        pass

    def estimate(self, subject: Subject, options: Any, running: Running) -> Cost:
        return Cost({})

    def run(self, subject: Subject, options: Any, folder: StageFolder, report: Any) -> Changes:
        self.runs += 1
        self.seen = replay(subject.model, next(iter(subject.trajectories.calls())))
        return self.changes


def test_a_later_stage_works_on_what_wears_the_changes_of_earlier_ones(
    subject: Subject, changes: Changes, tmp_path: Path
) -> None:
    call = next(iter(subject.trajectories.calls()))
    plain, later = Recording(Changes()), Recording(Changes())
    run_stage(plain, subject, None, StageFolder(tmp_path / "plain"), silent)
    run_stage(later, subject.after(changes), None, StageFolder(tmp_path / "later"), silent)
    assert torch.equal(plain.seen, call.output)
    with worn(subject.model, changes, subject.timesteps):
        assert torch.equal(later.seen, replay(subject.model, call))
    assert not torch.equal(later.seen, plain.seen)


def test_a_finished_stage_is_not_run_again(subject: Subject, changes: Changes, tmp_path: Path) -> None:
    method, folder = Recording(changes), StageFolder(tmp_path / "stage")
    first = run_stage(method, subject, None, folder, silent)
    again = run_stage(method, subject, None, folder, silent)
    assert method.runs == 1
    assert_same(again, first)


def tensor_bytes(file: Path) -> int:
    """Of the tensors in a file, which begins with the length of its header."""
    data = file.read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_every_method_keeps_the_contract(entry: Any, subject: Subject, tmp_path: Path) -> None:
    """Checks, estimates, runs, and leaves changes that a plan, a folder and an artifact can be made of."""
    assert entry.stage in STAGES
    options = entry.options(method=entry.name, **QUICK[entry.name])
    method = method_of(options)
    method.check(subject, options)
    told: dict[str, list[tuple[int, int]]] = {}

    def report(stage: str, done: int, total: int) -> None:
        told.setdefault(stage.split(",")[0], []).append((done, total))

    recorded = sum(path.stat().st_size for path in subject.trajectories.shards)
    images = sum(subject.trajectories.images(path) for path in subject.trajectories.shards)
    cost = method.estimate(subject, options, Running(3, 0.1, 2, recorded // images))
    changes = run_stage(method, subject, options, StageFolder(tmp_path / "work"), report)
    assert set(told) == set(cost.seconds)
    assert all(0 < done <= total for steps in told.values() for done, total in steps)
    assert changes.edits
    written = [path for path in (tmp_path / "work").rglob("*.safetensors") if path.is_file()]
    held = sum(tensor.nbytes for tensor in changes.tensors.values())
    assert held <= sum(tensor_bytes(path) for path in written) <= cost.disk_bytes
    rows = plan_rows("transformer", subject.forms, changes)
    smaller = sum(row.bytes for row in rows) < sum(row.source_bytes for row in rows)
    assert smaller == (entry.stage != "steps"), "a plan of steps adds what it holds"
    assert json.dumps([row.model_dump(mode="json") for row in rows])
    source = PipelineFolder(Path(subject.pipeline.config._name_or_path), "tiny")
    write_pipeline(tmp_path / "out", source, changes.edits, {"transformer": changes.tensors}, subject.timesteps)
    loaded = denoiser_of(load_pipeline(PipelineFolder(tmp_path / "out", "out")))
    call = next(iter(subject.trajectories.calls()))
    with worn(subject.model, changes, subject.timesteps):
        assert torch.equal(replay(subject.model, call), replay(loaded, call))


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_every_method_refuses_what_does_not_fit_before_any_work(entry: Any, subject: Subject) -> None:
    wrong, words = WRONG[entry.name]
    options = entry.options(method=entry.name, **QUICK[entry.name] | wrong)
    with pytest.raises(UserError, match=words):
        method_of(options).check(subject, options)
