"""What is learned from: the teacher's runs, and the student's own with the teacher's answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpress.calibration.examples import Examples
from diffpress.calibration.sampling import Call, replay, sample, watch
from diffpress.calibration.trajectory import Trajectories
from diffpress.compress.options import Qalora
from diffpress.compress.qalora import StudentRollouts
from diffpress.compress.qalora.student import Student
from diffpress.compress.qalora.training_data import (
    ROLLOUT_ROUNDS,
    STEPS_PER_IMAGE,
    TrainingData,
    images_per_round,
    steps_per_image,
)
from diffpress.compress.quantized_layer import QuantizedLayer
from diffpress.compress.result import QuantizationResult

School = Callable[..., tuple[Any, QuantizationResult, StudentRollouts, Qalora]]
EVEN = torch.full((3,), 1 / 3)
IMAGES = 8
LAYERS = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2", "proj_out_2")


@pytest.fixture
def training_data(school: School) -> tuple[Any, Student, TrainingData, StudentRollouts]:
    """A tiny pipeline, a student that has three layers changed visibly, and its training_data."""
    own, found, runs, options = school()
    start = {name: found.layers[name] for name in LAYERS}
    student = Student(own.denoiser, start, own.trajectories.timesteps, options, 0)
    return own, student, TrainingData(own.trajectories, runs, EVEN, 7, IMAGES), runs


def test_own_runs_hold_what_the_student_saw_and_the_teacher_answered(
    training_data: tuple[Any, Student, TrainingData, StudentRollouts],
) -> None:
    own, student, learned, runs = training_data
    learned.follow(student, 0)
    stored = list(Trajectories(runs.folder / "round-00000").calls())
    calls: list[Call] = []
    with student.on(), watch(own.pipeline, calls.append):
        sample(own.pipeline, [runs.wanted[index % len(runs.wanted)] for index in range(IMAGES)], runs.sampling)
    assert len(stored) == len(calls) == 3
    for call, seen in zip(stored, calls, strict=True):
        assert all(torch.equal(call.inputs[name], value) for name, value in seen.inputs.items())
        # The teacher's answer to it, bit for bit; not what the student went on with.
        assert torch.equal(replay(own.denoiser, call), call.output)
        assert not torch.equal(call.output, seen.output)
    with student.on():
        assert torch.equal(replay(own.denoiser, stored[-1]), calls[-1].output)
    # The student's runs part from the teacher's after the first step.
    teachers: list[Call] = []
    with watch(own.pipeline, teachers.append):
        sample(own.pipeline, [runs.wanted[index % len(runs.wanted)] for index in range(IMAGES)], runs.sampling)
    latents = [call.inputs["hidden_states"] for call in teachers]
    assert torch.equal(stored[0].inputs["hidden_states"], latents[0])
    assert not torch.equal(stored[1].inputs["hidden_states"], latents[1])


def test_batches_are_drawn_again_by_their_number(
    training_data: tuple[Any, Student, TrainingData, StudentRollouts],
) -> None:
    own, _, learned, runs = training_data
    again = TrainingData(own.trajectories, runs, EVEN, 7, IMAGES)
    for number in (0, 3, 100):
        first, second = learned.batch(number, 5), again.batch(number, 5)
        assert torch.equal(first.output, second.output)
        assert first.steps.tolist() == second.steps.tolist()
        assert len(first.steps) == 5
    assert not torch.equal(learned.batch(0, 5).output, learned.batch(1, 5).output)


def test_steps_are_drawn_by_their_importance(training_data: tuple[Any, Student, TrainingData, StudentRollouts]) -> None:
    own, _, _, runs = training_data
    importance = torch.tensor([0.1, 0.2, 0.7])
    steps = TrainingData(own.trajectories, runs, importance, 0, IMAGES).batch(0, 1000).steps
    shares = steps.bincount(minlength=3) / 1000
    # Four standard deviations of a share.
    deviation = (importance * (1 - importance) / 1000).sqrt()
    assert ((shares - importance).abs() <= 4 * deviation).all()


def test_a_batch_holds_several_steps_of_each_picture(
    training_data: tuple[Any, Student, TrainingData, StudentRollouts], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, learned, _ = training_data
    (runs,) = learned.recorded.runs
    assert sorted(chain(*runs)) == list(range(len(learned.recorded)))
    assert all(learned.recorded.steps[run].tolist() == [0, 1, 2] for run in runs)
    drawn: list[int] = []
    monkeypatch.setattr(learned.recorded, "batch", drawn.extend)
    learned.batch(0, 40)
    owner = {example: index for index, run in enumerate(runs) for example in run}
    images = [
        {owner[example] for example in drawn[first : first + STEPS_PER_IMAGE]}
        for first in range(0, 40, STEPS_PER_IMAGE)
    ]
    assert all(len(each) == 1 for each in images)
    assert len(set.union(*images)) > 1


@pytest.mark.parametrize(("size", "together"), [(16, 4), (8, 4), (6, 3), (5, 1), (2, 2), (1, 1)])
def test_batches_of_any_size_are_cut_evenly(size: int, together: int) -> None:
    assert steps_per_image(size) == together


def test_a_round_makes_half_of_the_examples_that_are_drawn_until_the_next() -> None:
    assert images_per_round(100, 16, 25) == 32
    assert images_per_round(1, 1, 50) == 1


def test_three_of_four_batches_are_the_students_own_once_there_are_some(
    training_data: tuple[Any, Student, TrainingData, StudentRollouts],
) -> None:
    """Each is bit for bit of one pool; that what a student's own runs hold is the teacher's answer is shown above."""
    _, student, learned, _ = training_data
    learned.follow(student, 0)
    teachers, students = answers(learned.recorded), answers(learned.rollouts[0])
    assert not teachers & students
    for number in range(40):
        drawn = {row.numpy().tobytes() for row in learned.batch(number, 4).output}
        assert drawn <= (students if number % 4 else teachers)


def answers(pool: Examples) -> set[bytes]:
    """Every row of every answer in it."""
    return {row.numpy().tobytes() for index in range(len(pool)) for row in pool.batch([index]).output}


def test_rounds_are_sampled_once_and_the_latest_are_learned_from(
    training_data: tuple[Any, Student, TrainingData, StudentRollouts], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, student, learned, runs = training_data
    learned.follow(student, 1)
    assert list(learned.rollouts) == [0, 1]
    first = learned.rollouts[0]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a round was sampled again")

    monkeypatch.setattr(type(own.pipeline), "__call__", refuse)
    learned.follow(student, 1)
    assert learned.rollouts[0] is first
    # Another process finds them on disk.
    other = TrainingData(own.trajectories, runs, EVEN, 7, IMAGES)
    other.follow(student, 1)
    assert torch.equal(other.batch(1, 4).output, learned.batch(1, 4).output)
    monkeypatch.undo()
    learned.follow(student, ROLLOUT_ROUNDS + 1)
    assert list(learned.rollouts) == list(range(2, ROLLOUT_ROUNDS + 2))


def test_rounds_go_on_through_the_conditions(training_data: tuple[Any, Student, TrainingData, StudentRollouts]) -> None:
    _, student, learned, runs = training_data
    learned.follow(student, 1)
    noises = [
        next(iter(Trajectories(runs.folder / f"round-0000{index}").calls())).inputs["hidden_states"][:IMAGES]
        for index in (0, 1)
    ]
    # As many conditions as images a round: the second round begins anew.
    assert len(runs.wanted) == IMAGES
    assert torch.equal(noises[0], noises[1])
    assert len(noises[0].unique(dim=0)) == IMAGES


def test_the_judgement_is_the_error_of_whole_runs_from_noise_held_out(
    training_data: tuple[Any, Student, TrainingData, StudentRollouts],
) -> None:
    own, student, learned, runs = training_data
    truth = sample(own.pipeline, runs.validation_images, runs.sampling).latents
    with student.on():
        missed = sample(own.pipeline, runs.validation_images, runs.sampling).latents
    expected = float((missed - truth).square().flatten(1).mean(1).log().mean().exp())
    assert learned.evaluate(student) == expected > 0
    assert learned.evaluate(student) == expected
    seeds = {condition.seed for condition in runs.validation_images}
    assert not seeds & {condition.seed for condition in runs.wanted}


def test_pictures_are_sampled_a_batch_at_a_time(
    training_data: tuple[Any, Student, TrainingData, StudentRollouts],
) -> None:
    own, student, _, runs = training_data
    alone = TrainingData(own.trajectories, replace(runs, batch=1, folder=runs.folder / "alone"), EVEN, 7, IMAGES)
    truth = one_by_one(own, runs)
    with student.on():
        missed = one_by_one(own, runs) - truth
    assert alone.evaluate(student) == float(missed.square().flatten(1).mean(1).log().mean().exp())
    alone.follow(student, 0)
    assert len(Trajectories(runs.folder / "alone" / "round-00000").shards) == IMAGES


def one_by_one(own: Any, runs: StudentRollouts) -> Tensor:
    return torch.cat([sample(own.pipeline, [wanted], runs.sampling).latents for wanted in runs.validation_images])


def test_a_student_that_changes_nothing_is_judged_perfect(school: School) -> None:
    own, _, runs, options = school()
    layers: dict[str, QuantizedLayer] = {}
    teacher = Student(own.denoiser, layers, own.trajectories.timesteps, options, 0)
    assert TrainingData(own.trajectories, runs, EVEN, 0, IMAGES).evaluate(teacher) == 0
