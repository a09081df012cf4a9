"""Inner-loop feedback as it runs: without scales it is the backbone, held steps compute nothing, and runs do not mix."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from pydantic import ValidationError
from torch import Tensor, nn

from diffpress.calibration.conditions import Condition
from diffpress.calibration.sampling import Sampling, sample
from diffpress.compress.overlay import overlaid
from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.export.runtime import Feedback, FeedbackPlan, StepClock

STEPS = 6
WANTED = [Condition("3", 1), Condition("5", 2)]


def plan(steps: str, source: str = "pass", **settings: Any) -> FeedbackPlan:
    return FeedbackPlan.model_validate(
        {
            "blocks": "transformer_blocks",
            "first": 0,
            "last": 1,
            "copied": 1,
            "carries": ("hidden_states",),
            "source": source,
            "steps": steps,
            **settings,
        }
    )


@pytest.fixture
def pipeline(tiny_class: Path) -> Any:
    """Of two blocks."""
    pipeline = load_pipeline(PipelineFolder(tiny_class, "tiny"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def timesteps(pipeline: Any, steps: int = STEPS) -> list[float]:
    pipeline.scheduler.set_timesteps(steps)
    return pipeline.scheduler.timesteps.tolist()


@contextmanager
def around(pipeline: Any, own: FeedbackPlan, scales: float, damping: float = 0.5) -> Iterator[Feedback]:
    """The part is laid around the pipeline's denoiser while the context lasts."""
    clock = StepClock(timesteps(pipeline))
    part = Feedback.around(own, pipeline.transformer, clock)
    part.scales.fill_(scales)
    part.damping.fill_(damping)
    with overlaid(pipeline.transformer, part.wraps(pipeline.transformer), clock):
        yield part


def drawn(pipeline: Any, steps: int = STEPS) -> Tensor:
    return sample(pipeline, WANTED, Sampling(steps, 3.0)).latents


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("source", ["pass", "forecast"])
def test_with_scales_of_zero_it_is_the_backbone_bit_for_bit(pipeline: Any, source: str) -> None:
    expected = drawn(pipeline)
    with around(pipeline, plan("@" * STEPS, source), 0.0):
        found = drawn(pipeline)
    assert torch.equal(found, expected)


def test_the_loop_calls_its_blocks_twice_and_the_module_once(pipeline: Any) -> None:
    blocks = pipeline.transformer.transformer_blocks
    passes: list[int] = []
    original = blocks[0].forward
    blocks[0].forward = lambda *arguments, **options: (passes.append(1), original(*arguments, **options))[1]
    with around(pipeline, plan("@#@..@"), 0.3) as part, counted(part.block) as fed:
        drawn(pipeline)
    del blocks[0].forward
    # Four steps are computed, three of them with the loop.
    assert (len(passes), len(fed)) == (4 + 3, 3)


def test_a_forecast_needs_no_first_pass(pipeline: Any) -> None:
    with (
        around(pipeline, plan("@#@..@", "forecast"), 0.3) as part,
        counted(part.block) as fed,
        counted(pipeline.transformer.transformer_blocks[0]) as passes,
    ):
        drawn(pipeline)
    # The first step has nothing to forecast from.
    assert (len(passes), len(fed)) == (4, 2)


def test_held_steps_continue_the_line_through_the_answers_before_them(pipeline: Any) -> None:
    answers: list[Tensor] = []
    model = pipeline.transformer
    with around(pipeline, plan("##.#.."), 0.0, 0.5):
        handle = model.register_forward_hook(lambda _model, _arguments, output: answers.append(output[0]))
        drawn(pipeline)
        handle.remove()
    one = 4 * torch.finfo(torch.float32).eps
    expected = answers[1] + 0.5 * (answers[1] - answers[0])
    torch.testing.assert_close(answers[2], expected, rtol=one, atol=one * float(answers[1].abs().max()))
    # The answers at 1 and at 3 lie two steps apart.
    expected = answers[3] + 2 * 0.5 * (answers[3] - answers[1]) / 2
    torch.testing.assert_close(answers[5], expected, rtol=one, atol=one * float(answers[3].abs().max()))


def test_two_generations_that_take_turns_and_threads_are_as_each_alone(pipeline: Any) -> None:
    own = plan("@@.@.@", "forecast")
    with around(pipeline, own, 0.3):
        alone = [drawn(pipeline) for _ in range(2)]
        found: list[Tensor] = []

        def generate() -> None:
            other = copy.copy(pipeline)
            other.scheduler, other.vae = copy.deepcopy(pipeline.scheduler), copy.deepcopy(pipeline.vae)
            found.append(drawn(other))

        threads = [threading.Thread(target=generate) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(*alone)
    assert len(found) == 3
    assert all(torch.equal(each, alone[0]) for each in found)


def test_at_other_step_counts_it_follows_the_plan(pipeline: Any) -> None:
    with around(pipeline, plan("##.#.#"), 0.0), counted(pipeline.transformer.transformer_blocks[0]) as calls:
        assert torch.isfinite(drawn(pipeline, 3)).all()
        # Each of three steps passes two rows, one of which is computed at least.
        assert len(calls) == 3


@torch.no_grad()
def test_blocks_that_hand_on_several_tensors_are_fed_in_each() -> None:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()
    carries = ("encoder_hidden_states", "hidden_states")
    own = plan("@@", first=0, last=1, copied=1, carries=carries)
    clock = StepClock([900.0, 100.0])
    part = Feedback.around(own, model, clock)
    given = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 8),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([900.0]),
        "return_dict": False,
    }
    with overlaid(model, part.wraps(model), clock):
        before = model(**given)[0]
        part.scales.fill_(0.4)
        after = model(**given)[0]
    assert torch.equal(before, model(**given)[0])
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [({"steps": ".@"}, "first step"), ({"first": 1, "last": 0}, "before it begins"), ({"steps": "@x"}, "pattern")],
)
def test_a_plan_that_cannot_be_is_refused(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        plan(**{"steps": "@@", **wrong})


def test_a_copy_of_a_block_keeps_nothing_that_lies_around_it(pipeline: Any) -> None:
    with around(pipeline, plan("@" * STEPS), 0.3):
        inner = Feedback.around(plan("@" * STEPS), pipeline.transformer, StepClock(timesteps(pipeline)))
    assert all("forward" not in part.__dict__ for part in inner.block.modules())
