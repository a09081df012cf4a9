"""One of our own rows of `bench/quantize.py`, with the same arguments and answers as `bench/peers/run.py`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffpress.calibration.observe import layer_matrix, observe_inputs
from diffpress.calibration.sampling import denoiser_of, sample
from diffpress.calibration.trajectory import Trajectories, record
from diffpress.compress.data_flow import edge_layers
from diffpress.compress.layers import HIGH_BITS, choose_formats, find_layers, weights_only
from diffpress.compress.options import Qalora, Rounding
from diffpress.compress.plan import plan_rows
from diffpress.compress.ptq import quantize_denoiser
from diffpress.compress.qalora import learn_layers_
from diffpress.compress.qalora.layer import ALL, QaloraLayer
from diffpress.compress.qalora.method import student_rollouts
from diffpress.compress.quantized_layer import QuantizedLayer, fake_quantized
from diffpress.compress.result import QuantizationResult, changes_of
from diffpress.compress.stage import Subject
from diffpress.export.artifact import open_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.export.runtime import StepClock
from diffpress.export.source import forms_of, source_tensors
from diffpress.kernels import code_range, quantize
from diffpress.models import resolve
from diffpress.recipe import parse_recipe
from diffpress.stages import recorded_conditions, rollout_conditions

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))
from rss import peak_rss_bytes, reset_peak, rss_bytes
from task import Request, draw, read_request

TRAJECTORIES = 256
"""Runs that learning records; ptq and the rest look at as many as a peer."""
SPARE_BITS = 0.5
"""What sensitive layers may take on average where weights have few bits, as in the presets, unless a row says otherwise."""
FLOAT_INPUTS = 0.05
"""Share of the multiplications that are of inputs in float where all have eight bits, as in the preset."""
WIDTHS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W2A8": (2, 8), "w4": (4, "none")}
LEARNED: dict[str, dict[str, Any]] = {
    "qalora": {},
    "qat": {},
    "lora": {"scale_aware": False, "per_step": False, "rollout_share": 0},
    "lora-scale-aware": {"per_step": False, "rollout_share": 0},
    "lora-per-step": {"rollout_share": 0},
}
"""What each learned row changes of the defaults."""


class FullWeightLayer(QaloraLayer):
    """Quantization-aware training of whole weights: the change of a weight is no product but a matrix of its own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.b = nn.Parameter(torch.zeros(len(self.b), self.a.shape[1]))
        del self.a

    def lora_delta(self, rows: slice = ALL) -> Tensor:
        return self.b[rows] * self.lora_scale


def quantized(
    row: str,
    pipeline: Any,
    source: PipelineFolder,
    bits: str,
    request: Request,
    iterations: int,
    spare_bits: float,
    work: Path,
) -> QuantizationResult:
    """What the method of this row makes of the denoiser."""
    weights, activations = WIDTHS[bits]
    common: dict[str, Any] = {"weights": weights, "activations": activations}
    if weights < HIGH_BITS and activations != "none":
        common["effective_bits"] = weights + spare_bits
    if (weights, activations) == (HIGH_BITS, HIGH_BITS):
        common["float_activations"] = FLOAT_INPUTS
    learned = row in LEARNED
    method = {"method": "qalora", "iterations": iterations, **LEARNED[row]} if learned else {"method": "ptq"}
    recipe = parse_recipe(
        {
            "sampling": {"steps": request.sampling.steps, "guidance_scale": request.sampling.guidance_scale},
            "record": {"trajectories": TRAJECTORIES if learned else len(request.record), "batch": request.batch},
            "quantize": {**common, **method},
        }
    )
    trajectories = record(
        pipeline, recorded_conditions(pipeline, recipe), request.sampling, work / "recorded", request.batch
    )
    denoiser, options = denoiser_of(pipeline), recipe.quantize
    forms = forms_of(source_tensors(source, source.denoiser))
    assert options is not None
    if row == "nearest":
        return nearest(source.denoiser, denoiser, trajectories, options)
    found = quantize_denoiser(source.denoiser, denoiser, forms, trajectories, options, recipe.seed)
    if isinstance(options, Qalora):
        subject = Subject(
            pipeline,
            source.denoiser,
            forms,
            trajectories,
            request.sampling,
            partial(rollout_conditions, pipeline, recipe),
            request.batch,
            recipe.seed,
        )
        runs = student_rollouts(subject, options, work / "learned")
        layer_type = FullWeightLayer if row == "qat" else QaloraLayer
        learn_layers_(found, denoiser, trajectories, runs, options, recipe.seed, layer_type=layer_type)
    return found


