"""The student: the teacher's own modules with the feedback module laid around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from diffpress.calibration.sampling import device_of
from diffpress.export.runtime import Feedback, FeedbackPlan, StepClock

from ...overlay import checkpointed, is_large, overlaid, teacher


class Student:
    """A feedback module under training; the denoiser is as it was unless asked to be on."""

    def __init__(self, denoiser: nn.Module, plan: FeedbackPlan, damping: Tensor, timesteps: Sequence[float]) -> None:
        """The module starts as the block that it copies, and its answer counts for nothing."""
        self.denoiser, self.plan = denoiser, plan
        self.clock = StepClock(timesteps)
        self.part = Feedback.around(plan, denoiser, self.clock)
        self.part.damping.copy_(damping)
        # What learns is held in float32 whatever the denoiser computes in.
        self.part.float().requires_grad_(True)
        self.part.scales.requires_grad_(True)
        self.part.to(device_of(denoiser)).eval()

    def parameters(self) -> dict[str, Tensor]:
        """Everything that is learned, by name."""
        return {
            "scales": self.part.scales,
            **{f"block.{name}": own for name, own in self.part.block.named_parameters()},
        }

    @contextmanager
    def on(self) -> Iterator[None]:
        """The denoiser answers as the one with feedback will."""
        with (
            overlaid(self.denoiser, self.part.wraps(self.denoiser), self.clock),
            checkpointed(self.denoiser, is_large(self.denoiser)),
        ):
            yield

    @contextmanager
    def learning(self) -> Iterator[None]:
        """The same on what the denoiser was before earlier stages changed it: integers have no gradients to learn by."""
        with self.off(), self.on():
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """The teacher answers, also where the student is on."""
        with teacher(self.denoiser):
            yield

    def tensors(self) -> dict[str, Tensor]:
        """What the runtime part holds, in the dtype of the denoiser but for its tables."""
        dtype = next(self.denoiser.parameters()).dtype
        exact = self.plan.exact()
        return {
            name: own.detach().clone().to(own.dtype if name in exact else dtype).cpu()
            for name, own in self.part.state_dict().items()
        }
