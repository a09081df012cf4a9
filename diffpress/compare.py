"""`diffpress compare`: two pipelines side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffpress.calibration.given import NOTHING_GIVEN, Given
from diffpress.calibration.sampling import Sampling
from diffpress.calibration.trajectory import Progress
from diffpress.export.artifact import is_artifact, open_pipeline
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import read_manifest
from diffpress.export.outputs import check_output_file
from diffpress.export.portable.manifest import is_export
from diffpress.export.publishing import replacing

from .calling import NO_OPTIONS, Options
from .defaults import check_sampling, default_sampling
from .measuring import measure
from .models import pipeline_class, resolve
from .pairs import Pairs, paired_conditions, sizes
from .precision import working_dtype
from .report import write_report
from .speed import Speed, speed_of


def check_comparable(reference: PipelineFolder, candidate: PipelineFolder) -> None:
    """Raises UnsupportedModelError where the two are not the same kind of pipeline."""
    kinds = [str(folder.index["_class_name"]) for folder in (reference, candidate)]
    if kinds[0] != kinds[1]:
        raise UnsupportedModelError(
            f"{reference.name} is a {kinds[0]} and {candidate.name} a {kinds[1]}: only two of one kind can be compared."
        )


@dataclass(frozen=True)
class Comparison:
    """Two pipelines side by side."""

    metrics: dict[str, Any]
    """Of pairs, which depend on seeds alone, and sizes."""
    cost: dict[str, Any]
    """What an image costs."""
    pairs: Pairs
    speed: Speed


def compare(
    reference: PipelineFolder,
    candidate: PipelineFolder,
    count: int,
    sampling: Sampling,
    seed: int,
    given: Given = NOTHING_GIVEN,
    progress: Progress | None = None,
) -> Comparison:
    """Sample and time both."""
    check_comparable(reference, candidate)
    dtype = working_dtype(reference)
    first, second = (partial(open_pipeline, folder, dtype) for folder in (reference, candidate))
    measured = measure(
        first, second, lambda pipeline: paired_conditions(pipeline, count, seed, given), sampling, progress
    )
    metrics = {**measured.pairs.metrics(), **sizes(reference, candidate)}
    return Comparison(metrics, measured.cost, measured.pairs, speed_of(measured, metrics, "reference"))


def compare_by_name(
    reference: str,
    candidate: str,
    engine: str,
    count: int,
    steps: int | None,
    seed: int,
    report: Path | None,
    notify: Callable[[str, int, int], None],
    options: Options = NO_OPTIONS,
) -> Comparison:
    """`diffpress compare`: sampled as the candidate was made for, unless `steps` or `options` say otherwise; exports run in
    `engine`.
    """
    progress = partial(notify, "compare")
    paths = [Path(name) if is_export(Path(name)) else resolve(name).path for name in (reference, candidate)]
    if report is not None:
        check_output_file(report, paths, "--report")
    if any(map(is_export, paths)):
        from .compare_exports import compare_exports

        options.refuse(f"{reference} beside {candidate}")
        steps = steps or options.sampling.steps
        found = compare_exports(reference, candidate, engine, count, steps, seed, progress)
    else:
        found = _compare_pipelines(resolve(reference), resolve(candidate), count, steps, seed, options, progress)
    if report is not None:
        manifest = read_manifest(paths[1]) if is_artifact(paths[1]) else None
        with replacing(report) as file:
            title = f"{reference} and {candidate}"
            write_report(file, title, manifest, found.pairs, found.metrics, found.cost, found.speed)
    return found


def _compare_pipelines(
    first: PipelineFolder,
    second: PipelineFolder,
    count: int,
    steps: int | None,
    seed: int,
    options: Options,
    progress: Progress,
) -> Comparison:
    check_comparable(first, second)
    made_for, asked = default_sampling(second), options.sampling
    for folder in (first, second):
        check_sampling(folder, Sampling(steps or asked.steps, asked.guidance_scale))
    given = options.given(pipeline_class(second), made_for.call, drawn=True)
    guidance = made_for.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
    sampling = Sampling(steps or asked.steps or made_for.steps, guidance, given.shared)
    return compare(first, second, count, sampling, seed, given, progress)