def nearest(component: str, denoiser: nn.Module, trajectories: Trajectories, options: Rounding) -> QuantizationResult:
    """Round to nearest between the smallest and the largest value seen: what needs no search and no training."""
    layers, _ = find_layers(denoiser, options)
    layers = {name: layer for name, layer in layers.items() if not isinstance(layer, nn.Embedding)}
    seen = observe_inputs(denoiser, layers, trajectories, 0)
    edges = edge_layers(denoiser, next(trajectories.calls()))
    formats, _ = choose_formats(layers, seen, edges, options)
    steps = len(trajectories.timesteps)
    found = QuantizationResult(component)
    for name, layer in layers.items():
        format, weight = formats[name], layer_matrix(layer)
        if format.group_size is not None:
            format = weights_only(layer, format.weight_bits)
        scale = weight.abs().amax((1, 2)).clamp(min=1e-8) / code_range(format.weight_bits)[1]
        codes = quantize(weight, scale[:, None, None], format.weight_bits).view(layer.weight.shape)
        own = QuantizedLayer(format, codes, scale[:, None] if format.group_size else scale)
        if format.activation_bits is not None:
            low, high = code_range(format.activation_bits)
            step = (seen[name].high.max() - seen[name].low.min()).clamp(min=1e-8) / (high - low)
            zero_point = (low - seen[name].low.min() / step).round().clamp(low, high)
            own = replace(own, activation_scale=step.expand(steps), zero_point=zero_point.expand(steps))
        found.layers[name] = own
    return found


def stored_bytes(found: QuantizationResult, source: PipelineFolder) -> int:
    """Bytes of the denoiser's tensors once `found` is stored."""
    forms = forms_of(source_tensors(source, source.denoiser))
    return sum(row.bytes for row in plan_rows(source.denoiser, forms, changes_of(found, forms)))


def run(row: str, model: str, bits: str, request: Request, iterations: int, spare_bits: float, out: Path) -> None:
    """Quantize, draw and write."""
    source = resolve(model)
    pipeline = open_pipeline(source)
    sample(pipeline, request.compare[:1], request.sampling)
    running, start = rss_bytes(), perf_counter()
    reset_peak()
    figures: dict[str, Any] = {"denoiser_bytes": source.component_bytes(source.denoiser)}
    overlay: AbstractContextManager[None] = nullcontext()
    if row != "teacher":
        with TemporaryDirectory() as work:
            found = quantized(row, pipeline, source, bits, request, iterations, spare_bits, Path(work))
            timesteps = Trajectories(Path(work) / "recorded").timesteps
        figures = {
            "seconds": perf_counter() - start,
            "peak_bytes": peak_rss_bytes() - running,
            "peak_rss_bytes": peak_rss_bytes(),
            "running_rss_bytes": running,
            "denoiser_bytes": stored_bytes(found, source),
            "learning": found.history,
        }
        overlay = fake_quantized(denoiser_of(pipeline), found.layers, StepClock(timesteps))
    with overlay:
        images = draw(pipeline, request.compare, request)
    metadata = {"peer": json.dumps({"peer": f"diffpress {row}", "bits": bits, **figures})}
    save_file({"images": images.images.contiguous(), "latents": images.latents.contiguous()}, out, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", choices=["teacher", "nearest", "ptq", *LEARNED])
    parser.add_argument("--model", required=True)
    parser.add_argument("--bits", required=True)
    parser.add_argument("--request", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=1200)
    parser.add_argument("--spare-bits", type=float, default=SPARE_BITS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    run(
        arguments.row,
        arguments.model,
        arguments.bits,
        read_request(arguments.request),
        arguments.iterations,
        arguments.spare_bits,
        arguments.out,
    )


if __name__ == "__main__":
    main()
