"""From a recipe to the stages that it asks for, each with what it works on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffpress.calibration.conditions import Condition, conditions
from diffpress.calibration.sampling import Sampling
from diffpress.calibration.trajectory import Trajectories
from diffpress.compress.changes import Changes
from diffpress.compress.methods import STAGES, method_of
from diffpress.compress.options import Rounding
from diffpress.compress.stage import Method, Report, Subject, run_stage
from diffpress.export.errors import RecipeError, UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.source import Form, forms_of, source_tensors

from .calling import given_of
from .recipe import Recipe
from .work import Work

NOWHERE = Path()
"""Where nothing is recorded yet."""


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe on one component."""

    name: str
    options: Any
    subject: Subject

    @property
    def method(self) -> Method:
        return method_of(self.options)


def stages_of(
    source: PipelineFolder,
    pipeline: Any,
    recipe: Recipe,
    forms: Mapping[str, Mapping[str, Form]],
    recorded: Path = NOWHERE,
) -> list[Stage]:
    """In the order in which they are run. Raises UserError where a method does not fit what it is to work on."""
    stages = [
        Stage(
            name,
            options,
            Subject(
                pipeline,
                component,
                forms[component],
                Trajectories(recorded, component if component in source.denoisers else None),
                sampling_of(pipeline, recipe),
                partial(rollout_conditions, pipeline, recipe),
                recipe.record.batch,
                recipe.seed,
            ),
        )
        for name, options in _chosen(recipe)
        for component in _components(source, options)
    ]
    for stage in stages:
        stage.method.check(stage.subject, stage.options)
    return stages


def _chosen(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    return ((name, options) for name in STAGES if (options := getattr(recipe, name, None)) is not None)


def _components(source: PipelineFolder, options: Any) -> list[str]:
    """Folders of the components that a stage names."""
    wanted = getattr(options, "components", ["denoiser"])
    names = dict.fromkeys(name for component in wanted for name in source.require(component))
    if not names:
        raise UnsupportedModelError(
            f"components: {source.name} has no text encoders, so that nothing would be changed."
        )
    misfit = options.misfit(list(names), source.denoisers) if isinstance(options, Rounding) else None
    if misfit is not None:
        raise RecipeError(f"recipe: quantize: {misfit}.")
    return list(names)


def component_forms(source: PipelineFolder, recipe: Recipe) -> dict[str, dict[str, Form]]:
    """How every component that is changed is stored. Raises UserError where one is not what its model needs."""
    forms = {}
    for name, options in _chosen(recipe):
        for component in _components(source, options):
            if not source.weight_files(component):
                raise UnsupportedModelError(f"{name}.components: {component!r} of {source.name} has no weights.")
            forms[component] = forms_of(source_tensors(source, component))
    return forms


def check_called(source: PipelineFolder, changed: Collection[str], trajectories: Trajectories) -> None:
    """Raises RecipeError where a denoiser is to be `changed` that no recorded run has called."""
    for component in source.denoisers:
        if component in changed and component not in trajectories.parts:
            raise RecipeError(
                f"{component} of {source.name} was not called in any recorded run, so that it is not known what it is given. "
                "Give sampling.steps more, or name other parts in quantize.components."
            )


def run_stages(stages: list[Stage], work: Work, report: Report) -> dict[str, Changes]:
    """What became of each component; stages that were finished before a run was killed are read from `work`."""
    changes: dict[str, Changes] = {}
    for stage in stages:
        component = stage.subject.component
        before = changes.get(component, Changes())
        folder = work.stage(stage.name, component)
        found = run_stage(stage.method, stage.subject.after(before), stage.options, folder, report)
        changes[component] = before.then(found)
    return changes


def sampling_of(pipeline: Any, recipe: Recipe) -> Sampling:
    """How the pipeline samples while it is recorded and compared."""
    shared = given_of(pipeline, recipe).shared
    return Sampling(recipe.sampling.steps, recipe.sampling.guidance_scale, shared)


def recorded_conditions(pipeline: Any, recipe: Recipe) -> list[Condition]:
    """What is recorded; its seeds are apart from those that results are reported on, which count up from the recipe's own."""
    given = given_of(pipeline, recipe)
    return conditions(pipeline, recipe.record.prompts, recipe.record.trajectories, recipe.seed + 2**31, given=given)


def rollout_conditions(pipeline: Any, recipe: Recipe, count: int) -> list[Condition]:
    """What a student samples while it learns: texts from where recording stopped on, with seeds of their own."""
    recorded, given = recipe.record.trajectories, given_of(pipeline, recipe)
    wanted = conditions(pipeline, recipe.record.prompts, recorded + count, recipe.seed + 2**32, given=given)
    return wanted[recorded:]
