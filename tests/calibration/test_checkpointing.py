"""Every call of the denoiser made again on the way back: the gradient of plain back-propagation, in the memory of one call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import diffpress
from diffpress.calibration.conditions import Condition
from diffpress.calibration.gradients import sample_with_gradients
from diffpress.calibration.sampling import Sampling, denoiser_of, sample, watch
from diffpress.compress.overlay import checkpointed, frozen, overlaid
from diffpress.export.errors import UserError
from diffpress.export.runtime import Forward, Inheritance, StepClock, StepPlan, Unit, Wrap

FOUR = Sampling(4, 3.0)
SCHEDULERS = [
    DDIMScheduler,
    EulerDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerAncestralDiscreteScheduler,
]
CLOSE = 1e-10
"""Relative error of a gradient in float64, in the norm."""
Two = Callable[[str], list[Condition]]
Gradients = list[Tensor | None]


class Run:
    """Runs of a pipeline whose noise, within and without, is always the same."""

    def __init__(self, pipeline: Any, wanted: list[Condition], learned: list[nn.Parameter] | None = None) -> None:
        self.pipeline, self.wanted = pipeline, wanted
        self.learned = learned or list(denoiser_of(pipeline).parameters())

    def latents(self, *contexts: AbstractContextManager[None], steps: Sampling = FOUR) -> Tensor:
        torch.manual_seed(7)
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return sample_with_gradients(self.pipeline, self.wanted, steps)

    def gradients(self, latents: Tensor) -> Gradients:
        # Wherever the generator is now, it is not where it was at any call.
        weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9)).to(latents)
        torch.manual_seed(8)
        return list(torch.autograd.grad((latents * weights).square().mean(), self.learned, allow_unused=True))


def assert_close(found: Gradients, expected: Gradients) -> None:
    assert [value is None for value in found] == [value is None for value in expected]
    pairs = [(own, other) for own, other in zip(found, expected, strict=True) if own is not None and other is not None]
    assert any(other.any() for _, other in pairs)
    assert all((own - other).norm() <= CLOSE * other.norm() for own, other in pairs)


def compare(run: Run, also: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
    """All contexts are over when gradients are asked for."""
    plain = run.latents()
    expected = run.gradients(plain)
    latents = run.latents(diffpress.checkpoint_steps(run.pipeline), also())
    assert torch.equal(latents, plain)
    assert_close(run.gradients(latents), expected)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_gradients_are_those_of_full_back_propagation(scheduler: Any, double: Callable[..., Any], two_of: Two) -> None:
    """With both guidance branches in one batch; the ancestral scheduler draws from generators."""
    compare(Run(double("tiny_text", scheduler()), two_of("tiny_text")))


@pytest.mark.parametrize("source", ["tiny_class", "tiny_pixels"])
def test_other_pipelines_have_them_as_well(source: str, double: Callable[..., Any], two_of: Two) -> None:
    compare(Run(double(source), two_of(source)))


@pytest.mark.parametrize("by_name", [False, True], ids=["tuple", "by name"])
def test_guidance_may_take_two_calls(by_name: bool, two_calls: Any, two_of: Two) -> None:
    two_calls.unet.by_name = by_name
    compare(Run(two_calls, two_of("tiny_pixels")))


@pytest.mark.parametrize("source", ["tiny_text", "tiny_class"])
def test_noise_inside_the_denoiser_is_drawn_again(source: str, double: Callable[..., Any], two_of: Two) -> None:
    """Dropout, and in one of them labels that are left out at random."""
    pipeline = double(source)
    for module in denoiser_of(pipeline).train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    run = Run(pipeline, two_of(source))
    compare(run)
    first = run.latents()
    denoiser_of(pipeline).eval()
    assert not torch.equal(run.latents(), first)


def test_the_callers_generator_goes_on_as_if_nothing_had_been_drawn_again(
    double: Callable[..., Any], two_of: Two
) -> None:
    pipeline = double("tiny_class")
    pipeline.transformer.train()
    run = Run(pipeline, two_of("tiny_class"))
    latents = run.latents(diffpress.checkpoint_steps(pipeline))
    before = torch.get_rng_state()
    latents.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


class Scales:
    """An overlay: some layers answer times an entry, a step, of a table that learns."""

    def __init__(self, pipeline: Any) -> None:
        self.denoiser = denoiser_of(pipeline)
        pipeline.scheduler.set_timesteps(4)
        self.clock = StepClock(pipeline.scheduler.timesteps.tolist())
        layers = [name for name, module in self.denoiser.named_modules() if isinstance(module, nn.Linear)]
        self.tables = {name: nn.Parameter(torch.linspace(0.8, 1.2, 4).double()) for name in layers[::2]}

    @contextmanager
    def on(self) -> Iterator[None]:
        """With the backbone frozen, so that the first call is given nothing that needs a gradient."""
        wraps = {name: self._wrap(table) for name, table in self.tables.items()}
        with frozen(self.denoiser), overlaid(self.denoiser, wraps, self.clock):
            yield

    def _wrap(self, table: Tensor) -> Wrap:
        def wrap(beneath: Forward) -> Forward:
            return lambda x: beneath(x) * self.clock.select(table)

        return wrap


def in_a_thread(work: Callable[[], Any]) -> Any:
    """As autograd does it on a GPU."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("source", ["tiny_text", "tiny_class", "tiny_pixels"])
