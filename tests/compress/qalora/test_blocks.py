"""One block after the other: what blocks are, what learning one leaves alone, and that it goes on where it was killed."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from diffpress.calibration.sampling import answer
from diffpress.compress.importance import StepImportance
from diffpress.compress.options import Qalora
from diffpress.compress.qalora import StudentRollouts, learn_layers_
from diffpress.compress.qalora.blocks import STEPS, _Blocks, block_steps, find_blocks, learn_blocks, tensors
from diffpress.compress.qalora.student import Student
from diffpress.compress.qalora.train import Report
from diffpress.compress.qalora.training_data import TrainingData
from diffpress.compress.quantized_layer import QuantizedLayer, fake_quantized
from diffpress.compress.result import QuantizationResult
from diffpress.export.errors import LearningError
from diffpress.export.runtime import StepClock

EVEN = StepImportance(torch.full((3,), 1 / 3), torch.ones(3))
School = Callable[..., tuple[Any, QuantizationResult, StudentRollouts, Qalora]]
FAST: dict[str, Any] = {"lora_rate": 0.02, "scale_rate": 0.005, "order": "blocks"}
"""Rates at which a few iterations show."""
TAUGHT: dict[str, Any] = {"weights": 3, "activations": 8, "gptq": False, "iterations": 45, "batch": 4}
"""Where weights are rounded one by one, there is something to learn about each block."""
FIRST, SECOND = "transformer_blocks.0.", "transformer_blocks.1."


class KilledError(Exception):
    """Stands for a process that ends."""


def learned(
    school: School, report: Report | None = None, source: str = "tiny_class", **chosen: Any
) -> QuantizationResult:
    own, found, runs, options = school(source, **FAST, **chosen)
    learn_layers_(found, own.denoiser, own.trajectories, runs, options, 0, report)
    return found


def classroom(
    school: School, source: str = "tiny_class", **chosen: Any
) -> tuple[Student, TrainingData, StudentRollouts, Qalora]:
    own, found, runs, options = school(source, **FAST, **chosen)
    own.denoiser.requires_grad_(False)
    layers = {name: own.denoiser.get_submodule(name) for name in found.layers}
    start = {name: found.layers[name] for name, layer in layers.items() if not isinstance(layer, nn.Embedding)}
    student = Student(own.denoiser, start, own.trajectories.timesteps, options, 0)
    return student, TrainingData(own.trajectories, runs, EVEN.sampling_probabilities, 0, 8), runs, options


class Finished:
    """Layers as they are saved, evaluated as a student is."""

    def __init__(self, own: Any, layers: dict[str, QuantizedLayer]) -> None:
        self.off = nullcontext
        self.on = partial(fake_quantized, own.denoiser, layers, StepClock(own.trajectories.timesteps))


@pytest.fixture(autouse=True)
def thawed(recorded: Callable[[str], Any]) -> Any:
    """Other tests find the teachers as they were."""
    yield
    for source in ("tiny_text", "tiny_class", "tiny_pixels"):
        recorded(source).denoiser.requires_grad_(True)


@pytest.mark.parametrize("source", ["tiny_text", "tiny_class", "tiny_pixels"])
def test_blocks_part_the_denoiser(source: str, recorded: Callable[[str], Any]) -> None:
    denoiser = recorded(source).denoiser
    names = find_blocks(denoiser)
    layers = [name for name, layer in denoiser.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    holders = [[block for block in names if layer.startswith(f"{block}.")] for layer in layers]
    assert max(map(len, holders)) == 1
    outside = [layer for layer, own in zip(layers, holders, strict=True) if not own]
    assert all(re.match(r"conv_|time_embedding|pos_embed|proj_out|.*samplers\.", layer) for layer in outside)
    assert not any(part in name for name in names for part in (".attn", ".ff"))


def test_blocks_of_models_of_full_size() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        flux = FluxTransformer2DModel(num_layers=2, num_single_layers=3)
    # 16 transformers with their projections, 22 residual blocks.
    assert len(find_blocks(unet)) == 38
    assert {"mid_block.attentions.0", "mid_block.resnets.0", "up_blocks.3.resnets.2"} <= set(find_blocks(unet))
    expected = [f"transformer_blocks.{index}" for index in range(2)]
    assert find_blocks(flux) == expected + [f"single_transformer_blocks.{index}" for index in range(3)]


def test_a_model_without_repeated_modules_has_no_blocks() -> None:
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
    assert find_blocks(nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])) == []


@pytest.mark.parametrize("source", [pytest.param("tiny_text", marks=pytest.mark.long), "tiny_class"])
def test_each_block_gets_nearer_to_the_teachers(school: School, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own error over everything recorded, before and after; every evaluation is better, so that all is kept."""
    student, training_data, runs, options = classroom(school, source, **TAUGHT)
    falling = iter(range(1000, 0, -1))
    monkeypatch.setattr(TrainingData, "evaluate", lambda *_: next(falling))
    learning = _Blocks(student, training_data, EVEN, options, runs.folder)
    everything = training_data.recorded.batch(range(len(training_data.recorded)))
    learn_one, errors = _Blocks._learn, {}

    def error(name: str) -> float:
        with student.on(), torch.no_grad():
            return float(learning._loss(name, everything))

    def watched(self: _Blocks, name: str, *arguments: Any) -> None:
        before = error(name)
        learn_one(self, name, *arguments)
        errors[name] = (before, error(name))

    monkeypatch.setattr(_Blocks, "_learn", watched)
    learn_blocks(student, training_data, EVEN, options, runs.folder)
    assert len(errors) == len(find_blocks(student.denoiser))
    assert all(after < before for before, after in errors.values())


