"""A stage: from a subject to changes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import nn

from diffpress.calibration.conditions import Condition
from diffpress.calibration.sampling import Sampling, denoisers_of
from diffpress.calibration.trajectory import Trajectories
from diffpress.export.edits import store_edits
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.source import Form, forms_of

from .changes import Changes, worn
from .stage_folder import StageFolder

Report = Callable[[str, int, int], None]
"""Called with what is being done (a note may follow it after a comma), how much of it is done and how much there is."""


@dataclass(frozen=True)
class Subject:
    """What a stage works on: one component of a pipeline, and everything that is known of it."""

    pipeline: Any
    component: str
    """Its name in the pipeline, such as `unet`."""
    forms: Mapping[str, Form]
    """How its tensors are stored, by the model's names: by the source, or as earlier stages left them."""
    trajectories: Trajectories
    """Recorded runs of the original."""
    sampling: Sampling
    conditions: Callable[[int], list[Condition]]
    """So many conditions that nothing was recorded of, always the same ones first."""
    batch: int
    """Images that may be sampled at a time."""
    seed: int
    before: Changes = field(default_factory=Changes)
    """Of earlier stages: worn while a later one works."""

    @property
    def model(self) -> nn.Module:
        """The teacher: there is one copy of the weights, and what is laid over it comes off again."""
        return getattr(self.pipeline, self.component)

    @property
    def denoises(self) -> bool:
        """Whether it is called at every step or at some, so that there are trajectories of it."""
        return any(self.model is own for own in denoisers_of(self.pipeline).values())

    def check_alone(self, what: str) -> None:
        """Raises UnsupportedModelError where there are several denoisers, of which `what` works on one."""
        others = denoisers_of(self.pipeline)
        if self.denoises and len(others) > 1:
            raise UnsupportedModelError(
                f"{what} works on pipelines with one denoiser, and {type(self.pipeline).__name__} has {' and '.join(others)}. "
                "Leave it out; quantize.method ptq works on all of them."
            )

    @property
    def timesteps(self) -> list[float]:
        """That the denoiser was asked for while it was recorded."""
        return self.trajectories.timesteps

    def after(self, changes: Changes) -> Subject:
        """The subject of the next stage."""
        forms = store_edits(self.forms, changes.edits, forms_of(changes.tensors))
        return replace(self, before=self.before.then(changes), forms=forms)


@dataclass(frozen=True)
class Running:
    """What the pipeline itself takes, measured before anything is started."""

    steps: int
    """Of one image."""
    step_seconds: float
    """Of a batch of images."""
    recorded_batches: int
    """That the recipe asks for."""
    run_bytes: int
    """Of disk, where the run of one image is recorded."""


@dataclass(frozen=True)
class Cost:
    """What a method will take, beside what the pipeline takes to run."""

    seconds: Mapping[str, float]
    """By what is reported while it works."""
    disk_bytes: int = 0
    """Of everything that it writes into its folder, at the most."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else a user wants to know before, by name."""


class Method(Protocol):
    """A file that is a method, by the functions in it."""

    def check(self, subject: Subject, options: Any) -> None:
        """Raises UserError where the options do not fit the subject; asked before any work."""

    def estimate(self, subject: Subject, options: Any, running: Running) -> Cost:
        """Told from a look at the model, nothing being recorded yet."""

    def run(self, subject: Subject, options: Any, folder: StageFolder, report: Report) -> Changes:
        """Work on the subject, which wears what earlier stages changed; a killed run continues in `folder`."""


def run_stage(method: Method, subject: Subject, options: Any, folder: StageFolder, report: Report) -> Changes:
    """What the method changes; read from `folder` where it was finished there before."""
    changes = folder.finished()
    if changes is None:
        with worn(subject.model, subject.before, subject.timesteps):
            changes = method.run(subject, options, folder, report)
        folder.finish(changes)
    return changes
