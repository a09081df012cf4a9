"""Learning: it gets better, it goes on where it was killed, it stops when it should, and it leaves the teacher alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diffpress.calibration.guidance import find_guidance
from diffpress.calibration.sampling import sample
from diffpress.compress.importance import StepImportance
from diffpress.compress.options import Qalora
from diffpress.compress.qalora import StudentRollouts, learn_layers_, train, training_data
from diffpress.compress.qalora.student import Student
from diffpress.compress.qalora.train import Report, learn
from diffpress.compress.qalora.training_data import TrainingData
from diffpress.compress.quantized_layer import fake_quantized
from diffpress.compress.result import QuantizationResult
from diffpress.export.errors import LearningError
from diffpress.export.runtime import StepClock

EVEN = StepImportance(torch.full((3,), 1 / 3), torch.ones(3))
School = Callable[..., tuple[Any, QuantizationResult, StudentRollouts, Qalora]]
FAST: dict[str, Any] = {"lora_rate": 0.05, "scale_rate": 0.01}
"""Rates at which thirty iterations show."""
HALF: dict[str, Any] = {"keep": ("transformer_blocks.1.*",)}
"""Learning on one block of two takes half the time."""


class KilledError(Exception):
    """Stands for a process that ends."""


def run(school: School, report: Report | None = None, source: str = "tiny_class", **chosen: Any) -> QuantizationResult:
    """Learn, and give what was found."""
    own, found, runs, options = school(source, **chosen)
    learn_layers_(found, own.denoiser, own.trajectories, runs, options, 0, report)
    return found


def student_of(own: Any, found: QuantizationResult, options: Qalora) -> Student:
    start = {
        name: layer
        for name, layer in found.layers.items()
        if not isinstance(own.denoiser.get_submodule(name), nn.Embedding)
    }
    return Student(own.denoiser, start, own.trajectories.timesteps, options, 0)


def evaluated(own: Any, runs: StudentRollouts, quantized: AbstractContextManager[Any]) -> float:
    """Error of the latents of whole runs within `quantized`, measured apart from learning."""
    truth = sample(own.pipeline, runs.validation_images, runs.sampling).latents
    with quantized:
        missed = sample(own.pipeline, runs.validation_images, runs.sampling).latents - truth
    return float(missed.square().flatten(1).mean(1).log().mean().exp())


@pytest.mark.parametrize("rollout_share", [pytest.param(0.0, marks=pytest.mark.long), 0.5])
def test_learning_lowers_the_error_of_whole_runs_held_out(school: School, rollout_share: float) -> None:
    chosen = {"iterations": 30, "batch": 8, "patience": 30, "rollout_share": rollout_share, **FAST}
    own, found, runs, options = school(**chosen)
    # Embeddings are rounded too, but no part of what is learned.
    learned = {name: own.denoiser.get_submodule(name) for name in found.layers}
    found.layers = {name: found.layers[name] for name, layer in learned.items() if not isinstance(layer, nn.Embedding)}
    # What is learned begins as the student that holds it: scales are kept as logarithms, which rounds them once more.
    before = evaluated(own, runs, student_of(own, found, options).on())
    learn_layers_(found, own.denoiser, own.trajectories, runs, options, 0)
    after = evaluated(own, runs, fake_quantized(own.denoiser, found.layers, StepClock(own.trajectories.timesteps)))
    history = [row["evaluation"] for row in found.history]
    assert history[0] == before
    assert after == min(history) < before
    assert [row["iteration"] for row in found.history] == list(range(0, 31, 2))
    assert all(row["loss"] > 0 for row in found.history)
    assert (runs.folder / "round-00000").exists() == (rollout_share > 0)


def test_everything_is_learned_but_embeddings(school: School, quantized: Callable[..., QuantizationResult]) -> None:
    """At a rate by which a few iterations move every scale further than to the next number of float16."""
    start = quantized("tiny_class", weights=3, activations=4)
    found = run(school, iterations=4, **{**FAST, "scale_rate": 0.1})
    assert found.layers.keys() == start.layers.keys()
    moved = {
        name for name, layer in found.layers.items() if not torch.equal(layer.weight(), start.layers[name].weight())
    }
    words = {name for name in found.layers if name.endswith("embedding_table")}
    assert moved == set(found.layers) - words
    for name in words:
        assert found.layers[name] is start.layers[name]
    assert all(layer.format == start.layers[name].format for name, layer in found.layers.items())


def test_guided_learning_runs_on_a_pipeline_with_prompts(school: School) -> None:
    keep = ("down_blocks.*", "up_blocks.*")
    own, found, runs, options = school("tiny_text", keep=keep, iterations=2, **FAST)
    assert find_guidance(own.trajectories) is not None
    learn_layers_(found, own.denoiser, own.trajectories, runs, options, 0)
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in found.history)
    assert [row["iteration"] for row in found.history] == [0, 1, 2]


def test_the_teacher_is_left_as_it_was_and_never_copied(school: School, recorded: Callable[[str], Any]) -> None:
    denoiser = recorded("tiny_class").denoiser
    frozen = "transformer_blocks.0.attn1.to_q.weight"
    denoiser.get_parameter(frozen).requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in denoiser.named_parameters()}
    values = {name: value.clone() for name, value in denoiser.state_dict().items()}
    places = {name: value.data_ptr() for name, value in denoiser.state_dict().items()}
    attributes = {name: sorted(vars(module)) for name, module in denoiser.named_modules()}

    def look(*_: Any) -> None:
        assert {name: value.data_ptr() for name, value in denoiser.state_dict().items()} == places
        assert all(parameter.grad is None for parameter in denoiser.parameters())

    try:
        run(school, look, iterations=2, **FAST)
        look()
        assert flags == {name: parameter.requires_grad for name, parameter in denoiser.named_parameters()}
        assert not flags[frozen]
        assert all(torch.equal(value, values[name]) for name, value in denoiser.state_dict().items())
        assert attributes == {name: sorted(vars(module)) for name, module in denoiser.named_modules()}
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in denoiser.modules())
    finally:
        denoiser.get_parameter(frozen).requires_grad_(True)


def test_the_teacher_is_left_as_it_was_after_a_failure(school: School, recorded: Callable[[str], Any]) -> None:
    denoiser = recorded("tiny_class").denoiser

    def kill(*_: Any) -> NoReturn:
        raise KilledError

    with pytest.raises(KilledError):
        run(school, kill, **HALF)
    assert all(parameter.requires_grad for parameter in denoiser.parameters())
    assert not any("forward" in vars(module) for module in denoiser.modules())
    assert not any(module._forward_pre_hooks for module in denoiser.modules())


def files(folder: Path) -> dict[str, bytes]:
    """What learning left behind, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_a_killed_run_goes_on_as_if_it_had_not_been(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after the student's own runs begin, right after a checkpoint and between two: everything learned, averaged
    and in the optimizer, and every own run, has the same bytes as without. Rounds that are learned from no more are gone."""
    monkeypatch.setattr(train, "EVALUATIONS", 4)
    monkeypatch.setattr(training_data, "ROLLOUT_ROUNDS", 1)
    chosen = {"iterations": 12, "batch": 2, "rollout_share": 0.6, **HALF, **FAST}
    whole, (*_, runs, _) = run(school, folder="whole", **chosen), school(folder="whole")
    assert [folder.name for folder in runs.folder.glob("round-*")] == ["round-00002"]
    for killed_after in (2, 6, 8, 11):

        def kill(done: int, total: int, loss: float, last: int = killed_after) -> None:
            assert total == 12
            if done == last:
                raise KilledError

        folder = f"killed-{killed_after}"
        with pytest.raises(KilledError):
            run(school, kill, folder=folder, **chosen)
        told: list[int] = []
        again = run(school, lambda done, *_, told=told: told.append(done), folder=folder, **chosen)  # type: ignore[misc]
        # Checkpoints are three iterations apart.
        assert told == list(range(killed_after // 3 * 3 + 1, 13))
        assert again.history == whole.history
        assert files(runs.folder.with_name(folder)) == files(runs.folder)
        for name, layer in whole.layers.items():
            other = again.layers[name]
            assert torch.equal(layer.codes, other.codes)
            assert torch.equal(layer.weight_scale, other.weight_scale)
            assert layer.bias is None or torch.equal(layer.bias, other.bias)  # type: ignore[arg-type]


def test_a_finished_run_is_not_run_again(school: School) -> None:
    first = run(school, **HALF, **FAST)
    told: list[int] = []
    second = run(school, lambda done, *_: told.append(done), **HALF, **FAST)
    assert told == []
    assert all(torch.equal(layer.codes, second.layers[name].codes) for name, layer in first.layers.items())
    assert first.history == second.history


@pytest.mark.parametrize("damage", ["emptied", "truncated"])
def test_a_damaged_checkpoint_means_beginning_anew(school: School, damage: str) -> None:
    first = run(school, **HALF, **FAST)
    *_, runs, _ = school()
    file = runs.folder / "learned.safetensors"
    sound = file.read_bytes()
    file.write_bytes(b"" if damage == "emptied" else sound[:-7])
    told: list[int] = []
    second = run(school, lambda done, *_: told.append(done), **HALF, **FAST)
    assert told == [1, 2, 3, 4]
    assert file.read_bytes() == sound
    assert first.history == second.history


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer_blocks.0.attn1.to_k", "b"),
        ("transformer_blocks.0.ff.net.2", "log_weight_scale"),
        ("proj_out_2", "bias"),
    ],
)
def test_a_loss_that_is_no_number_stops_learning_and_names_the_layer(school: School, name: str, kind: str) -> None:
    own, found, runs, options = school(iterations=24, rollout_share=0.0, **HALF, **FAST)
    student = student_of(own, found, options)
    training_data = TrainingData(own.trajectories, runs, EVEN.sampling_probabilities, 0, 8)
    sound: list[dict[str, bytes]] = []

    def poison(done: int, total: int, loss: float) -> None:
        if done == 5:
            sound.append(files(runs.folder))
            student.parameters()[f"{name}.{kind}"].data.fill_(torch.inf if kind == "bias" else torch.nan)

    with pytest.raises(LearningError) as caught:
        learn(student, training_data, EVEN, None, options, runs.folder, poison)
    assert f"layer {name} is the first whose output is not finite" in str(caught.value)
    assert "after 5 iterations" in str(caught.value)
    # The checkpoint before that is kept, and whoever continues can.
    assert files(runs.folder) == sound[0]
    assert all(value.isfinite().all() for value in load_file(runs.folder / "learned.safetensors").values())
    told: list[int] = []

    def kill(done: int, total: int, loss: float) -> None:
        told.append(done)
        if done == 6:
            raise KilledError

    with pytest.raises(KilledError):
        learn(student_of(own, found, options), training_data, EVEN, None, options, runs.folder, kill)
    assert told == [5, 6]


def test_where_no_judgement_is_a_number_the_start_is_kept(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    own, found, runs, options = school(**HALF, **FAST)
    start = student_of(own, found, options).finish()
    monkeypatch.setattr(TrainingData, "evaluate", lambda *_: float("nan"))
    learn_layers_(found, own.denoiser, own.trajectories, runs, options, 0)
    assert all(torch.equal(layer.codes, found.layers[name].codes) for name, layer in start.items())


@pytest.mark.parametrize(
    ("batch", "accumulate", "sizes"), [(6, 1, [6]), (6, 2, [3, 3]), (7, 3, [3, 2, 2]), (2, 3, [1, 1])]
)
def test_a_batch_may_be_computed_in_parts(
    school: School, monkeypatch: pytest.MonkeyPatch, batch: int, accumulate: int, sizes: list[int]
) -> None:
    drawn: list[tuple[int, int]] = []
    original = TrainingData.batch

    def spy(self: TrainingData, number: int, size: int) -> Any:
        drawn.append((number, size))
        return original(self, number, size)

    monkeypatch.setattr(TrainingData, "batch", spy)
    found = run(school, iterations=3, batch=batch, accumulate=accumulate, rollout_share=0.0, **HALF, **FAST)
    # What is evaluated first may be drawn before.
    learned = drawn[-3 * len(sizes) :]
    assert [size for _, size in learned] == sizes * 3
    # No part is drawn twice.
    assert len({number for number, _ in learned}) == len(learned)
    assert all(row["loss"] > 0 for row in found.history)


def test_parts_add_up_to_the_batch(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same images in every part, parts change nothing but the order of sums."""
    original = TrainingData.batch
    monkeypatch.setattr(TrainingData, "batch", lambda self, number, size: original(self, 0, 2))
    losses: list[list[float]] = [[], []]
    for own, accumulate in zip(losses, (1, 2), strict=True):
        run(
            school,
            lambda done, total, loss, own=own: own.append(loss),  # type: ignore[misc]
            folder=str(accumulate),
            iterations=1,
            batch=2 * accumulate,
            accumulate=accumulate,
            **HALF,
        )
    assert losses[0][0] == pytest.approx(losses[1][0], rel=4 * torch.finfo(torch.float32).eps)


def test_learning_stops_when_it_gets_no_better(school: School) -> None:
    """Rates that move nothing by as much as a rounding: every evaluation is that of the start."""
    told: list[int] = []
    options = {"iterations": 48, "patience": 3, "lora_rate": 1e-30, "scale_rate": 1e-30, "rollout_share": 0.0, **HALF}
    found = run(school, lambda done, *_: told.append(done), batch=2, **options)
    # Judgements are four iterations apart.
    assert told[-1] == 12
    assert [row["iteration"] for row in found.history] == [0, 4, 8, 12]
    assert len({row["evaluation"] for row in found.history}) == 1


def test_where_nothing_gets_better_the_start_is_kept(
    school: School, quantized: Callable[..., QuantizationResult]
) -> None:
    own, found, runs, options = school(iterations=12, batch=2, lora_rate=1e3, scale_rate=3.0, rollout_share=0.0, **HALF)
    start = student_of(own, found, options).finish()
    learn_layers_(found, own.denoiser, own.trajectories, runs, options, 0)
    history = [row["evaluation"] for row in found.history]
    assert min(history) == history[0]
    assert all(torch.equal(layer.codes, found.layers[name].codes) for name, layer in start.items())


def test_a_checkpoint_says_where_it_is(school: School) -> None:
    run(school, iterations=4, **HALF, **FAST)
    *_, runs, _ = school()
    file = runs.folder / "learned.safetensors"
    with safe_open(file, framework="pt") as opened:
        progress = json.loads(opened.metadata()["progress"])
        names = set(opened.keys())
    assert progress["iteration"] == 4
    assert progress["best"] == min(row["evaluation"] for row in progress["history"])
    name = "transformer_blocks.0.attn1.to_q.b"
    assert {f"{kind}.{name}" for kind in ("now", "average", "optimizer.exp_avg", "optimizer.step")} <= names
    assert load_file(runs.folder / "best.safetensors").keys() == {key[4:] for key in names if key.startswith("now.")}
    assert not list(runs.folder.glob("*.partial"))


def test_other_seeds_learn_otherwise(school: School) -> None:
    results: list[Tensor] = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        own, found, runs, options = school(folder=folder, iterations=2, **HALF, **FAST)
        learn_layers_(found, own.denoiser, own.trajectories, runs, options, seed)
        results.append(load_file(runs.folder / "learned.safetensors")["now.proj_out_2.b"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_folder_is_made(school: School, tmp_path: Path) -> None:
    own, found, runs, options = school(iterations=1, **HALF)
    deep = replace(runs, folder=tmp_path / "a" / "b")
    learn_layers_(found, own.denoiser, own.trajectories, deep, options, 0)
    assert (deep.folder / "learned.safetensors").is_file()