@pytest.mark.parametrize(
    ("inside", "call"),
    [(True, lambda work: work()), (False, in_a_thread)],
    ids=["laid inside, same thread", "laid around, another thread"],
)
def test_an_overlay_and_its_step_are_those_of_the_call(
    source: str, inside: bool, call: Callable[..., Any], double: Callable[..., Any], two_of: Two
) -> None:
    """Though the overlay is off by then, the clock gone on, and the weights no longer frozen."""
    pipeline = double(source)
    scales = Scales(pipeline)
    run = Run(pipeline, two_of(source), list(scales.tables.values()))
    with scales.on():
        plain = run.latents()
        expected = run.gradients(plain)
    assert all(table.abs().min() > 0 for table in expected if table is not None)
    steps = diffpress.checkpoint_steps(pipeline)
    latents = run.latents(*((steps, scales.on()) if inside else (scales.on(), steps)))
    assert torch.equal(latents, plain)
    sample(pipeline, run.wanted, Sampling(2))
    before = {name: module.__dict__.copy() for name, module in scales.denoiser.named_modules()}
    position = scales.clock.position
    assert_close(call(lambda: run.gradients(latents)), expected)
    assert {name: module.__dict__ for name, module in scales.denoiser.named_modules()} == before
    assert all(parameter.requires_grad for parameter in scales.denoiser.parameters())
    assert scales.clock.position == position


def test_an_overlay_that_is_laid_later_has_no_part(double: Callable[..., Any], two_of: Two) -> None:
    pipeline = double("tiny_class")
    run = Run(pipeline, two_of("tiny_class"))
    expected = run.gradients(run.latents())
    latents = run.latents(diffpress.checkpoint_steps(pipeline))
    with Scales(pipeline).on():
        pipeline.transformer.requires_grad_(True)
        assert_close(run.gradients(latents), expected)


@pytest.mark.filterwarnings("error:.*use_reentrant")
@pytest.mark.parametrize("source", ["tiny_text", "tiny_class", "tiny_pixels"])
def test_blocks_may_be_checkpointed_within_a_call(source: str, double: Callable[..., Any], two_of: Two) -> None:
    """Then a block is run three times a step: there, for its call, and for itself."""
    pipeline = double(source)
    denoiser, calls = denoiser_of(pipeline), []
    run = Run(pipeline, two_of(source))
    compare(run, lambda: checkpointed(denoiser, True))
    block = (
        denoiser.transformer_blocks[1]
        if hasattr(denoiser, "transformer_blocks")
        else denoiser.down_blocks[0].resnets[0]
    )
    with diffpress.checkpoint_steps(pipeline), checkpointed(denoiser, True):
        latents = run.latents()
    # Not at its end, which is not reached where all that is needed is there.
    block.register_forward_pre_hook(lambda *_: calls.append(None))
    run.gradients(latents)
    assert len(calls) == 2 * FOUR.steps
    assert not denoiser.is_gradient_checkpointing


