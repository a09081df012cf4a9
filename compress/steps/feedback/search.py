"""Which blocks are looped, at which steps, and how far the answers between reach: a small set of plans that fit the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from diffpress.export.runtime.feedback_plan import HELD, LOOPED, FeedbackPlan
from diffpress.export.runtime.step_plan import COMPUTED

from .blocks import Blocks

SPACINGS = (1.0, 0.9, 0.75, 1.15, 1.3)
"""Powers by which the computed steps are spread over the run: even, denser towards its end, denser towards its start."""
SOURCES = ("forecast", "pass")
ACTIVE = (1.0, 0.5)
"""Shares of the computed steps, the last ones, that go through the loop: a loop less is a computed step more."""


def loop_macs(blocks: Blocks, plan_source: str, looped: int) -> int:
    """What the loop adds to one call of the denoiser: the feedback module, and the looped blocks once more after a pass."""
    return blocks.block_macs * (1 + (looped if plan_source == "pass" else 0))


def plan_macs(blocks: Blocks, plan: FeedbackPlan) -> int:
    """Multiply-accumulates of the denoiser over one image."""
    extra = loop_macs(blocks, plan.source, len(plan.looped))
    computed = len(plan.steps) - plan.steps.count(HELD)
    return computed * blocks.total_macs + plan.steps.count(LOOPED) * extra


def outer_places(steps: int, count: int, power: float) -> list[int]:
    """`count` of `steps` places, the first and the last among them, at distances of one at least that grow or shrink."""
    places = [round((place / max(1, count - 1)) ** power * (steps - 1)) for place in range(count)]
    for index in range(1, count):
        places[index] = max(places[index], places[index - 1] + 1)
    for index in reversed(range(count)):
        places[index] = min(places[index], steps - (count - index))
    return places


def spell(steps: int, places: Sequence[int], looped: int, source: str) -> str:
    """The steps of a plan: of those that are computed the last ones go through the loop, `looped` at the most.

    Those whose answer stands for no other step do not, as it is right as it is; nor can the first one forecast anything.
    """
    standing = [place for place in places if place + 1 < steps and place + 1 not in places]
    standing = [place for place in standing if place or source == "pass"]
    chosen = standing[max(0, len(standing) - looped) :]
    return "".join(HELD if step not in places else LOOPED if step in chosen else COMPUTED for step in range(steps))


def computed_steps(blocks: Blocks, steps: int, speedup: float, source: str, looped_blocks: int, active: float) -> int:
    """How many steps can be computed so that an image is `speedup` times cheaper; 0 where not one can."""
    budget = steps * blocks.total_macs / speedup
    each = blocks.total_macs + active * loop_macs(blocks, source, looped_blocks)
    return min(steps, int(budget / each + 1e-9))


def regions(count: int) -> list[tuple[int, int]]:
    """First and last block of loops around the middle, the early and the late blocks, a third of them long or one half."""
    found = []
    for length in (max(1, count // 3), max(1, count // 2)):
        middle = (count - length) // 2
        found += [
            (first, first + length - 1)
            for first in (middle, max(0, middle - length), min(count - length, middle + length))
        ]
    return list(dict.fromkeys(found))


Places = Callable[[int], Sequence[int]]
"""Where so many computed steps lie best."""


def plans(
    blocks: Blocks, steps: int, speedup: float, places: Places, region: tuple[int, int] | None, source: str | None
) -> Iterator[FeedbackPlan]:
    """Every plan of the set that is `speedup` times cheaper; a `region` and a `source` leave the others out."""
    choices = product(
        ACTIVE, SOURCES if source is None else [source], regions(blocks.size) if region is None else [region]
    )
    for active, own_source, (first, last) in choices:
        count = computed_steps(blocks, steps, speedup, own_source, last - first + 1, active)
        if not count:
            continue
        own_steps = spell(steps, places(count), round(active * count), own_source)
        if LOOPED in own_steps:
            yield plan_of(blocks, own_steps, (first, last), own_source)


def plain_plan(blocks: Blocks, steps: int, places: Sequence[int]) -> FeedbackPlan:
    """The plan that computes these steps, without a loop."""
    return plan_of(blocks, spell(steps, places, 0, "forecast"), (0, 0), "forecast")


def plan_of(blocks: Blocks, steps: str, region: tuple[int, int], source: str) -> FeedbackPlan:
    """The feedback module has the form of the last looped block."""
    first, last = region
    return FeedbackPlan.model_validate(
        {
            "blocks": blocks.path,
            "first": first,
            "last": last,
            "copied": last,
            "carries": blocks.carries,
            "source": source,
            "steps": steps,
        }
    )
