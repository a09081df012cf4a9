"""Which steps go through an inner loop, and which continue the answers of earlier ones: a plan as data."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .step_plan import COMPUTED, rows_at

LOOPED, HELD = "@", "."
"""Steps of a plan, as it spells them beside `#`: the inner loop runs; nothing does, and earlier answers are continued."""


class FeedbackPlan(BaseModel):
    """Blocks `first` to `last` of a denoiser's list of blocks are called twice at some steps, and nothing is at others.

    An answer stands for all steps until the next that is not held, so that fewer and longer ones are computed, whatever the
    scheduler. With scales of zero the loop changes nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: Literal["feedback"] = "feedback"
    blocks: str
    """Dotted path of the list."""
    first: int = Field(ge=0)
    last: int
    copied: int = Field(ge=0)
    """The block whose form the feedback module has."""
    carries: tuple[str, ...] = Field(min_length=1)
    """Arguments of a block that the block before it answered with: of its tensors, in their order."""
    source: Literal["pass", "forecast"] = "pass"
    """What the feedback module is given: what the last looped block gives in a first pass, or a forecast of that by earlier
    steps, which saves the first pass."""
    steps: str = Field(min_length=1, pattern=r"^[#@.]+$")
    """One character a step: `#` computed as ever, `@` with the inner loop, `.` held."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.last < self.first:
            raise ValueError(f"the loop ends with block {self.last}, before it begins with {self.first}")
        if self.steps[0] == HELD:
            raise ValueError("the first step has nothing to hold")
        return self

    @property
    def looped(self) -> list[str]:
        """Dotted paths of the looped blocks, in the order of calls."""
        return [f"{self.blocks}.{index}" for index in range(self.first, self.last + 1)]

    def words(self) -> str:
        """What the report calls it."""
        looped, held = self.steps.count(LOOPED), self.steps.count(HELD)
        loop = f"feedback around blocks {self.first} to {self.last} at {looped} steps" if looped else "no feedback"
        return f"step plan, {loop}, {held} of {len(self.steps)} held"

    def why_not_exported(self) -> str:
        """Why graphs cannot hold it yet."""
        return "graphs have no inner loop, and hold no answers"

    def exact(self) -> tuple[str, ...]:
        """Tensors of the part whose dtype no loader may change."""
        return ("scales", "damping")

    def cell(self, position: float, last: float | None) -> str:
        """What a call at `position` does, the call before it having been at `last`."""
        passed = {self.steps[row] for row in rows_at(position, last, len(self.steps))}
        return next(kind for kind in (LOOPED, COMPUTED, HELD) if kind in passed)
