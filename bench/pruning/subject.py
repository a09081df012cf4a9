"""A model with its recorded runs, what a recipe or a baseline changes of it, and the smaller pipeline that this leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from diffpress.calibration.conditions import Condition, call_parameters
from diffpress.calibration.sampling import Sampling
from diffpress.calibration.trajectory import Trajectories, record
from diffpress.compress.changes import Changes
from diffpress.export.artifact import open_pipeline, write_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.models import resolve
from diffpress.pairs import paired_conditions
from diffpress.recipe import Recipe, parse_recipe
from diffpress.stages import component_forms, recorded_conditions, run_stages, sampling_of, stages_of
from diffpress.work import Work

GUIDANCE = 3.0
"""What the models' cards recommend."""
SEED = 9_000
"""Apart from the seeds that anything was tuned on."""
RECORDED = 128
"""Runs that every method may look at."""
BATCH = 8
BASELINES = {
    "random": "by_chance",
    "taylor": "by_taylor",
    "taylor-even": "by_taylor",
    "wanda": "by_wanda",
    "obs-even": "by_surgeon",
    "obs-even+refit": "by_surgeon",
}
"""Name to the module that prunes; all others are recipes."""
Sections = Mapping[str, Any]
"""Of a recipe."""


@dataclass(frozen=True)
class Prepared:
    """One model, opened, for runs of so many steps."""

    model: str
    steps: int
    work: Path
    recorded: int = RECORDED

    @cached_property
    def source(self) -> PipelineFolder:
        return resolve(self.model)

    @cached_property
    def pipeline(self) -> Any:
        """The original, in single precision."""
        pipeline = open_pipeline(self.source)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def sampling(self) -> Sampling:
        return sampling_of(self.pipeline, self.recipe({"prune": {"method": "magnitude"}}))

    def recipe(self, sections: Sections) -> Recipe:
        """With those sections, recorded and sampled as all rows are."""
        sampling: dict[str, Any] = {"steps": self.steps}
        if "guidance_scale" in call_parameters(type(self.pipeline)):
            sampling["guidance_scale"] = GUIDANCE
        return parse_recipe(
            {"sampling": sampling, "record": {"trajectories": self.recorded, "batch": BATCH}, **sections}
        )

    def compared(self, count: int) -> list[Condition]:
        """Prompts and seeds apart from those that are recorded."""
        return paired_conditions(self.pipeline, count, SEED)

    def trajectories(self, recipe: Recipe) -> Trajectories:
        """Recorded once for all rows."""
        wanted = recorded_conditions(self.pipeline, recipe)
        folder = self.work / "recorded" / self.source.path.name
        return record(self.pipeline, wanted, sampling_of(self.pipeline, recipe), folder, BATCH)

    def changed(self, row: str, sections: Sections, folder: Path) -> dict[str, Changes]:
        """What a row makes of the components; `folder` is where finished stages are kept.

        A baseline is given the options of `magnitude`, and by them the same budget.
        """
        recipe = self.recipe(sections)
        recorded = self.trajectories(recipe).folder
        stages = stages_of(self.source, self.pipeline, recipe, component_forms(self.source, recipe), recorded)
        if row not in BASELINES:
            return run_stages(stages, Work(folder), lambda *_: None)
        (stage,) = stages
        prune = import_module(BASELINES[row]).prune
        return {stage.subject.component: prune(row, stage.subject, stage.options)}

    def saved(self, changes: Mapping[str, Changes], folder: Path) -> PipelineFolder:
        """The pipeline with its changes, in the empty `folder`, as an artifact holds it."""
        folder.mkdir(parents=True)
        timesteps = self.trajectories(self.recipe({"prune": {"method": "magnitude"}})).timesteps
        edits = [edit for own in changes.values() for edit in own.edits]
        tensors = {component: own.tensors for component, own in changes.items()}
        write_pipeline(folder, self.source, edits, tensors, timesteps)
        return PipelineFolder(folder, str(folder))
