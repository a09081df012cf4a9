"""The method `feedback`: plans that fit the budget learn for a while, the best of them learns on."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffpress.calibration.guidance import Guidance, find_guidance
from diffpress.calibration.partway import scheduler_in_use
from diffpress.calibration.sampling import replay
from diffpress.export.edits import Attach
from diffpress.export.errors import RecipeError, UnsupportedModelError
from diffpress.export.runtime import FeedbackPlan
from diffpress.export.runtime.feedback_plan import LOOPED

from ...changes import Changes, Note
from ...checkpoint import Progress, checkpoint_bytes
from ...importance import scheduler_weights
from ...options import Feedback
from ...overlay import frozen
from ...rollouts import ROLLOUT_ROUNDS
from ...stage import Cost, Report, Running, Subject
from ...stage_folder import StageFolder
from .blocks import Blocks, block_lists, find_blocks
from .landing import fit_damping, landings
from .search import SPACINGS, computed_steps, outer_places, plain_plan, plan_macs, plans
from .student import Student
from .train import EVALUATIONS, Learning
from .training_data import StudentRollouts, TrainingData, check_calls, products_of
from .validation import Validation

logger = logging.getLogger(__name__)

MODULE = "feedback"
"""Where the part is added to the denoiser."""
BEST = "best"
"""Where the plan that learns on has its checkpoints."""
ROLLOUT_CONDITIONS = 512
"""Different conditions that a student may sample while it learns."""
TRIAL_SHARE = 0.2
"""Iterations of a trial over those of the best."""
LEARNING = 4
"""What learning from a call takes, over what the call itself takes."""
FLOAT, MOMENTS = 4, 8
"""Bytes of a number that is learned, and of what the optimizer keeps of it."""


def check(subject: Subject, options: Feedback) -> None:
    """Raises UnsupportedModelError for a denoiser without lists of blocks, RecipeError for a region that it does not have."""
    subject.check_alone("steps.method feedback")
    lists = block_lists(subject.model)
    if not lists:
        raise UnsupportedModelError(
            f"steps.method feedback needs a denoiser of blocks; {type(subject.model).__name__} has none."
        )
    most = max(map(len, lists))
    first, last = options.region or (0, 0)
    if not 0 <= first <= last < most:
        raise RecipeError(f"steps.region: {first} to {last} are no blocks of this denoiser, which has 0 to {most - 1}.")


def estimate(subject: Subject, options: Feedback, running: Running) -> Cost:
    """Iterations of the trials and of the best, student rollouts, and whole runs to evaluate by."""
    image_seconds = running.step_seconds / subject.batch
    runs = (EVALUATIONS + 1) * options.validation_images + 2 * EVALUATIONS * options.rollout_share * subject.batch
    each = image_seconds * (options.iterations * options.batch * subject.batch * LEARNING + runs * running.steps)
    block = max(sum(own.numel() for own in part[0].parameters()) for part in block_lists(subject.model))
    disk = checkpoint_bytes(block, FLOAT, MOMENTS) + (ROLLOUT_ROUNDS + 1) * subject.batch * running.run_bytes
    seconds = {"try plans": options.trials * TRIAL_SHARE * each, "learn": each}
    return Cost(seconds, disk * (options.trials + 1))


def run(subject: Subject, options: Feedback, folder: StageFolder, report: Report) -> Changes:
    """Raises UnsupportedModelError where the pipeline or its scheduler does not allow for it, LearningError where the loss
    is not finite. A killed run continues.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    check_calls(subject.trajectories)
    with frozen(subject.model):
        return _Search(subject, options, folder.path, report).run()


@dataclass
class _Trained:
    """A plan, how well it does, and what its part holds."""

    plan: FeedbackPlan
    progress: Progress
    tensors: dict[str, Tensor]


