"""Paired runs of two pipelines: same prompts, same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffpress.calibration.conditions import Condition, conditions
from diffpress.calibration.cost import latencies_ms, macs_per_image, median_ratio, parameter_count, peak_memory_bytes
from diffpress.calibration.metrics import psnr_db, ssim
from diffpress.calibration.sampling import Call, Sampling, denoiser_of, sample, watch
from diffpress.calibration.trajectory import Progress
from diffpress.export.folder import PipelineFolder

BATCH = 8
REPEATS = 5
COSTS = ("parameters", "macs_per_image", "latency_ms", "peak_memory_bytes")
"""What `measure_cost` measures."""


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


def compare_pairs(
    reference: Any, candidate: Any, wanted: Sequence[Condition], sampling: Sampling, progress: Progress | None = None
) -> Pairs:
    """Sample both pipelines under `wanted`."""
    groups = [list(wanted[start : start + BATCH]) for start in range(0, len(wanted), BATCH)]
    images: list[list[Tensor]] = [[], []]
    latents: list[list[Tensor]] = [[], []]
    errors: list[Tensor] = []
    for index, group in enumerate(groups):
        outputs = []
        for side, pipeline in enumerate((reference, candidate)):
            result, calls = _watched(pipeline, group, sampling)
            images[side].append(result.images)
            latents[side].append(result.latents)
            outputs.append(calls)
        errors.append(torch.stack([(a - b).square().mean() for a, b in zip(*outputs, strict=True)]))
        if progress is not None:
            progress(index + 1, len(groups))
    first, second = torch.cat(images[0]), torch.cat(images[1])
    return Pairs(
        list(wanted),
        first,
        second,
        psnr_db(second, first).tolist(),
        ssim(second, first),
        float((torch.cat(latents[0]) - torch.cat(latents[1])).square().mean()),
        torch.stack(errors).mean(0).tolist(),
        len(errors[0]),
    )


def _watched(pipeline: Any, group: list[Condition], sampling: Sampling) -> tuple[Any, list[Tensor]]:
    calls: list[Tensor] = []

    def receive(call: Call) -> None:
        output = call.output.float()
        if call.step < len(calls):
            calls[call.step] = output
        else:
            calls.append(output)

    with watch(pipeline, receive):
        return sample(pipeline, group, sampling), calls


def measure_cost(reference: Any, candidate: Any, wanted: Condition, sampling: Sampling) -> dict[str, Any]:
    """Multiplications, time in alternation and memory of one image from each."""
    both = {"reference": reference, "candidate": candidate}
    times = latencies_ms([lambda p=p: sample(p, [wanted], sampling) for p in both.values()], REPEATS)
    medians = [sorted(own)[len(own) // 2] for own in times]
    return {
        "parameters": {name: parameter_count(denoiser_of(p)) for name, p in both.items()},
        "macs_per_image": {name: macs_per_image(p, wanted, sampling) for name, p in both.items()},
        "latency_ms": {
            "reference": medians[0],
            "candidate": medians[1],
            "ratio": median_ratio(times[1], times[0]),
        },
        "peak_memory_bytes": {name: peak_memory_bytes(p, wanted, sampling) for name, p in both.items()},
    }


def sizes(reference: PipelineFolder, candidate: PipelineFolder) -> dict[str, Any]:
    """Bytes of the denoiser's stored tensors and of everything the pipeline needs."""
    both = {"reference": reference, "candidate": candidate}
    return {
        "size_bytes": {name: folder.component_bytes(folder.denoiser) for name, folder in both.items()},
        "total_size_bytes": {name: folder.size_bytes() for name, folder in both.items()},
    }
