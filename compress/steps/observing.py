"""What the units compute in whole runs of the pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffpress.calibration.conditions import Condition
from diffpress.calibration.sampling import sample
from diffpress.calibration.trajectory import Progress
from diffpress.export.runtime import Inheritance, StepClock, StepPlan, Unit
from diffpress.export.runtime.runs import Run

from ..overlay import overlaid
from ..stage import Subject
from .features import FeatureMoments


class _Observed(Inheritance):
    """Computes everything, and hands over what was computed."""

    moments: FeatureMoments

    def end(self, run: Run) -> None:
        frame = self.frame
        if frame is not None:
            for unit, features in frame.made.items():
                self.moments.add(id(run), round(run.position), unit, features)
        super().end(run)


def observe_features(
    subject: Subject, units: Sequence[Unit], wanted: Sequence[Condition], window: int, notify: Progress
) -> FeatureMoments:
    """Moments of the units' features over whole runs of what the subject wears."""
    timesteps = subject.timesteps
    plan = StepPlan.of(units, np.ones((len(timesteps), len(units)), dtype=bool))
    moments = FeatureMoments(len(timesteps), [sum(unit.channels) for unit in units], window)
    for start in range(0, len(wanted), subject.batch):
        clock = StepClock(timesteps)
        part = _Observed(plan, clock)
        part.moments, part.keeps = moments, (True,) * len(units)
        with overlaid(subject.model, part.wraps(subject.model), clock):
            sample(subject.pipeline, wanted[start : start + subject.batch], subject.sampling)
        moments.forget()
        notify(min(start + subject.batch, len(wanted)), len(wanted))
    return moments
