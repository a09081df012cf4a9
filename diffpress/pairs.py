"""Paired runs of two pipelines: same prompts, same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpress.calibration.conditions import Condition, conditions
from diffpress.calibration.metrics import psnr_db, ssim
from diffpress.calibration.sampling import Call, Sample, Sampling, sample, watch, watch_guided
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
    """[N, C, H, W] in 0..1"""
    candidate: Tensor
    psnr_db: list[float]
    ssim: float
    latent_mse: float
    step_error: list[float]
    """[S] mean squared difference of the denoiser's outputs at each step, each pipeline on its own trajectory."""
    steps: int

    def metrics(self) -> dict[str, float | int]:
        """The figures that depend on seeds alone."""
        return {
            "count": len(self.conditions),
            "steps": self.steps,
            "psnr_db": sum(self.psnr_db) / len(self.psnr_db),
            "ssim": self.ssim,
            "latent_mse": self.latent_mse,
        }


def paired_conditions(pipeline: Any, count: int, seed: int) -> list[Condition]:
    """Prompts kept apart from those that are recorded, noise likewise."""
    return conditions(pipeline, "builtin", count, seed, "compare")


class Side(NamedTuple):
    """What one pipeline made of N conditions."""

    images: Tensor
    """[N, C, H, W] in 0..1"""
    latents: Tensor
    outputs: list[list[Tensor]]
    """Of the denoiser in float32, for every batch and step."""


def sample_side(
    pipeline: Any, conditions: Sequence[Condition], sampling: Sampling, progress: Progress | None = None
) -> Side:
    """Sample one of two pipelines under `conditions`; what it made is kept in main memory."""
    groups = [list(conditions[start : start + BATCH]) for start in range(0, len(conditions), BATCH)]
    made, outputs = [], []
    for index, group in enumerate(groups):
        result, calls = _watched(pipeline, group, sampling)
        made.append(result)
        outputs.append(calls)
        if progress is not None:
            progress(index + 1, len(groups))
    return Side(torch.cat([own.images for own in made]), torch.cat([own.latents for own in made]), outputs)


def pairs_of(reference: Side, candidate: Side, conditions: Sequence[Condition]) -> Pairs:
    """What both made of the same conditions."""
    errors = torch.stack(
        [
            torch.stack([(a - b).square().mean() for a, b in zip(first, second, strict=True)])
            for first, second in zip(reference.outputs, candidate.outputs, strict=True)
        ]
    )
    return Pairs(
        list(conditions),
        reference.images,
        candidate.images,
        psnr_db(candidate.images, reference.images).tolist(),
        ssim(candidate.images, reference.images),
        float((reference.latents - candidate.latents).square().mean()),
        errors.mean(0).tolist(),
        errors.shape[1],
    )


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

    with watch(pipeline, receive), watch_guided(pipeline, lambda _: taken.add(next(reversed(calls)))):
        result = sample(pipeline, group, sampling)
    # What a part answers that steers another, as a ControlNet does, no scheduler is given.
    outputs = [output for place, output in calls.items() if not taken or place in taken]
    return Sample(result.images, result.latents.cpu()), outputs


def sizes(reference: PipelineFolder, candidate: PipelineFolder) -> dict[str, Any]:
    """Bytes of the denoisers' stored tensors and of everything the pipeline needs."""
    both = {"reference": reference, "candidate": candidate}
    return {
        "size_bytes": {name: sum(map(folder.component_bytes, folder.denoisers)) for name, folder in both.items()},
        "total_size_bytes": {name: folder.size_bytes() for name, folder in both.items()},
    }
