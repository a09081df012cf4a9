"""Paired runs of two pipelines: same prompts, same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpress.calibration.calls import OutputKind
from diffpress.calibration.conditions import Condition, conditions
from diffpress.calibration.given import NOTHING_GIVEN, Given
from diffpress.calibration.made import picture_of
from diffpress.calibration.media import StandIn
from diffpress.calibration.metrics import MEASURES, quality
from diffpress.calibration.sampling import Call, Sample, Sampling, groups_of, joined, sample, watch
from diffpress.calibration.schedulers import watch_guided
from diffpress.calibration.trajectory import Progress
from diffpress.export.folder import PipelineFolder

BATCH = 8
COSTS = ("parameters", "macs_per_image", "latency_ms", "peak_memory_bytes", "speed")
"""What is not measured again of an artifact that was there already."""


@dataclass(frozen=True)
class Pairs:
    """What `count` paired runs gave; N pairs, S steps."""

    conditions: list[Condition]
    reference: Tensor
    """[N, C, H, W] in 0..1: images, or pictures of what is none."""
    candidate: Tensor
    psnr_db: list[float]
    ssim: float
    latent_mse: float
    step_error: list[float]
    """[S] mean squared difference of the denoiser's outputs at each step, each pipeline on its own trajectory."""
    steps: int
    kind: OutputKind = "image"
    """Of what was made."""
    more: dict[str, float] = field(default_factory=dict)
    """Measures that only this kind has."""

    def drawn(self) -> list[str]:
        """Arguments that drawings stood in for."""
        return sorted({name for own in self.conditions for name, value in own.arguments.items() if _is_drawn(value)})

    def metrics(self) -> dict[str, Any]:
        """The figures that depend on seeds alone."""
        return {
            "count": len(self.conditions),
            "steps": self.steps,
            "psnr_db": sum(self.psnr_db) / len(self.psnr_db),
            "ssim": self.ssim,
            "latent_mse": self.latent_mse,
            **self.more,
            "measured_on": MEASURES[self.kind],
            "drawn_arguments": self.drawn(),
        }


def _is_drawn(value: Any) -> bool:
    return isinstance(value, StandIn)


def paired_conditions(pipeline: Any, count: int, seed: int, given: Given = NOTHING_GIVEN) -> list[Condition]:
    """Prompts and drawings kept apart from those that are recorded, noise likewise; calls that are `given` serve again."""
    return conditions(pipeline, "builtin", count, seed, "compare", given)


class Side(NamedTuple):
    """What one pipeline made of N conditions."""

    made: Sample
    outputs: list[list[Tensor]]
    """Of the denoiser in float32, for every batch and step."""


def sample_side(
    pipeline: Any, conditions: Sequence[Condition], sampling: Sampling, progress: Progress | None = None
) -> Side:
    """Sample one of two pipelines under `conditions`; what it made is kept in main memory."""
    groups = groups_of(pipeline, conditions, sampling, BATCH)
    made, outputs = [], []
    for index, group in enumerate(groups):
        result, calls = _watched(pipeline, group, sampling)
        made.append(result)
        outputs.append(calls)
        if progress is not None:
            progress(index + 1, len(groups))
    return Side(joined(made), outputs)


def pairs_of(reference: Side, candidate: Side, conditions: Sequence[Condition]) -> Pairs:
    """What both made of the same conditions."""
    errors = [
        [float((a - b).square().mean()) for a, b in zip(first, second, strict=True)]
        for first, second in zip(reference.outputs, candidate.outputs, strict=True)
    ]
    first, second = reference.made, candidate.made
    found = quality(first.kind, second.images, first.images)
    # Calls may differ in their numbers of steps, as by `strength`.
    per_step = [fmean(error for error in own if error is not None) for own in zip_longest(*errors)]
    return Pairs(
        list(conditions),
        _pictures(first),
        _pictures(second),
        found.psnr_db,
        found.ssim,
        float((first.latents - second.latents).square().mean()),
        per_step,
        len(per_step),
        first.kind,
        found.more,
    )


def _pictures(made: Sample) -> Tensor:
    if made.kind == "image" and made.images.shape[1] in (1, 3):
        return made.images
    return torch.stack([picture_of(made.kind, own) for own in made.images])


def compare_pairs(reference: Any, candidate: Any, conditions: Sequence[Condition], sampling: Sampling) -> Pairs:
    """Sample both pipelines under `conditions`."""
    return pairs_of(
        sample_side(reference, conditions, sampling), sample_side(candidate, conditions, sampling), conditions
    )


def _watched(pipeline: Any, group: list[Condition], sampling: Sampling) -> tuple[Sample, list[Tensor]]:
    calls: dict[tuple[str, int], Tensor] = {}
    taken: set[tuple[str, int]] = set()

    def receive(call: Call) -> None:
        calls.pop(place := (call.part, call.step), None)
        calls[place] = call.output.float().cpu()

    with watch(pipeline, receive), watch_guided(pipeline, lambda _: taken.update(list(calls)[-1:])):
        result = sample(pipeline, group, sampling)
    # What a part answers that steers another, as a ControlNet does, no scheduler is given.
    outputs = [output for place, output in calls.items() if not taken or place in taken]
    return result._replace(latents=result.latents.cpu()), outputs


def sizes(reference: PipelineFolder, candidate: PipelineFolder) -> dict[str, Any]:
    """Bytes of the denoisers' stored tensors and of everything the pipeline needs."""
    both = {"reference": reference, "candidate": candidate}
    return {
        "size_bytes": {name: sum(map(folder.component_bytes, folder.denoisers)) for name, folder in both.items()},
        "total_size_bytes": {name: folder.size_bytes() for name, folder in both.items()},
    }