def test_learning_a_block_moves_no_other(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    """No block is evaluated to be better, so that each is put back before the next."""
    student, training_data, runs, options = classroom(school, iterations=2, batch=4)
    monkeypatch.setattr(training_data, "evaluate", lambda *_: 1.0)
    values = {name: value.detach().clone() for name, value in student.parameters().items()}
    steps = block_steps(options.iterations, 2)
    seen: list[int] = []

    def look(done: int, total: int, loss: float) -> None:
        seen.append(done)
        assert (total, loss > 0) == (2 * steps, True)
        moved = {name for name, value in student.parameters().items() if not torch.equal(value, values[name])}
        assert moved
        assert all(name.startswith(FIRST if done <= steps else SECOND) for name in moved)
        graded = {name for name, value in student.parameters().items() if value.grad is not None}
        assert graded == set()

    learn_blocks(student, training_data, EVEN, options, runs.folder, look)
    assert seen == list(range(1, 2 * steps + 1))
    assert all(torch.equal(value, values[name]) for name, value in student.parameters().items())


def test_the_second_block_is_fed_by_the_student_and_follows_the_teacher(school: School) -> None:
    """The loss by hand: both blocks in the formats of the student, the second fed with what the first rounded."""
    student, training_data, runs, options = classroom(school, weights=2)
    learning = _Blocks(student, training_data, EVEN, options, runs.folder)
    batch = training_data.batch(0, 4)
    answers: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    block = student.denoiser.get_submodule(SECOND[:-1])
    for who, on in (("student", student.on), ("teacher", nullcontext)):
        handle = block.register_forward_hook(lambda _m, _x, output, who=who: answers[who].append(output))  # type: ignore[misc]
        with on(), torch.no_grad():
            answer(student.denoiser, batch.inputs, batch.output.dtype)
        handle.remove()
    with student.on():
        loss = learning._loss(SECOND[:-1], batch)
    # The same calls in the same order: bit for bit, but for the mean, which weights of one leave alone.
    expected = (answers["student"][0] - answers["teacher"][0]).square().mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=4 * torch.finfo(torch.float32).eps)
    loss.backward()
    graded = {name for name, value in student.parameters().items() if value.grad is not None and value.grad.any()}
    assert graded
    assert all(name.startswith(SECOND) for name in graded)


