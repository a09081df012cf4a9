"""End to end: gates learn from how far whole sampling runs end from the original's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from diffpress.calibration.checkpointing import checkpoint_steps
from diffpress.calibration.conditions import Condition
from diffpress.calibration.gradients import sample_with_gradients
from diffpress.calibration.sampling import sample
from diffpress.export.errors import LearningError

from ...checkpoint import Progress, load_checkpoint, save_checkpoint
from ...options import Masks as Options
from ...overlay import frozen, overlaid
from ...stage import Subject
from ..structures import Removed
from .gates import gate, noise, within_budget
from .masking import Masks

DECAY = 0.9
"""Of the moving average of the logits, whose order says which units go."""
EVALUATIONS = 4
"""How often units are removed for a trial, over the whole of learning."""
BEGINNING, ANNEALED = 0.5, 0.5
"""Share of the budget that is shut at first, and of the iterations after which all of it is."""

Trial = Callable[[Mapping[str, Tensor]], tuple[float, Removed]]
"""From logits to the error on images held out once units are removed, and these units."""


@dataclass
class Learning:
    """Learns which units go."""

    subject: Subject
    options: Options
    masks: Masks
    weights: Mapping[str, float]
    """Of one unit of each structure."""
    target: float
    """What all that goes is to weigh."""
    start: Mapping[str, Tensor]
    """[units] logits to begin with."""
    wanted: Sequence[Condition]
    """What is sampled, in turn."""
    trial: Trial
    folder: Path
    latents: dict[int, Tensor] = field(default_factory=dict)
    """Of the original, by batches."""

    def __post_init__(self) -> None:
        device = next(self.subject.model.parameters()).device
        self.logits = {name: nn.Parameter(own.clone().to(device)) for name, own in self.start.items()}
        self.average = {name: own.detach().clone() for name, own in self.logits.items()}
        self.optimizer = torch.optim.Adam(self.logits.values(), lr=self.options.rate)

    def run(
        self, best: Removed, error: float, report: Callable[[int, int], None]
    ) -> tuple[Removed, list[dict[str, float]]]:
        """The best units to remove, of those given, which cost `error`, and of those learned; and how learning went.

        Goes on from the checkpoint in the folder. Raises LearningError, naming the step, where the loss is not finite; the
        last checkpoint stays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint, iterations = self.folder / "learned.safetensors", self.options.iterations
        progress = load_checkpoint(checkpoint, self.logits, self.average, self.optimizer)
        if progress.iteration:
            best = json.loads(self._best.read_text(encoding="utf-8"))
        else:
            progress.take(error, math.nan)
        every = max(1, iterations // EVALUATIONS)
        while progress.iteration < iterations:
            loss = self.step(progress.iteration)
            progress.iteration += 1
            if progress.iteration % every == 0 or progress.iteration == iterations:
                error, removed = self.trial(self.average)
                best = removed if progress.take(error, loss) else best
                self._keep(checkpoint, best, progress)
            report(progress.iteration, iterations)
        return best, progress.history

    @property
    def _best(self) -> Path:
        return self.folder / "best.json"

    def _keep(self, checkpoint: Path, best: Removed, progress: Progress) -> None:
        self._best.write_text(json.dumps({name: list(units) for name, units in best.items()}), encoding="utf-8")
        save_checkpoint(checkpoint, self.logits, self.average, self.optimizer, progress)

    def step(self, iteration: int) -> float:
        """One step of the optimizer; the loss. Noise is drawn once, and is the same at every sampling step."""
        generator = torch.Generator().manual_seed(self.subject.seed + iteration)
        shut = self.target * min(1.0, BEGINNING + (1 - BEGINNING) * iteration / (ANNEALED * self.options.iterations))
        shifted = within_budget(self.logits, self.weights, shut)
        gates = {name: gate(own, noise(own, generator)) for name, own in shifted.items()}
        loss = self._loss(iteration, gates)
        self.optimizer.zero_grad()
        loss.backward()
        found = float(loss.detach())
        if not math.isfinite(found):
            raise LearningError(
                f"prune: the loss is not finite after {iteration} iterations. The last checkpoint is kept. Lower prune.rate, "
                "or remove less."
            )
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.logits.values()), 1 - DECAY)
        return found

    def _loss(self, iteration: int, gates: Mapping[str, Tensor]) -> Tensor:
        """Mean squared error of the last latents, from the same noise. The graph of each call is made anew on the way back."""
        pipeline, sampling = self.subject.pipeline, self.subject.sampling
        batch = iteration % max(1, len(self.wanted) // self.options.batch)
        wanted = self.wanted[batch * self.options.batch : (batch + 1) * self.options.batch]
        if batch not in self.latents:
            self.latents[batch] = sample(pipeline, wanted, sampling).latents
        self.masks.gates = gates
        with (
            frozen(self.subject.model),
            overlaid(self.subject.model, self.masks.wraps()),
            checkpoint_steps(pipeline),
        ):
            found = sample_with_gradients(pipeline, wanted, sampling)
            return (found - self.latents[batch].to(found)).square().mean()
