"""Two pipelines side by side: same prompts, same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpress.calibration.conditions import Condition, conditions
from diffpress.calibration.cost import latencies_ms, macs_per_image, median_ratio, parameter_count, peak_memory_bytes
from diffpress.calibration.metrics import psnr_db, ssim
from diffpress.calibration.sampling import Call, Sampling, denoiser_of, sample, watch
from diffpress.calibration.trajectory import Progress
from diffpress.export.artifact import is_artifact
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import read_manifest

from .models import resolve
from .opening import default_sampling, open_pipeline

BATCH = 8
REPEATS = 5


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


def check_comparable(reference: PipelineFolder, candidate: PipelineFolder) -> None:
    """Raises UnsupportedModelError where the two are not the same kind of pipeline."""
    kinds = [str(folder.index["_class_name"]) for folder in (reference, candidate)]
    if kinds[0] != kinds[1]:
        raise UnsupportedModelError(
            f"{reference.name} is a {kinds[0]} and {candidate.name} a {kinds[1]}: only two of one kind can be compared."
        )


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
    """Multiplications, time in alternation and memory of one picture from each."""
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


def compare(
    reference: PipelineFolder,
    candidate: PipelineFolder,
    count: int,
    sampling: Sampling,
    seed: int,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, Any], Pairs]:
    """Metrics that depend on seeds alone, what a picture costs, and the pairs behind them."""
    check_comparable(reference, candidate)
    first, second = open_pipeline(reference), open_pipeline(candidate)
    wanted = paired_conditions(first, count, seed)
    pairs = compare_pairs(first, second, wanted, sampling, progress)
    metrics = {**pairs.metrics(), **sizes(reference, candidate)}
    return metrics, measure_cost(first, second, wanted[0], sampling), pairs


def compare_by_name(
    reference: str,
    candidate: str,
    count: int,
    steps: int | None,
    seed: int,
    report: Path | None,
    notify: Callable[[str, int, int], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`diffpress compare`: sampled as the candidate was made for, unless `steps` says otherwise."""
    first, second = resolve(reference), resolve(candidate)
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
    made_for = default_sampling(second)
    sampling = Sampling(steps or made_for.steps, made_for.guidance_scale)
    metrics, cost, pairs = compare(first, second, count, sampling, seed, lambda d, t: notify("compare", d, t))
    if report is not None:
        from .report import write_report  # the report shows pairs, so it imports this file

        manifest = read_manifest(second.path) if is_artifact(second.path) else None
        write_report(report, f"{reference} and {candidate}", manifest, pairs, metrics, cost)
    return metrics, cost
