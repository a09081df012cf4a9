"""Read this first: load, record, the recipe's stages, measure, save, export, in this order (`compress`, then `_make`)."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffpress.calibration.trajectory import Trajectories, record
from diffpress.compress.changes import Changes
from diffpress.compress.plan import plan_rows
from diffpress.compress.stage import Report
from diffpress.export.artifact import Preference, is_artifact, load, load_pipeline, verify, write_pipeline
from diffpress.export.digests import digest
from diffpress.export.errors import ArtifactError, ModelFileError, UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import REPORT, Manifest, list_files, read_manifest, write_manifest
from diffpress.export.outputs import check_output, check_space
from diffpress.export.publishing import publish
from diffpress.export.source import Form

from .calling import given_of
from .defaults import check_recipe_fits
from .estimate import costs_of, disk_bytes, needed_bytes, running_of
from .exporting import export_to
from .gates import check_gates
from .measuring import Measured, measure
from .models import pipeline_class, resolve
from .pairs import paired_conditions, sizes
from .poor import poor_of
from .precision import recipe_dtype, settle_dtype
from .recipe import Recipe, load_recipe, parse_recipe
from .report import write_report
from .speed import Speed, speed_of
from .stages import check_called, component_forms, recorded_conditions, run_stages, sampling_of, stages_of
from .work import Work, computed_by, fingerprint, work_folder

logger = logging.getLogger(__name__)

MEASURED = 16
"""Pairs that the report and the gates stand on."""


@dataclass(frozen=True)
class Artifact:
    """An artifact in its place."""

    path: Path
    manifest: Manifest
    cost: dict[str, Any]
    """Time, memory and multiplications beside the original's; empty where the artifact was there already."""
    missed: list[str]
    """The gates that it does not meet."""
    speed: Speed | None = None
    """How it compares with the original on this machine; None where the artifact was there already."""

    def load(self, prefer: Preference = "speed", device: str | None = None) -> Any:
        """Its pipeline, as `diffpress.load` gives it."""
        return load(self.path, prefer=prefer, device=device)


def compress_by_name(
    model: str | Path,
    recipe: Recipe | str | Path | dict[str, Any],
    out: str | Path | None = None,
    *,
    device: str = "cpu",
    fresh: bool = False,
    force: bool = False,
) -> Artifact:
    """`compress` with everything by name: a model as on the command line; a recipe object, preset, file or its data.

    Where `out` is left out, the artifact is put into the folder `MODEL-compressed` here.
    Raises UserError where the input is wrong.
    """
    if isinstance(recipe, dict):
        recipe = parse_recipe(recipe)
    elif not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    folder = Path(out) if out is not None else Path(f"{Path(str(model).replace(':', '-')).name}-compressed")
    return compress(resolve(str(model)), recipe, folder, device=device, fresh=fresh, force=force)


def compress(
    source: PipelineFolder,
    recipe: Recipe,
    out: Path,
    *,
    device: str = "cpu",
    fresh: bool = False,
    force: bool = False,
    notify: Report = lambda stage, done, total: None,
) -> Artifact:
    """Run the recipe on `source` and leave an artifact at `out`. A killed run continues when called again.

    Raises UserError where the input is wrong; `out` is then as it was.
    """
    out = check_output(out, [source.path], force)
    exports = [out.with_name(f"{out.name}-{target}") for target in recipe.export]
    for folder in exports:
        check_output(folder, [source.path, out], force)
    _refuse_artifact(source)
    check_recipe_fits(source, recipe)
    forms = component_forms(source, recipe)
    source.check()
    check_space(out, needed_bytes(source))
    request = _request(source, recipe, device)
    done = None if fresh else _finished(out, request)
    artifact = done or _make(source, recipe, forms, out, request, device, fresh, notify)
    for folder in exports:
        export_to(PipelineFolder(out, str(out)), "onnx", (), folder, notify, force)
    return artifact


def _finished(out: Path, request: str) -> Artifact | None:
    """The artifact of an earlier, equal request; one that is damaged does not count."""
    try:
        if not is_artifact(out) or read_manifest(out).fingerprint != request:
            return None
        manifest = verify(out)
    except (ArtifactError, ModelFileError) as error:
        logger.warning("made anew: %s", error)
        return None
    return Artifact(out, manifest, {}, manifest.metrics["gates_missed"])


