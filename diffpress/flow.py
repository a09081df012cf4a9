"""Read this first: load, record, quantize, learn, measure, save, export, in this order (`compress`, then `_make`)."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffpress.calibration.sampling import Sampling, denoiser_of
from diffpress.calibration.trajectory import Trajectories, record
from diffpress.compress.options import Qalora
from diffpress.compress.ptq import quantize_denoiser, quantize_weights
from diffpress.compress.qalora import StudentRollouts, learn_layers_
from diffpress.compress.result import QuantizationResult, edits_and_tensors, plan_rows
from diffpress.export.artifact import (
    check_output,
    check_space,
    is_artifact,
    load,
    load_pipeline,
    publish,
    verify,
    write_pipeline,
)
from diffpress.export.digests import digest
from diffpress.export.errors import ArtifactError, ModelFileError, UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import REPORT, Manifest, list_files, read_manifest, write_manifest

from .estimate import needed_bytes, recorded_bytes, recorded_conditions, rollout_conditions
from .exporting import export_to_onnx
from .gates import check_gates
from .models import resolve
from .order import choose_order, with_order
from .pairs import Pairs, compare_pairs, measure_cost, paired_conditions, sizes
from .recipe import Recipe, load_recipe, parse_recipe
from .report import write_report
from .work import Work, fingerprint, work_folder

logger = logging.getLogger(__name__)

MEASURED = 16
"""Pairs that the report and the gates stand on."""

Notify = Callable[[str, int, int], None]
"""Called with a stage's name (a note may follow it after a comma), how much of it is done and how much there is."""


@dataclass(frozen=True)
class Artifact:
    """An artifact in its place."""

    path: Path
    manifest: Manifest
    cost: dict[str, Any]
    """Time, memory and multiplications beside the original's; empty where the artifact was there already."""
    missed: list[str]
    """The gates that it does not meet."""

    def load(self) -> Any:
        """Its pipeline, after every digest has matched."""
        return load(self.path)


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
    notify: Notify = lambda stage, done, total: None,
) -> Artifact:
    """Run the recipe on `source` and leave an artifact at `out`. A killed run continues when called again.

    Raises UserError where the input is wrong; `out` is then as it was.
    """
    exports = [out.with_name(f"{out.name}-{target}") for target in recipe.export]
    for folder in (out, *exports):
        check_output(folder, force)
    _check_recipe_fits(source, recipe)
    source.check()
    check_space(out, needed_bytes(source))
    request = _request(source, recipe)
    done = None if fresh else _finished(out, request)
    artifact = done or _make(source, recipe, out, request, device, fresh, notify)
    for folder in exports:
        export_to_onnx(PipelineFolder(out, str(out)), folder, notify, force)
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
    source: PipelineFolder, recipe: Recipe, out: Path, request: str, device: str, fresh: bool, notify: Notify
) -> Artifact:
    teacher = load_pipeline(source).to(device)
    check_space(out, needed_bytes(source) + recorded_bytes(teacher, recipe))
    order = choose_order(teacher, recipe)
    with work_folder(out, request, fresh) as work:
        recipe = with_order(recipe, work.settled_order(order))
        trajectories = _record(teacher, recipe, work, notify)
        quantized = _quantize(teacher, source, trajectories, recipe, work, notify)
        manifest = _stage(source, recipe, request, trajectories, quantized, work)
        pairs, cost = _measure(teacher, source, work, recipe, device, notify)
        manifest.metrics = {**pairs.metrics(), **sizes(source, PipelineFolder(work.staged, str(out)))}
        missed = check_gates(recipe.gates, manifest.metrics, cost)
        manifest.metrics["gates_missed"] = missed
        manifest.files = list_files(work.staged)
        write_manifest(work.staged, manifest)
        write_report(work.staged / REPORT, source.name, manifest, pairs, manifest.metrics, cost)
        verify(work.staged)
        notify("save", 0, 1)
        publish(work.staged, out)
        notify("save", 1, 1)
    return Artifact(out, manifest, cost, missed)


def _check_recipe_fits(source: PipelineFolder, recipe: Recipe) -> None:
    for component in _quantized_components(source, recipe):
        if not source.weight_files(component):
            raise UnsupportedModelError(f"quantize.components: {component!r} of {source.name} has no weights.")
    if is_artifact(source.path):
        verify(source.path)
        raise UnsupportedModelError(
            f"{source.name} is an artifact of diffpress already. Compress its original instead."
        )


def _quantized_components(source: PipelineFolder, recipe: Recipe) -> list[str]:
    """Folders of the components that the recipe names, `text_encoders` standing for as many as there are."""
    assert recipe.quantize is not None
    names: dict[str, None] = {}
    for component in recipe.quantize.components:
        found = source.text_encoders if component == "text_encoders" else [source.require(component)]
        names |= dict.fromkeys(found)
    return list(names)