@pytest.mark.parametrize(("block", "called"), [(FIRST, [2, 0, 0]), (SECOND, [2, 2, 0])])
def test_nothing_behind_the_block_is_called(school: School, block: str, called: list[int]) -> None:
    """By the teacher or by the student, which both call what stands before it."""
    student, training_data, runs, options = classroom(school)
    counts = dict.fromkeys((FIRST, SECOND, "proj_out_1."), 0)

    def count(name: str) -> None:
        counts[name] += 1

    # Their first layers tell of what was computed in them.
    layers = {FIRST: f"{FIRST}attn1.to_q", SECOND: f"{SECOND}attn1.to_q", "proj_out_1.": "proj_out_1"}
    handles = [
        student.denoiser.get_submodule(layer).register_forward_hook(lambda *_, name=name: count(name))  # type: ignore[misc]
        for name, layer in layers.items()
    ]
    try:
        with student.on():
            _Blocks(student, training_data, EVEN, options, runs.folder)._loss(block[:-1], training_data.batch(0, 4))
    finally:
        for handle in handles:
            handle.remove()
    assert list(counts.values()) == called


def test_what_is_kept_is_never_worse_by_what_is_held_out(school: School) -> None:
    found = learned(school, iterations=16, batch=8)
    history = [row["evaluation"] for row in found.history]
    steps = block_steps(16, 2)
    assert [row["iteration"] for row in found.history] == [0, steps, 2 * steps]
    own, _, runs, _ = school(folder="again", **FAST)
    layers = {name: layer for name, layer in found.layers.items() if not name.endswith("embedding_table")}
    kept = Finished(own, layers)
    assert TrainingData(own.trajectories, runs, EVEN.sampling_probabilities, 0, 8).evaluate(kept) == min(history)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_killed_run_goes_on_at_the_block_it_was_in(school: School) -> None:
    chosen = {"iterations": 4, "batch": 2}
    whole, (*_, runs, _) = learned(school, folder="whole", **chosen), school(folder="whole")
    steps = block_steps(4, 2)
    for killed_after in (steps - 1, steps, 2 * steps - 1):

        def kill(done: int, total: int, loss: float, last: int = killed_after) -> None:
            if done == last:
                raise KilledError

        folder = f"killed-{killed_after}"
        with pytest.raises(KilledError):
            learned(school, kill, folder=folder, **chosen)
        told: list[int] = []
        again = learned(school, lambda done, *_, told=told: told.append(done), folder=folder, **chosen)  # type: ignore[misc]
        # The last report of a block comes before it is evaluated and written.
        begun = steps if killed_after > steps else 0
        assert told == list(range(begun + 1, 2 * steps + 1))
        assert again.history == whole.history
        assert files(runs.folder.with_name(folder)) == files(runs.folder)
        assert all(torch.equal(layer.codes, again.layers[name].codes) for name, layer in whole.layers.items())
    told = []
    learned(school, lambda done, *_: told.append(done), folder="whole", **chosen)
    assert told == []


def test_a_damaged_block_is_learned_again(school: School) -> None:
    chosen = {"iterations": 4, "batch": 2}
    first = learned(school, **chosen)
    *_, runs, _ = school()
    sound = files(runs.folder)
    damaged = runs.folder / "block-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    told: list[int] = []
    assert learned(school, lambda done, *_: told.append(done), **chosen).history == first.history
    assert told == list(range(1, block_steps(4, 2) + 1))
    assert files(runs.folder) == sound


def test_a_loss_that_is_no_number_names_the_layer(school: School) -> None:
    student, training_data, runs, options = classroom(school, iterations=4, batch=2)

    def poison(done: int, total: int, loss: float) -> None:
        if done == block_steps(4, 2) + 1:
            student.parameters()[f"{SECOND}ff.net.2.b"].data.fill_(torch.nan)

    with pytest.raises(LearningError, match=r"layer transformer_blocks.1.ff.net.2 is the first whose output"):
        learn_blocks(student, training_data, EVEN, options, runs.folder, poison)
    # The block before is kept.
    assert files(runs.folder).keys() == {"block-00000.safetensors"}


def test_blocks_with_nothing_to_learn_are_passed_over(school: School) -> None:
    found = learned(school, keep=("transformer_blocks.0.*",), iterations=2, batch=2)
    assert [row["iteration"] for row in found.history] == [0, 2 * STEPS]


def test_tensors_of_any_answer() -> None:
    a, b = torch.zeros(2), torch.ones(3)
    assert tensors(a) == [a]
    found = tensors((a, None, {"sample": (b, torch.tensor(1))}))
    assert [id(tensor) for tensor in found] == [id(a), id(b)]
