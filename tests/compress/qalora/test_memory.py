"""What learning is said to take, beside what it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffpress.calibration.examples import Examples
from diffpress.calibration.sampling import Call, answer
from diffpress.compress.options import Order, Qalora
from diffpress.compress.qalora import memory
from diffpress.compress.qalora.blocks import find_blocks
from diffpress.compress.qalora.memory import FLOAT, Needs, learning_needs
from diffpress.compress.qalora.student import Student
from diffpress.compress.result import QuantizationResult

OPTIONS = {"method": "qalora", "weights": 4, "activations": 4, "batch": 4, "rank": 4}
SOURCES = ("tiny_text", "tiny_class", "tiny_pixels")


def needs(recorded: Callable[[str], Any], source: str, **chosen: Any) -> dict[Order, Needs]:
    own = recorded(source)
    examples = Examples(own.trajectories, own.trajectories.shards)
    batch = examples.batch([0])
    call = Call(batch.inputs, batch.output, 0)
    return learning_needs(own.denoiser, call, Qalora.model_validate(OPTIONS | chosen))


@contextmanager
def saved() -> Iterator[dict[int, int]]:
    """Bytes of every storage that is kept for the way back."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.fixture
def student(recorded: Callable[[str], Any], quantized: Callable[..., QuantizationResult]) -> Callable[[str], Student]:
    """A function: the student of the pipeline of that name."""

    def make(source: str) -> Student:
        own, found = recorded(source), quantized(source, weights=4, activations=4)
        layers = {name: own.denoiser.get_submodule(name) for name in found.layers}
        start = {name: found.layers[name] for name, layer in layers.items() if not isinstance(layer, nn.Embedding)}
        return Student(own.denoiser, start, own.trajectories.timesteps, Qalora.model_validate(OPTIONS), 0)

    return make


@pytest.mark.parametrize("source", [pytest.param("tiny_text", marks=pytest.mark.long), "tiny_class", "tiny_pixels"])
def test_the_graph_is_what_autograd_keeps(
    source: str, recorded: Callable[[str], Any], student: Callable[[str], Student]
) -> None:
    """Never less, and at most half as much again: what lies between layers is counted by what they are fed with."""
    own, learner = recorded(source), student(source)
    examples = Examples(own.trajectories, own.trajectories.shards)
    batch = examples.batch(range(4))
    with learner.on(), saved() as kept:
        # Held on to, so that no storage takes the place of another.
        output = answer(own.denoiser, batch.inputs, batch.output.dtype)
    assert output.requires_grad
    total = sum(kept.values())
    assert total <= needs(recorded, source)["whole"].graph <= 1.5 * total


@pytest.mark.parametrize("source", SOURCES)
def test_the_state_is_counted(source: str, recorded: Callable[[str], Any], student: Callable[[str], Student]) -> None:
    """Itself, gradient, average and two moments of every number, but for those of steps and groups, which are few."""
    own, parameters = recorded(source), student(source).parameters()
    numbers = {
        name: len(value) if name.endswith("log_weight_scale") else value.numel()
        for name, value in parameters.items()
        if not name.endswith(("log_activation_scale", "zero_point"))
    }
    predicted = needs(recorded, source, gptq=False)
    assert predicted["whole"].state == 5 * FLOAT * sum(numbers.values())
    largest = max(
        sum(count for name, count in numbers.items() if name.startswith(f"{block}."))
        for block in find_blocks(own.denoiser)
    )
    # Of one block, and where it started.
    assert predicted["blocks"].state == FLOAT * sum(numbers.values()) + 5 * FLOAT * largest


def test_what_saves_memory_is_predicted_to(recorded: Callable[[str], Any]) -> None:
    plain = needs(recorded, "tiny_text")
    spared = needs(recorded, "tiny_text", checkpointing=True)
    parts = needs(recorded, "tiny_text", accumulate=4)
    small = needs(recorded, "tiny_text", optimizer="adam8bit")
    assert spared["whole"].graph < plain["whole"].graph
    assert parts["whole"].graph < plain["whole"].graph
    assert small["whole"].state < plain["whole"].state
    for order, own in plain.items():
        assert min(own) > 0, order
    for both in (plain, spared, parts, small):
        assert both["blocks"].state < both["whole"].state
        assert both["blocks"].graph < both["whole"].graph


def test_without_blocks_there_is_one_order(monkeypatch: pytest.MonkeyPatch, recorded: Callable[[str], Any]) -> None:
    monkeypatch.setattr(memory, "find_blocks", lambda _model: [])
    assert set(needs(recorded, "tiny_text")) == {"whole"}