class _Search:
    def __init__(self, subject: Subject, options: Feedback, folder: Path, report: Report) -> None:
        self.subject, self.options, self.folder, self.report = subject, options, folder, report
        recorded = subject.trajectories
        self.blocks = _blocks_of(subject)
        self.products = products_of(recorded)
        self.guidance: Guidance | None = find_guidance(recorded)
        conditions = subject.conditions(options.validation_images + ROLLOUT_CONDITIONS)
        images, self.wanted = conditions[: options.validation_images], conditions[options.validation_images :]
        self.validation = Validation(subject.pipeline, images, subject.sampling, subject.batch)
        scheduler = scheduler_in_use(subject.pipeline, self.wanted[0], subject.sampling)
        weights = scheduler_weights(scheduler, recorded.updates)
        self._spread: dict[int, list[int]] = {}
        self.weights = [1.0] * len(recorded.timesteps) if weights is None else weights.tolist()

    def run(self) -> Changes:
        """The best of what learned, or of what needs no learning where that does better at the same cost."""
        speedup, steps = self.options.speedup, len(self.weights)
        count = computed_steps(self.blocks, steps, speedup, "forecast", 0, 0)
        if not count:
            raise RecipeError(f"steps.speedup: {speedup:g} leaves no step of {steps} to compute. Give at most {steps}.")
        without = self._unlooped(plain_plan(self.blocks, steps, self._places(count)))
        tried = plans(self.blocks, steps, speedup, self._places, self.options.region, self.options.source)
        chosen = _chosen(list(dict.fromkeys(tried)), self.options.trials, self.subject.seed)
        if not chosen:
            raise RecipeError(f"steps.speedup: {speedup:g} leaves no step of {steps} to loop. Give less.")
        trials = [self._learned(f"trial-{index}", own, self._trial_iterations) for index, own in enumerate(chosen)]
        promising = min(trials, key=lambda own: own.progress.best)
        best = self._learned(BEST, promising.plan, self.options.iterations)
        self._tell([without, *trials, best])
        history = tuple(best.progress.history)
        if best.progress.best >= without.progress.best:
            logger.warning("feedback does no better than the same cost without it: the plan has no inner loop")
            best = without
        return self._changes(best, history)

    def _changes(self, best: _Trained, history: tuple[dict[str, float], ...]) -> Changes:
        edit = Attach(component=self.subject.component, module=MODULE, settings=best.plan)
        tensors = {f"{MODULE}.{name}": own for name, own in best.tensors.items()}
        speedup = len(best.plan.steps) * self.blocks.total_macs / plan_macs(self.blocks, best.plan)
        notes = {name.rpartition(".")[0]: Note("learned", format=str(own.dtype)[6:]) for name, own in tensors.items()}
        notes[MODULE] = Note(f"{speedup:.2f} times fewer multiplications", best.progress.best, edit.words())
        return Changes((edit,), tensors, notes, history)

    def _places(self, count: int) -> list[int]:
        """Where so many computed steps lie best: by whole runs without a loop."""
        if count not in self._spread:
            steps = len(self.weights)
            spread = [outer_places(steps, count, power) for power in SPACINGS]
            errors = [self._unlooped(plain_plan(self.blocks, steps, own)).progress.best for own in spread]
            self._spread[count] = spread[errors.index(min(errors))]
        return self._spread[count]

    @property
    def _trial_iterations(self) -> int:
        # A single plan has nothing to be compared with.
        return max(1, round(TRIAL_SHARE * self.options.iterations)) if self.options.trials > 1 else 0

    def _student(self, plan: FeedbackPlan) -> tuple[Student, list[float]]:
        damping = fit_damping(self.products, plan.steps)
        return Student(self.subject.model, plan, torch.tensor(damping), self.subject.timesteps), damping

    def _unlooped(self, plan: FeedbackPlan) -> _Trained:
        """A plan without a loop, which has nothing to learn."""
        student, _ = self._student(plan)
        progress = Progress()
        progress.take(self.validation.error(student), 0.0)
        return _Trained(plan, progress, student.tensors())

    def _learned(self, name: str, plan: FeedbackPlan, iterations: int) -> _Trained:
        """A plan after so many iterations, of which those done before a kill are not repeated."""
        student, damping = self._student(plan)
        landed = landings(plan.steps, damping, self.weights)
        looped = [step for step, cell in enumerate(plan.steps) if cell == LOOPED]
        runs = StudentRollouts(
            self.subject.pipeline,
            self.wanted,
            self.subject.sampling,
            self.folder / name,
            self.subject.batch,
        )
        training_data = TrainingData(self.subject.trajectories, runs, landed, looped, self.subject.seed)
        learning = Learning(
            student, training_data, self.validation, self.guidance, self.options, iterations, runs.folder
        )
        progress = learning.run(partial(self._progress, name))
        return _Trained(plan, progress, student.tensors())

    def _progress(self, name: str, done: int, total: int, loss: float) -> None:
        self.report(f"{'learn' if name == BEST else 'try plans'}, loss {loss:.2e}", done, total)

    def _tell(self, found: Sequence[_Trained]) -> None:
        """Write down what was tried and how it did."""
        rows = [
            {
                "plan": own.plan.model_dump(mode="json"),
                "macs": plan_macs(self.blocks, own.plan),
                "error": own.progress.best,
            }
            for own in found
        ]
        (self.folder / "tried.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _chosen(tried: list[FeedbackPlan], count: int, seed: int) -> list[FeedbackPlan]:
    """The first, and others drawn."""
    if not tried:
        return []
    order = torch.randperm(len(tried) - 1, generator=torch.Generator().manual_seed(seed)).tolist()
    return [tried[0], *(tried[place + 1] for place in order)][:count]


def _blocks_of(subject: Subject) -> Blocks:
    call = subject.trajectories.call(subject.trajectories.shards[0], 0)
    return find_blocks(subject.model, lambda: replay(subject.model, call))
