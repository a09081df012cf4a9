"""`diffpress compare` where one of the two is an export, or both are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffpress.calibration.conditions import Condition, builtin_prompts
from diffpress.calibration.cost import latencies_ms, median_ratio
from diffpress.calibration.sampling import Sample, Sampling, joined, pixels_as_latents, sample
from diffpress.calibration.trajectory import Progress
from diffpress.export.artifact import open_pipeline
from diffpress.export.engines.named import engine_named
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.portable.manifest import EXPORT, ExportManifest, is_export, read_export
from diffpress.export.portable.pipeline import PortablePipeline, schedule_of
from diffpress.export.runtime import Expansion, expand_
from diffpress.kernels.answering import machine_words

from .compare import Comparison
from .defaults import check_sampling, default_sampling
from .measuring import REPEATS, alone
from .models import resolve
from .pairs import BATCH, Side, pairs_of
from .precision import working_dtype
from .running import open_export
from .speed import Speed


class _Model(Protocol):
    """A pipeline or an export, before it is opened."""

    pipeline_class: str

    def sampling(self) -> Sampling:
        """What it was made for."""

    def check(self, sampling: Sampling) -> None:
        """Raises UserError where it cannot sample so."""

    def bytes(self) -> dict[str, int]:
        """Stored sizes, by name of the metric."""

    def open(self, conditions: Sequence[Condition], sampling: Sampling, progress: Progress | None) -> _Opened:
        """Make the images, and have it ready to be timed."""


class _Opened(NamedTuple):
    side: Side
    once: Callable[[], object]
    """Makes the first image again."""
    costs: dict[str, int]
    expansion: Expansion


class _Pipeline:
    def __init__(self, folder: PipelineFolder) -> None:
        self.folder, self.pipeline_class = folder, str(folder.index["_class_name"])

    def sampling(self) -> Sampling:
        return default_sampling(self.folder)

    def check(self, sampling: Sampling) -> None:
        check_sampling(self.folder, Sampling(sampling.steps))

    def bytes(self) -> dict[str, int]:
        denoiser = self.folder.component_bytes(self.folder.denoiser)
        return {"size_bytes": denoiser, "total_size_bytes": self.folder.size_bytes()}

    def open(self, conditions: Sequence[Condition], sampling: Sampling, progress: Progress | None) -> _Opened:
        pipeline = open_pipeline(self.folder, working_dtype(self.folder))
        found = alone(pipeline, conditions, sampling, progress)
        expansion = expand_(pipeline, found.uses)
        costs = {name: found.cost[name] for name in ("parameters", "macs_per_image")}
        return _Opened(found.side, partial(sample, pipeline, conditions[:1], sampling), costs, expansion)


class _Export:
    def __init__(self, folder: Path, engine: str) -> None:
        self.folder, self.manifest = folder, read_export(folder)
        self.engine = engine_named(engine, self.manifest.form)
        self.pipeline_class = self.manifest.pipeline

    def sampling(self) -> Sampling:
        return Sampling(self.manifest.steps, self.manifest.guidance_scale)

    def check(self, sampling: Sampling) -> None:
        schedule_of(self.manifest, sampling.steps or self.manifest.steps)

    def bytes(self) -> dict[str, int]:
        files = self.manifest.files
        denoisers = {graph.data for name, graph in self.manifest.components.items() if name.startswith("denoiser")}
        total = sum(file.size_bytes for file in files.values()) + (self.folder / EXPORT).stat().st_size
        return {"size_bytes": sum(files[name].size_bytes for name in denoisers), "total_size_bytes": total}

    def open(self, conditions: Sequence[Condition], sampling: Sampling, progress: Progress | None) -> _Opened:
        pipeline = open_export(self.folder, self.engine)
        groups = [conditions[start : start + BATCH] for start in range(0, len(conditions), BATCH)]
        made = []
        for index, group in enumerate(groups):
            made.append(_made(pipeline, group, sampling))
            if progress is not None:
                progress(index + 1, len(groups))
        first = conditions[0]
        once = partial(pipeline.generate, first.text, first.seed, sampling.steps, sampling.guidance_scale)
        return _Opened(
            Side(joined([side.made for side in made]), [side.outputs[0] for side in made]),
            once,
            {},
            Expansion({}, {}, frozenset()),
        )


def compare_exports(
    reference: str, candidate: str, engine: str, count: int, steps: int | None, seed: int, progress: Progress
) -> Comparison:
    """Sample both as the candidate was made for, unless `steps` says otherwise, and time both in alternation.

    Raises UserError, before anything is loaded, where one of them cannot sample so.
    """
    models = [
        _Export(Path(name), engine) if is_export(Path(name)) else _Pipeline(resolve(name))
        for name in (reference, candidate)
    ]
    first, second = models
    if first.pipeline_class != second.pipeline_class:
        raise UnsupportedModelError(
            f"{reference} is of a {first.pipeline_class} and {candidate} of a {second.pipeline_class}: only two of one kind "
            "can be compared."
        )
    export = next(model for model in models if isinstance(model, _Export))
    made_for = second.sampling() if second.sampling().steps else export.sampling()
    sampling = Sampling(steps or made_for.steps, made_for.guidance_scale)
    for model in models:
        model.check(sampling)
    texts = _texts(export.manifest)
    conditions = [Condition(texts[place % len(texts)], seed + place) for place in range(count)]
    opened = [model.open(conditions, sampling, _half(progress, place)) for place, model in enumerate(models)]
    return _compared([model.bytes() for model in models], opened, conditions)


def _texts(manifest: ExportManifest) -> list[str]:
    """What the builtin conditions of a pipeline are too."""
    if manifest.tokens is not None:
        return builtin_prompts("compare")
    if manifest.labels is None:
        return [""]
    return [str(number) for number in sorted(set(manifest.labels.names.values())) or range(manifest.labels.count)]


def _made(pipeline: PortablePipeline, group: Sequence[Condition], sampling: Sampling) -> Side:
    """What an export makes of up to BATCH conditions."""
    outputs: list[Tensor] = []
    sample = pipeline.sample(
        [own.text for own in group],
        [own.seed for own in group],
        sampling.steps,
        sampling.guidance_scale,
        lambda output: outputs.append(torch.from_numpy(output)),
    )
    images = torch.from_numpy(pipeline.decode(sample))
    has_decoder = "decoder" in pipeline.manifest.components
    latents = torch.from_numpy(pipeline.latents(sample)) if has_decoder else pixels_as_latents(images)
    return Side(Sample(images.permute(0, 3, 1, 2), latents), [outputs])


def _compared(bytes_of: list[dict[str, int]], opened: list[_Opened], conditions: Sequence[Condition]) -> Comparison:
    first, second = opened
    # A learned variance is no output of a graph.
    channels = min(own.side.outputs[0][0].shape[1] for own in opened)
    sides = [
        own.side._replace(outputs=[[output[:, :channels] for output in calls] for calls in own.side.outputs])
        for own in opened
    ]
    pairs = pairs_of(sides[0], sides[1], conditions)
    times = latencies_ms([own.once for own in opened], REPEATS, warm=True)
    middle = [sorted(own)[len(own) // 2] for own in times]
    latency = {**_both(*middle), "ratio": median_ratio(times[1], times[0])}
    sizes = {name: _both(*(own[name] for own in bytes_of)) for name in bytes_of[0]}
    # Of a graph they are not known.
    costs = {name: _both(*(own.costs[name] for own in opened)) for name in first.costs.keys() & second.costs.keys()}
    speed = Speed(
        latency["ratio"],
        sizes["size_bytes"]["candidate"] < sizes["size_bytes"]["reference"],
        machine_words(),
        second.expansion,
        {},
        "reference",
    )
    return Comparison({**pairs.metrics(), **sizes}, {**costs, "latency_ms": latency}, pairs, speed)


def _both(reference: Any, candidate: Any) -> dict[str, Any]:
    return {"reference": reference, "candidate": candidate}


def _half(progress: Progress, place: int) -> Progress:
    """The progress of one of two."""
    return lambda done, total: progress(place * total + done, 2 * total)