@pytest.mark.parametrize("source", ["tiny_text", "tiny_class", "tiny_pixels"])
def test_an_overlay_learns_with_its_blocks_checkpointed(source: str, double: Callable[..., Any], two_of: Two) -> None:
    """The first block of the first step is given nothing that needs a gradient."""
    pipeline = double(source)
    scales = Scales(pipeline)
    run = Run(pipeline, two_of(source), list(scales.tables.values()))
    expected = run.gradients(run.latents(scales.on()))
    blocks = checkpointed(scales.denoiser, True)
    assert_close(run.gradients(run.latents(diffpress.checkpoint_steps(pipeline), scales.on(), blocks)), expected)


def test_who_watches_sees_every_call_once(double: Callable[..., Any], two_of: Two) -> None:
    pipeline, calls = double("tiny_class"), []
    run = Run(pipeline, two_of("tiny_class"))
    run.latents()
    with diffpress.checkpoint_steps(pipeline), watch(pipeline, calls.append):
        run.gradients(run.latents())
    assert [call.step for call in calls] == [0, 1, 2, 3]


@pytest.mark.parametrize("failing", [False, True])
def test_nothing_is_left_behind(failing: bool, double: Callable[..., Any], two_of: Two) -> None:
    pipeline = double("tiny_class")
    own = pipeline.transformer.forward
    pipeline.transformer.__dict__["forward"] = own
    wanted = [Condition("5000", 0)] if failing else two_of("tiny_class")
    expectation = pytest.raises(IndexError) if failing else nullcontext()
    with expectation, diffpress.checkpoint_steps(pipeline):
        sample_with_gradients(pipeline, wanted, FOUR)
    assert pipeline.transformer.__dict__.pop("forward") is own


# Memory.


def kept(
    run: Run, steps: int, context: Callable[[Any], AbstractContextManager[None]] = lambda _: nullcontext()
) -> dict[str, int]:
    """Bytes that autograd keeps for the way back, less the weights, made `within` calls of the denoiser or `around` them,
    and bytes of what the calls were given.
    """
    denoiser = denoiser_of(run.pipeline)
    weights = {parameter.untyped_storage()._cdata for parameter in denoiser.parameters()}
    found: dict[str, dict[int, Tensor]] = {"within": {}, "around": {}, "given": {}}
    place = ["around"]

    def keep(x: Tensor, where: str) -> Tensor:
        found[where][x.untyped_storage()._cdata] = x
        return x

    def enter(_: nn.Module, arguments: Any, options: Any) -> None:
        place.append("within")
        for x in tree_leaves((arguments, options)):
            if isinstance(x, Tensor):
                keep(x, "given")

    handles = [
        denoiser.register_forward_pre_hook(enter, with_kwargs=True),
        denoiser.register_forward_hook(lambda *_: place.pop() and None),
    ]
    run.latents(context(run.pipeline), steps=Sampling(steps, 3.0))
    for where in found:
        found[where].clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: keep(x, place[-1]), lambda x: x):
        # What is kept of the graph is referred to here, so that no two tensors have one storage in turn.
        latents = run.latents(context(run.pipeline), steps=Sampling(steps, 3.0))
    for handle in handles:
        handle.remove()
    assert latents.requires_grad
    return {
        where: sum(x.untyped_storage().nbytes() for storage, x in own.items() if storage not in weights)
        for where, own in found.items()
    }


