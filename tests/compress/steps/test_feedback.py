"""Learning feedback: what answers have to be, which plans there are, that it gets better and goes on where it was killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from diffpress.calibration.sampling import denoiser_of, replay, sample
from diffpress.compress.changes import Changes, worn
from diffpress.compress.options import Feedback
from diffpress.compress.overlay import frozen
from diffpress.compress.stage import Subject, run_stage
from diffpress.compress.stage_folder import StageFolder
from diffpress.compress.steps.feedback import method
from diffpress.compress.steps.feedback.blocks import Blocks, find_blocks
from diffpress.compress.steps.feedback.landing import fit_damping, landings, outer_steps, targets
from diffpress.compress.steps.feedback.search import outer_places, plan_macs, plan_of, plans, spell
from diffpress.compress.steps.feedback.student import Student
from diffpress.compress.steps.feedback.train import Learning
from diffpress.compress.steps.feedback.training_data import StudentRollouts, TrainingData, step_weights
from diffpress.compress.steps.feedback.validation import Validation
from diffpress.export.artifact import load_pipeline, write_pipeline
from diffpress.export.edits import Attach
from diffpress.export.errors import RecipeError, UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.runtime import FeedbackPlan

EPS = torch.finfo(torch.float64).eps
QUICK: dict[str, Any] = {
    "method": "feedback",
    "speedup": 1.4,
    "trials": 2,
    "iterations": 10,
    "batch": 1,
    "rate": 0.01,
    "validation_images": 2,
}


class KilledError(Exception):
    """Stands for a process that ends."""


def silent(stage: str, done: int, total: int) -> None:
    """The report of those who want none."""


@pytest.mark.parametrize("steps", ["@.@.@", "##..@.", "@", "@....", "#@@#"])
def test_answers_that_are_as_they_have_to_be_land_where_the_teacher_does(steps: str) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.rand(len(steps), generator=generator, dtype=torch.float64) + 0.1
    damping = torch.rand(len(steps), generator=generator, dtype=torch.float64).tolist()
    taught = {j: torch.randn(3, generator=generator, dtype=torch.float64) for j in range(len(steps))}
    landed = landings(steps, damping, w.tolist())
    answers = targets(landed, taught)
    outer = outer_steps(steps)
    assert list(answers) == outer
    for place, k in enumerate(outer):
        end, before = [*outer, len(steps)][place + 1], outer[place - 1] if place else None
        error = torch.zeros(3, dtype=torch.float64)
        for j in range(k, end):
            slope = 0 if before is None else (answers[k] - answers[before]) / (k - before)
            error += w[j] * (answers[k] + damping[j] * (j - k) * slope - taught[j])
        # A sum of numbers of the size of one: one rounding for each product and sum.
        assert float(error.abs().max()) < 16 * len(steps) * EPS


def test_without_held_steps_an_answer_has_to_be_the_teachers() -> None:
    taught = {0: torch.tensor([1.0]), 1: torch.tensor([2.0])}
    assert targets(landings("@@", [0.0, 0.0], [0.3, 0.5]), taught) == taught


def test_damping_is_found_where_answers_follow_a_line() -> None:
    line = [torch.tensor([1.0, 2.0]) + step * torch.tensor([0.5, -1.0]) for step in range(5)]
    products = torch.tensor([[float(a @ b) for b in line] for a in line], dtype=torch.double)
    assert fit_damping(products, "##..#") == pytest.approx([0, 0, 1, 1, 0])
    back = [line[0], line[1], line[0]]
    products = torch.tensor([[float(a @ b) for b in back] for a in back], dtype=torch.double)
    # It never turns around.
    assert fit_damping(products, "##.") == [0, 0, 0]


def test_weights_of_steps_are_one_on_average() -> None:
    assert step_weights({0: 1.0, 2: -2.0}) == pytest.approx({0: 0.4, 2: 1.6})


def test_blocks_are_found_by_what_they_hand_on(subject: Subject) -> None:
    call = next(iter(subject.trajectories.calls()))
    found = find_blocks(subject.model, lambda: replay(subject.model, call))
    assert found[:3] == ("transformer_blocks", 2, ("hidden_states",))
    assert 0 < 2 * found.block_macs < found.total_macs


def test_blocks_that_hand_on_two_tensors_are_found_too() -> None:
    model = SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )
    call = {"hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 8)}
    conditions = {"pooled_projections": torch.randn(1, 8), "timestep": torch.tensor([5.0])}
    found = find_blocks(model, lambda: model(**call, **conditions))
    assert found[:3] == ("transformer_blocks", 2, ("encoder_hidden_states", "hidden_states"))


def test_a_denoiser_whose_blocks_are_no_chain_is_refused(recorded: Callable[[str], Any]) -> None:
    own = recorded("tiny_text")
    call = next(iter(own.trajectories.calls()))
    with pytest.raises(UnsupportedModelError, match=r"blocks that hand on what they give.*method inherit"):
        find_blocks(own.denoiser, lambda: replay(own.denoiser, call))


@pytest.mark.parametrize("power", [0.5, 1.0, 1.3, 3.0])
@pytest.mark.parametrize(("steps", "count"), [(25, 12), (25, 25), (50, 3), (3, 1)])
def test_computed_steps_begin_with_the_first_and_are_one_apart_at_least(steps: int, count: int, power: float) -> None:
    places = outer_places(steps, count, power)
    assert places[0] == 0
    assert len(set(places)) == count
    assert places == sorted(places)
    assert count == 1 or places[-1] == steps - 1


def test_every_plan_is_as_cheap_as_asked() -> None:
    blocks = Blocks("blocks", 8, ("x",), 10, 83)
    found = list(plans(blocks, 25, 1.8, lambda count: outer_places(25, count, 1.0), None, None))
    assert {own.source for own in found} == {"pass", "forecast"}
    assert len({own.steps for own in found}) > 2
    assert all(plan_macs(blocks, own) * 1.8 <= 25 * blocks.total_macs for own in found)
    assert not list(plans(blocks, 25, 30, lambda count: outer_places(25, count, 1.0), None, None))


@pytest.mark.parametrize(
    ("looped", "source", "expected"),
    [(9, "pass", "@.@.##@."), (9, "forecast", "#.@.##@."), (1, "pass", "#.#.##@."), (0, "pass", "#.#.###.")],
)
def test_steps_whose_answer_stands_for_others_are_looped(looped: int, source: str, expected: str) -> None:
    assert spell(8, [0, 2, 4, 5, 6], looped, source) == expected


def learning(subject: Subject, plan: FeedbackPlan, folder: Path, **chosen: Any) -> Learning:
    options = Feedback.model_validate({**QUICK, **chosen})
    damping = [0.5] * len(plan.steps)
    student = Student(subject.model, plan, torch.tensor(damping), subject.timesteps)
    wanted = subject.conditions(6)
    runs = StudentRollouts(subject.pipeline, wanted[2:], subject.sampling, folder, 2)
    looped = [step for step, cell in enumerate(plan.steps) if cell == "@"]
    data = TrainingData(subject.trajectories, runs, landings(plan.steps, damping, [1.0] * 3), looped, 0)
    validation = Validation(subject.pipeline, wanted[:2], subject.sampling, 2)
    return Learning(student, data, validation, None, options, options.iterations, folder)


@pytest.mark.parametrize(("source", "steps"), [("pass", "@.@"), ("forecast", "#@.")])
def test_learning_lowers_the_error_of_whole_runs_held_out(
    subject: Subject, tmp_path: Path, source: str, steps: str
) -> None:
    blocks = Blocks("transformer_blocks", 2, ("hidden_states",), 1, 2)
    own = learning(subject, plan_of(blocks, steps, (0, 1), source), tmp_path, iterations=24, batch=2)
    with frozen(subject.model):
        progress = own.run()
        after = own.validation.error(own.student)
    history = [row["evaluation"] for row in progress.history]
    assert after == progress.best == min(history) < history[0]
    assert bool(own.student.part.scales.any())
    assert list(tmp_path.glob("round-*"))


def test_a_run_that_was_killed_ends_as_one_that_was_not(subject: Subject, tmp_path: Path) -> None:
    options = Feedback.model_validate(QUICK)
    whole = run_stage(method, subject, options, StageFolder(tmp_path / "whole"), silent)  # type: ignore[arg-type]
    calls = 0

    def kill(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (3, 9):
            raise KilledError

    folder = StageFolder(tmp_path / "killed")
    for _ in range(2):
        with pytest.raises(KilledError):
            run_stage(method, subject, options, folder, kill)  # type: ignore[arg-type]
    found = run_stage(method, subject, options, folder, kill)  # type: ignore[arg-type]
    assert found.edits == whole.edits
    assert found.history == whole.history
    assert found.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(own, whole.tensors[name]) for name, own in found.tensors.items())


@pytest.fixture
def changes(subject: Subject, tmp_path: Path) -> Changes:
    return run_stage(method, subject, Feedback.model_validate(QUICK), StageFolder(tmp_path / "work"), silent)  # type: ignore[arg-type]


def test_what_was_tried_is_told_and_the_best_is_left(subject: Subject, changes: Changes, tmp_path: Path) -> None:
    (edit,) = changes.edits
    assert isinstance(edit, Attach)
    tried = json.loads((tmp_path / "work" / "tried.json").read_text())
    errors = {json.dumps(row["plan"], sort_keys=True): row["error"] for row in tried}
    assert changes.history[-1]["evaluation"] >= min(errors.values())
    assert errors[json.dumps(edit.settings.model_dump(mode="json"), sort_keys=True)] == min(errors.values())


def test_the_artifact_draws_as_the_student_did(subject: Subject, changes: Changes, tmp_path: Path) -> None:
    source = PipelineFolder(Path(subject.pipeline.config._name_or_path), "tiny")
    write_pipeline(tmp_path / "out", source, changes.edits, {"transformer": changes.tensors}, subject.timesteps)
    loaded = load_pipeline(PipelineFolder(tmp_path / "out", "out"))
    wanted = subject.conditions(2)

    def drawn(pipeline: Any) -> Tensor:
        return sample(pipeline, wanted, subject.sampling).latents

    before = drawn(subject.pipeline)
    with worn(subject.model, changes, subject.timesteps):
        expected = drawn(subject.pipeline)
    assert torch.equal(drawn(loaded), expected)
    assert not torch.equal(expected, before)
    assert denoiser_of(loaded).feedback is not None


def gradients(model: nn.Module) -> list[tuple[bool, Tensor | None]]:
    """Of each weight, whether it needs one and what it has: other tests share the model."""
    return [(own.requires_grad, own.grad) for own in model.parameters()]


@pytest.fixture
def gradients_before(subject: Subject) -> list[tuple[bool, Tensor | None]]:
    """Of the teacher, before anything is learned."""
    return gradients(subject.model)


def test_the_teacher_is_left_as_it_was(
    gradients_before: list[tuple[bool, Tensor | None]], subject: Subject, changes: Changes
) -> None:
    call = next(iter(subject.trajectories.calls()))
    assert torch.equal(replay(subject.model, call), call.output)
    for (needed, gradient), (needs, own) in zip(gradients_before, gradients(subject.model), strict=True):
        assert needs == needed
        assert own is gradient
    assert not any("forward" in vars(module) for module in subject.model.modules())


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [({"region": (0, 2)}, "steps.region: 0 to 2 are no blocks of this denoiser, which has 0 to 1")],
)
def test_what_does_not_fit_is_refused_before_any_work(subject: Subject, chosen: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        method.check(subject, Feedback.model_validate({**QUICK, **chosen}))


def test_a_speed_up_that_leaves_no_step_is_refused(subject: Subject, tmp_path: Path) -> None:
    options = Feedback.model_validate({**QUICK, "speedup": 4})
    with pytest.raises(RecipeError, match=r"steps.speedup: 4 leaves no step of 3 to compute. Give at most 3"):
        run_stage(method, subject, options, StageFolder(tmp_path), silent)  # type: ignore[arg-type]
