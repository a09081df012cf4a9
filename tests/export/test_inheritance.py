"""Step plans while they run: which run a call belongs to, what is forecast, and that nothing leaks from one run to another."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from diffpress.compress.overlay import overlaid
from diffpress.export.apply import apply_edits_
from diffpress.export.artifact import load_pipeline
from diffpress.export.edits import Attach
from diffpress.export.folder import PipelineFolder
from diffpress.export.runtime import Inheritance, StepClock, StepPlan, Unit
from diffpress.export.runtime.runs import hold
from diffpress.export.runtime.step_plan import forecast_weights, last_of_run, rows_at

STEPS = [900.0, 750.0, 600.0, 450.0, 300.0, 150.0]
BLOCKS = tuple(f"transformer_blocks.{block}" for block in range(2))
STACK = Unit(modules=BLOCKS, adds_to=("hidden_states",), channels=(16,))
EVERY_SECOND = np.array([[step % 2 == 0] for step in range(6)])


@pytest.fixture
def transformer(tiny_class: Path) -> nn.Module:
    """Of two blocks, by time step and class."""
    model: nn.Module = load_pipeline(PipelineFolder(tiny_class, "tiny")).transformer
    return model


def planned(cells: Any = EVERY_SECOND, **settings: Any) -> StepPlan:
    return StepPlan.of([STACK], cells, **{"order": 1, **settings})


@contextmanager
def inheriting(model: nn.Module, plan: StepPlan, damping: float = 0.7) -> Iterator[Inheritance]:
    clock = StepClock(STEPS)
    part = Inheritance(plan, clock)
    part.damping.fill_(damping)
    with overlaid(model, part.wraps(model), clock):
        yield part


@torch.no_grad()
def ask(model: nn.Module, sample: Tensor, timestep: float, labels: Tensor) -> Tensor:
    answer: Tensor = model(
        sample, timestep=torch.full((len(sample),), timestep), class_labels=labels, return_dict=False
    )[0]
    return answer


def begin(seed: int, images: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 4, 8, 8, generator=generator), torch.arange(images) + seed % 7


def advance(model: nn.Module, sample: Tensor, timestep: float, labels: Tensor) -> Tensor:
    return sample - 0.1 * ask(model, sample, timestep, labels)


def generate(model: nn.Module, seed: int, steps: list[float] = STEPS) -> list[Tensor]:
    """The sample after every step."""
    sample, labels = begin(seed)
    found = []
    for timestep in steps:
        sample = advance(model, sample, timestep, labels)
        found.append(sample)
    return found


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


# Which steps, and with what.


def test_the_denoiser_itself_may_be_a_unit_and_gives_back_what_it_is_asked_for(transformer: nn.Module) -> None:
    """Order 0: the last answer once more, as a tuple or by name, and no layer is called."""
    sample, labels = begin(1)
    unit = Unit(modules=("",), adds_to=(None,), channels=(4,), gives=(True,))
    first, second = (torch.full((2,), step) for step in STEPS[:2])
    with inheriting(transformer, StepPlan.of([unit], EVERY_SECOND, order=0)), torch.no_grad():
        expected = transformer(sample, timestep=first, class_labels=labels).sample
        handle = transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("computed"))  # type: ignore[union-attr]
        found = transformer(sample * 2, timestep=second, class_labels=labels)
        handle.remove()
    assert type(found).__name__ == "Transformer2DModelOutput"
    assert torch.equal(found.sample, expected)


def test_a_plan_that_computes_everything_changes_nothing(transformer: nn.Module) -> None:
    expected = generate(transformer, 1)
    with inheriting(transformer, planned(np.ones((6, 1), dtype=bool))):
        assert_equal(generate(transformer, 1), expected)


def test_what_a_step_inherits_is_what_was_computed_and_the_entry_stays_fresh(transformer: nn.Module) -> None:
    """Order 0 by hand: the last branch of all blocks together is added to what enters them."""
    sample, labels = begin(3)
    seen: list[tuple[Tensor, Tensor]] = []
    with inheriting(transformer, planned(order=0)):
        entry = transformer.transformer_blocks[0].register_forward_pre_hook(
            lambda _block, arguments: seen.append((arguments[0], arguments[0]))
        )
        left = transformer.transformer_blocks[1].register_forward_hook(
            lambda _block, _arguments, output: seen.append((seen.pop()[0], output))
        )
        for timestep in STEPS[:2]:
            sample = advance(transformer, sample, timestep, labels)
        entry.remove(), left.remove()
    (first, first_left), (second, second_left) = seen
    assert not torch.equal(first, second)
    assert torch.equal(second_left, second + (first_left - first))


def test_forecasts_continue_lines_and_parabolas_exactly() -> None:
    places = [5.0, 3.0, 2.0]
    for order in (1, 2):
        weights = forecast_weights(6.5, places, [1.0] * order, order + 1)
        for power in range(order + 1):
            value = sum(w * place**power for w, place in zip(weights, places, strict=False))
            assert value == pytest.approx(6.5**power, rel=1e-12)
    assert forecast_weights(6.5, places, [0.0, 0.0], 3) == [1, 0, 0]
    assert forecast_weights(6.5, places[:1], [1.0, 1.0], 3) == [1, 0, 0], "nothing but the last is known"
    assert forecast_weights(7.0, places, [0.5], 2) == [1.5, -0.5]


def test_a_step_of_the_plan_stands_for_its_own_row_and_others_for_what_they_pass() -> None:
    assert [rows_at(float(step), step - 1.0 if step else None, 6) for step in range(6)] == [[step] for step in range(6)]
    assert rows_at(2.5, 0.0, 6) == [1, 2], "fewer steps: all rows that were passed"
    assert rows_at(2.5, 2.0, 6) == [2], "more steps: the nearest row"
    assert rows_at(2.75, 2.25, 6) == [3]


def test_a_run_is_over_when_no_step_as_long_can_follow() -> None:
    assert last_of_run(5.0, 4.0, 6)
    assert last_of_run(4.0, 2.0, 6)
    assert not last_of_run(3.0, 2.0, 6)
    assert not last_of_run(5.0, None, 6), "the first call of a run"


@pytest.mark.parametrize("count", [3, 6, 12])
def test_other_numbers_of_steps_inherit_about_as_often(transformer: nn.Module, count: int) -> None:
    steps = np.linspace(STEPS[0], STEPS[-1], count).tolist()
    with inheriting(transformer, planned()) as part:
        computed = []
        block = transformer.transformer_blocks[0]
        handle = block.register_forward_pre_hook(lambda *_: computed.append(part.frame.computes[0]))  # type: ignore[union-attr]
        generate(transformer, 2, steps)
        handle.remove()
    assert computed[0]
    # With fewer steps every row that is passed counts, and every second one computes; with more, two steps or three share one.
    fewest, most = {3: (3, 3), 6: (3, 3), 12: (5, 7)}[count]
    assert fewest <= sum(computed) <= most


# Runs.


def test_guidance_as_one_doubled_batch_equals_guidance_as_two_calls(transformer: nn.Module) -> None:
    def guided(answers: Callable[[Tensor, float], tuple[Tensor, Tensor]]) -> Tensor:
        sample, _ = begin(5)
        for timestep in STEPS:
            plain, wanted = answers(sample, timestep)
            sample = sample - 0.1 * (plain + 2 * (wanted - plain))
        return sample

    nothing, labels = torch.tensor([1000, 1000]), torch.tensor([3, 4])
    both = torch.cat([nothing, labels])

    def doubled(sample: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        first, second = ask(transformer, torch.cat([sample, sample]), timestep, both).chunk(2)
        return first, second

    def twice(sample: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        return ask(transformer, sample, timestep, nothing), ask(transformer, sample, timestep, labels)

    with inheriting(transformer, planned()):
        once, apart = guided(doubled), guided(twice)
    plain = guided(twice)
    # A matrix product may add up in another order for another batch; what inheriting changes is far more.
    assert (once - apart).abs().max() <= 1e-5 * once.abs().max()
    assert (once - plain).abs().max() > 1e-3 * once.abs().max()


def test_threads_give_what_one_after_the_other_gives(transformer: nn.Module) -> None:
    with inheriting(transformer, planned()):
        expected = [generate(transformer, seed) for seed in range(20)]
        meet = threading.Barrier(4)

        def wait(*_: Any) -> None:
            meet.wait(timeout=60)

        handle = transformer.register_forward_pre_hook(wait)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda seed: generate(transformer, seed), range(20)))
        handle.remove()
    for own, other in zip(found, expected, strict=True):
        assert_equal(own, other)


@pytest.mark.parametrize("labelled", [True, False], ids=["of two classes", "of nothing but noise"])
def test_two_interleaved_generations_equal_the_sequential_ones(transformer: nn.Module, labelled: bool) -> None:
    """The second lags two steps behind; without conditions that differ, samples tell them apart."""
    with inheriting(transformer, planned()):
        expected, samples, conditions = {}, {}, {}
        for seed in (1, 2):
            samples[seed], own = begin(seed)
            conditions[seed] = own if labelled else torch.zeros(2, dtype=torch.long)
            sample = samples[seed]
            for timestep in STEPS:
                sample = advance(transformer, sample, timestep, conditions[seed])
            expected[seed] = sample
        for turn in range(len(STEPS) + 2):
            for seed, step in ((1, turn), (2, turn - 2)):
                if 0 <= step < len(STEPS):
                    samples[seed] = advance(transformer, samples[seed], STEPS[step], conditions[seed])
    assert all(torch.equal(samples[seed], expected[seed]) for seed in (1, 2))


@pytest.mark.parametrize("changed", ["shape", "condition", "time"])
def test_a_run_that_is_not_continued_leaves_nothing_to_the_next(transformer: nn.Module, changed: str) -> None:
    """What another run begins with is computed, not inherited from a run that was left in the middle."""
    sample, labels = begin(1)
    other, others = begin(1, images=3) if changed == "shape" else (sample, labels + 1)
    if changed == "time":
        others = labels
    with inheriting(transformer, planned()):
        for timestep in STEPS[:4]:
            advance(transformer, sample, timestep, labels)
        # The plan inherits at this step.
        found = ask(transformer, other, STEPS[1] if changed == "time" else STEPS[5], others)
    assert torch.equal(found, ask(transformer, other, STEPS[1] if changed == "time" else STEPS[5], others))


def test_nothing_is_kept_when_a_run_is_over(transformer: nn.Module) -> None:
    with inheriting(transformer, planned()) as part:
        generate(transformer, 1)
        assert part._thread.runs.live == []
        sample, labels = begin(1)
        advance(transformer, sample, STEPS[0], labels)
        assert len(part._thread.runs.live) == 1


def test_a_copy_has_runs_of_its_own(transformer: nn.Module) -> None:
    edit = Attach(component="transformer", module="step_plan", settings=planned())
    apply_edits_(transformer, [edit], STEPS)
    expected = generate(transformer, 1)
    copied = copy.deepcopy(transformer)
    with torch.no_grad():
        copied.proj_out_2.weight.mul_(2)
    sample, labels = begin(1)
    for step, timestep in enumerate(STEPS):
        ask(copied, sample, timestep, labels)
        sample = advance(transformer, sample, timestep, labels)
        assert torch.equal(sample, expected[step])
    assert not torch.equal(ask(copied, sample, STEPS[0], labels), ask(transformer, sample, STEPS[0], labels))


# Memory and compilation.


@pytest.mark.parametrize("storage", ["computed", "bfloat16", "int8"])
def test_features_are_kept_within_half_of_their_last_bit(storage: Any) -> None:
    feature = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    held = hold(feature, storage)
    assert held.tensor().dtype == feature.dtype
    assert held.values.element_size() == {"computed": 4, "bfloat16": 2, "int8": 1}[storage]
    # bfloat16 has 8 significant bits of each number; int8 has 127 steps up to the largest; float32 rounds once more.
    half = {"computed": 0 * feature, "bfloat16": feature.abs() * 2.0**-8, "int8": feature.abs().amax() / 254}[storage]
    assert ((held.tensor() - feature).abs() <= half * (1 + 1e-5)).all()


@pytest.mark.long
def test_compiling_makes_no_more_graphs_than_there_are_patterns(transformer: nn.Module) -> None:
    graphs: list[GraphModule] = []

    def backend(module: GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    units = [Unit(modules=(block,), adds_to=("hidden_states",), channels=(16,)) for block in BLOCKS]
    cells = np.array([[1, 1], [0, 0], [1, 0], [0, 0], [1, 1], [1, 0]], dtype=bool)
    plan = StepPlan.of(units, cells, order=1, corrected=True)
    edit = Attach(component="transformer", module="step_plan", settings=plan)
    apply_edits_(transformer, [edit], STEPS)
    transformer.step_plan.damping.fill_(0.5)
    expected = [generate(transformer, seed) for seed in range(3)]
    torch._dynamo.reset()
    transformer.compile(backend=backend)
    found = [generate(transformer, seed) for seed in range(3)]
    # What tells the step is a small graph of its own.
    with_layers = [graph for graph in graphs if any("linear" in str(node.target) for node in graph.graph.nodes)]
    assert len(plan.patterns) == 3
    assert len(with_layers) <= len(plan.patterns)
    for own, other in zip(found, expected, strict=True):
        assert_equal(own, other)