@pytest.mark.parametrize("source", ["tiny_text", "tiny_class", "tiny_pixels"])
def test_a_call_keeps_its_inputs_only(source: str, double: Callable[..., Any], two_of: Two) -> None:
    """What else is kept is the pipeline's own arithmetic on latents, as it is without checkpoints."""
    pipeline = double(source)
    run = Run(pipeline, two_of(source))
    plain = {steps: kept(run, steps) for steps in (5, 20)}
    lean = {steps: kept(run, steps, diffpress.checkpoint_steps) for steps in (5, 20)}
    assert plain[5]["within"] > 5 * lean[5]["given"]
    # Some activations, such as projected prompts of text encoders, are the same at every step; most are not.
    assert plain[20]["within"] > 3 * plain[5]["within"]
    for steps, own in lean.items():
        assert own["within"] <= own["given"]
        assert own["around"] <= plain[steps]["around"]
    more = sum(lean[20][where] - lean[5][where] for where in ("within", "around"))
    arithmetic = plain[20]["around"] - plain[5]["around"]
    assert more <= lean[20]["given"] - lean[5]["given"] + arithmetic


# What cannot be made again.


def test_a_weight_that_changes_before_the_way_back_is_refused(double: Callable[..., Any], two_of: Two) -> None:
    pipeline = double("tiny_class")
    run = Run(pipeline, two_of("tiny_class"))
    latents = run.latents(diffpress.checkpoint_steps(pipeline))
    with torch.no_grad():
        pipeline.transformer.transformer_blocks[0].ff.net[2].weight.mul_(1.001)
    with pytest.raises(UserError, match=r"DiTTransformer2DModel computes something else .* before an optimizer's step"):
        run.gradients(latents)


class Remembering(nn.Module):
    """Answers otherwise from its ninth call on: by other numbers, or by more operations."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.calls, self.more = denoiser, 0, False

    def forward(self, sample: Tensor, timestep: Any, added: dict[str, Tensor]) -> Any:
        self.calls += 1
        if self.calls <= 8:
            return self.denoiser(sample, timestep, added)
        if self.more:
            return self.denoiser(self.denoiser(sample, timestep, added)[0], timestep, added)
        return (1.1 * self.denoiser(sample, timestep, added)[0],)


@pytest.mark.parametrize("more", [False, True], ids=["other numbers", "other operations"])
def test_a_denoiser_that_remembers_is_refused(more: bool, two_calls: Any, two_of: Two) -> None:
    two_calls.unet = Remembering(two_calls.unet)
    run = Run(two_calls, two_of("tiny_pixels"))
    run.latents(diffpress.checkpoint_steps(two_calls))
    two_calls.unet.calls, two_calls.unet.more = 0, more
    latents = run.latents(diffpress.checkpoint_steps(two_calls))
    with pytest.raises(UserError, match="Remembering computes something else on the way back"):
        run.gradients(latents)


def test_what_differs_at_every_call_is_refused_before_any_sampling(double: Callable[..., Any], two_of: Two) -> None:
    pipeline, calls = double("tiny_class"), []

    def wrap(beneath: Forward) -> Forward:
        return lambda x: calls.append(x) or beneath(x) * len(calls)

    with (
        overlaid(pipeline.transformer, {"proj_out_2": wrap}),
        diffpress.checkpoint_steps(pipeline),
        pytest.raises(UserError, match="DiTTransformer2DModel computes something else on the way back"),
    ):
        sample_with_gradients(pipeline, two_of("tiny_class"), FOUR)
    assert len(calls) == 2


def test_a_step_plan_is_refused_at_the_first_call(double: Callable[..., Any], two_of: Two) -> None:
    pipeline = double("tiny_class")
    blocks = tuple(f"transformer_blocks.{block}" for block in range(2))
    unit = Unit(modules=blocks, adds_to=("hidden_states",), channels=(16,))
    plan = StepPlan.of([unit], np.array([[step % 2 == 0] for step in range(4)]), order=1)
    part = Inheritance(plan, StepClock([999.0, 749.0, 499.0, 249.0]))
    calls: list[None] = []
    pipeline.transformer.proj_out_2.register_forward_hook(lambda *_: calls.append(None))
    with (
        overlaid(pipeline.transformer, part.wraps(pipeline.transformer), part.clock),
        diffpress.checkpoint_steps(pipeline),
        pytest.raises(UserError, match=r"around DiTTransformer2DModel \(Inheritance\) remembers earlier steps"),
    ):
        sample_with_gradients(pipeline, two_of("tiny_class"), FOUR)
    assert not calls
