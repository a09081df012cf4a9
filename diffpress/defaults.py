"""What a pipeline was made for, and what it can be asked for."""

from __future__ import annotations

from diffpress.calibration.conditions import call_parameters, check_texts, kind
from diffpress.calibration.sampling import Sampling
from diffpress.export.artifact import is_artifact
from diffpress.export.errors import UserError
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import read_manifest

from .calling import given_of, portable
from .models import pipeline_class
from .recipe import Recipe


def default_sampling(folder: PipelineFolder) -> Sampling:
    """What an artifact was made for; the pipeline's own defaults for anything else."""
    if not is_artifact(folder.path):
        return Sampling()
    made_for = read_manifest(folder.path).recipe["sampling"]
    return Sampling(**{**made_for, "call": portable(pipeline_class(folder), made_for.get("call", {}))})


def check_sampling(
    folder: PipelineFolder, asked: Sampling, steps: str = "--steps", guidance: str = "--guidance"
) -> None:
    """Raises UserError where the pipeline cannot sample so; `steps` and `guidance` are what the user knows them by."""
    most = _trained_steps(folder)
    if asked.steps is not None and most is not None and asked.steps > most:
        raise UserError(f"{steps} {asked.steps}: the scheduler of {folder.name} was made for {most} steps at most.")
    if asked.guidance_scale is not None and "guidance_scale" not in call_parameters(pipeline_class(folder)):
        name = folder.index["_class_name"]
        raise UserError(
            f"{guidance} {asked.guidance_scale:g}: {folder.name} is a {name}, which has no guidance. Leave it out."
        )


def check_recipe_fits(source: PipelineFolder, recipe: Recipe) -> None:
    """Raises UserError where the recipe asks for samples that the pipeline cannot make; no weight is read."""
    asked = Sampling(recipe.sampling.steps, recipe.sampling.guidance_scale)
    check_sampling(source, asked, "sampling.steps", "sampling.guidance_scale")
    check_texts(kind(pipeline_class(source)), recipe.record.prompts)
    given_of(pipeline_class(source), recipe)


def _trained_steps(folder: PipelineFolder) -> int | None:
    """Steps that the scheduler was trained with, where it says so."""
    path = folder.path / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    most = folder.settings(path).get("num_train_timesteps")
    return most if isinstance(most, int) else None