def _request(source: PipelineFolder, recipe: Recipe) -> str:
    wanted = recipe.record.prompts
    prompts = digest(Path(wanted)) if isinstance(wanted, str) and Path(wanted).is_file() else wanted
    return fingerprint(
        {
            "source": source.digests(),
            "recipe": recipe.model_dump(mode="json"),
            "prompts": prompts,
            "versions": _versions(),
        }
    )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("diffpress", "diffusers", "safetensors", "torch", "transformers")}


def _sampling(recipe: Recipe) -> Sampling:
    return Sampling(recipe.sampling.steps, recipe.sampling.guidance_scale)


def _record(teacher: Any, recipe: Recipe, work: Work, notify: Notify) -> Trajectories:
    wanted, sampling = recorded_conditions(teacher, recipe), _sampling(recipe)
    return record(
        teacher, wanted, sampling, work.recorded, recipe.record.batch, lambda done, total: notify("record", done, total)
    )


def _quantize(
    teacher: Any, source: PipelineFolder, trajectories: Trajectories, recipe: Recipe, work: Work, notify: Notify
) -> list[QuantizationResult]:
    """The denoiser by its recorded inputs, other components by their weights alone."""
    assert recipe.quantize is not None
    results = []
    for component in _quantized_components(source, recipe):
        stored = dict(source.tensors(component))
        if component != source.denoiser:
            results.append(quantize_weights(component, getattr(teacher, component), stored, recipe.quantize))
            continue
        found = quantize_denoiser(
            component,
            denoiser_of(teacher),
            stored,
            trajectories,
            recipe.quantize,
            recipe.seed,
            lambda done, total: notify("quantize", done, total),
        )
        if isinstance(recipe.quantize, Qalora):
            _learn_(found, teacher, trajectories, recipe, recipe.quantize, work, notify)
        results.append(found)
    return results


def _learn_(
    found: QuantizationResult,
    teacher: Any,
    trajectories: Trajectories,
    recipe: Recipe,
    options: Qalora,
    work: Work,
    notify: Notify,
) -> None:
    runs = student_rollouts(teacher, recipe, options, work.learned)

    def report(done: int, total: int, loss: float) -> None:
        notify(f"learn, loss {loss:.2e}", done, total)

    learn_layers_(found, denoiser_of(teacher), trajectories, runs, options, recipe.seed, report)


def student_rollouts(pipeline: Any, recipe: Recipe, options: Qalora, folder: Path) -> StudentRollouts:
    """What a student samples while it learns, and what it is evaluated by: the first of its own conditions."""
    own = rollout_conditions(pipeline, recipe)
    validation_images, wanted = own[: options.validation_images], own[options.validation_images :]
    return StudentRollouts(pipeline, wanted, validation_images, _sampling(recipe), folder, recipe.record.batch)


def _stage(
    source: PipelineFolder,
    recipe: Recipe,
    request: str,
    trajectories: Trajectories,
    quantized: list[QuantizationResult],
    work: Work,
) -> Manifest:
    """Write the pipeline files of the artifact, and its manifest without what is measured on them."""
    shutil.rmtree(work.staged, ignore_errors=True)
    work.staged.mkdir()
    edits, plan, tensors = [], [], {}
    for found in quantized:
        own, tensors[found.component] = edits_and_tensors(found)
        edits += own
        plan += plan_rows(found, dict(source.tensors(found.component)), tensors[found.component])
    write_pipeline(work.staged, source, edits, tensors, trajectories.timesteps)
    manifest = Manifest(
        fingerprint=request,
        versions=_versions(),
        recipe=recipe.model_dump(mode="json"),
        source={"model": source.name, "files": source.digests()},
        timesteps=trajectories.timesteps,
        edits=edits,
        plan=plan,
        learning=[row for found in quantized for row in found.history],
        metrics={},
        files={},
    )
    write_manifest(work.staged, manifest)
    return manifest


def _measure(
    teacher: Any, source: PipelineFolder, work: Work, recipe: Recipe, device: str, notify: Notify
) -> tuple[Pairs, dict[str, Any]]:
    """Compare the staged artifact, loaded from disk as a user will, with the original."""
    candidate = load_pipeline(PipelineFolder(work.staged, source.name)).to(device)
    wanted = paired_conditions(teacher, MEASURED, recipe.seed)
    sampling = _sampling(recipe)
    pairs = compare_pairs(teacher, candidate, wanted, sampling, lambda done, total: notify("measure", done, total))
    return pairs, measure_cost(teacher, candidate, wanted[0], sampling)