def _make(
    source: PipelineFolder,
    recipe: Recipe,
    forms: Mapping[str, Mapping[str, Form]],
    out: Path,
    request: str,
    device: str,
    fresh: bool,
    notify: Report,
) -> Artifact:
    dtype = recipe_dtype(source, recipe, device)
    original = load_pipeline(source, dtype).to(device)
    running = running_of(original, recipe)
    costs = costs_of(stages_of(source, original, recipe, forms), running)
    check_space(out, disk_bytes(source, recipe, running, costs))
    with work_folder(out, request, fresh) as work:
        if (settled := settle_dtype(work.folder, dtype)) != dtype:
            # Not both at a time.
            del original
            dtype, original = settled, load_pipeline(source, settled).to(device)
        trajectories = _record(original, recipe, work, notify)
        check_called(source, forms, trajectories)
        stages = stages_of(source, original, recipe, forms, work.recorded)
        changes = run_stages(stages, work, notify)
        manifest = _stage(source, recipe, request, forms, changes, trajectories, work)
        # Measuring loads as many pipelines as fit.
        del original, stages
        measured = _measure(source, work, recipe, dtype, device, notify)
        pairs, cost = measured.pairs, measured.cost
        manifest.layers = dict(sorted(measured.uses.items()))
        manifest.metrics = {**pairs.metrics(), **sizes(source, PipelineFolder(work.staged, str(out)))}
        missed = check_gates(recipe.gates, manifest.metrics, cost)
        manifest.metrics["gates_missed"] = missed
        manifest.files = list_files(work.staged)
        write_manifest(work.staged, manifest)
        speed = speed_of(measured, manifest.metrics)
        write_report(work.staged / REPORT, source.name, manifest, pairs, manifest.metrics, cost, speed)
        verify(work.staged)
        if (poor := poor_of(manifest, manifest.metrics)) is not None:
            logger.warning("%s", poor.sentence())
        if speed.told_before_saving():
            logger.warning("%s", speed.headline())
        notify("save", 0, 1)
        publish(work.staged, out)
        notify("save", 1, 1)
    return Artifact(out, manifest, cost, missed, speed)


def _refuse_artifact(source: PipelineFolder) -> None:
    if is_artifact(source.path):
        verify(source.path)
        raise UnsupportedModelError(
            f"{source.name} is an artifact of diffpress already. Compress its original instead."
        )


def _request(source: PipelineFolder, recipe: Recipe, device: str) -> str:
    wanted = recipe.record.prompts
    prompts = digest(Path(wanted)) if isinstance(wanted, str) and Path(wanted).is_file() else wanted
    return fingerprint(
        {
            "source": source.digests(),
            "recipe": recipe.model_dump(mode="json"),
            "prompts": prompts,
            "given": asdict(given_of(pipeline_class(source), recipe)),
            "versions": _versions(),
            "computed": computed_by(device),
        }
    )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("diffpress", "diffusers", "safetensors", "torch", "transformers")}


def _record(teacher: Any, recipe: Recipe, work: Work, notify: Report) -> Trajectories:
    wanted, sampling = recorded_conditions(teacher, recipe), sampling_of(teacher, recipe)
    return record(
        teacher, wanted, sampling, work.recorded, recipe.record.batch, lambda done, total: notify("record", done, total)
    )


def _stage(
    source: PipelineFolder,
    recipe: Recipe,
    request: str,
    forms: Mapping[str, Mapping[str, Form]],
    changes: Mapping[str, Changes],
    trajectories: Trajectories,
    work: Work,
) -> Manifest:
    """Write the pipeline files of the artifact, and its manifest without what is measured on them."""
    shutil.rmtree(work.staged, ignore_errors=True)
    work.staged.mkdir()
    edits = [edit for own in changes.values() for edit in own.edits]
    tensors = {component: own.tensors for component, own in changes.items()}
    parts = {part: trajectories.of(part).timesteps for part in trajectories.parts}
    timesteps = [time for part in trajectories.answering for time in parts[part]]
    parts = parts if len(parts) > 1 else {}
    write_pipeline(work.staged, source, edits, tensors, timesteps, parts)
    manifest = Manifest(
        fingerprint=request,
        versions=_versions(),
        recipe=_settled(recipe, changes),
        source={"model": source.name, "files": source.digests()},
        timesteps=timesteps,
        parts=parts,
        edits=edits,
        plan=[row for name, own in changes.items() for row in plan_rows(name, forms[name], own)],
        learning=[row for own in changes.values() for row in own.history],
        metrics={},
        files={},
    )
    write_manifest(work.staged, manifest)
    return manifest


def _settled(recipe: Recipe, changes: Mapping[str, Changes]) -> dict[str, Any]:
    """The recipe with what methods chose where it leaves something open."""
    data = recipe.model_dump(mode="json")
    for own in changes.values():
        for path, value in own.settled.items():
            section, key = path.split(".")
            data[section][key] = value
    return data


def _measure(
    source: PipelineFolder, work: Work, recipe: Recipe, dtype: torch.dtype, device: str, notify: Report
) -> Measured:
    """Compare the staged artifact, loaded from disk as a user will, with the original."""
    folders = (source, PipelineFolder(work.staged, source.name))
    original, candidate = (lambda folder=folder: load_pipeline(folder, dtype).to(device) for folder in folders)
    return measure(
        original,
        candidate,
        lambda pipeline: paired_conditions(pipeline, MEASURED, recipe.seed, given_of(pipeline, recipe)),
        sampling_of(pipeline_class(source), recipe),
        lambda done, total: notify("measure", done, total),
    )
