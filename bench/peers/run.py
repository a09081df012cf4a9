"""One quantizer on one model: `python bench/peers/run.py PEER --model FOLDER --bits W4A8 --request JSON --out SAFETENSORS`.

Started with the interpreter that `environment.python_for` gives. Leaves the images, their latents and, as metadata `peer`,
what they cost. Exits non-zero with the reason as the last line of standard error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import traceback
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import nn

from diffpress.calibration.cost import latencies_ms, parameter_count
from diffpress.calibration.sampling import denoiser_of, sample

sys.path.insert(0, str(Path(__file__).parent))
from environment import PEERS
from rss import peak_rss_bytes, reset_peak, rss_bytes
from task import QuantizationResult, Request, draw, read_request, record_inputs

REPEATS = 3


def load(folder: Path) -> Any:
    """The float pipeline."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def quantize_(
    pipeline: Any, peer: str, bits: str, request: Request, work: Path
) -> tuple[QuantizationResult, dict[str, Any]]:
    """Give the pipeline the peer's denoiser; returns that, and what it took and gave."""
    module, denoiser = import_module(f"by_{peer}"), denoiser_of(pipeline)
    numbers = parameter_count(denoiser)
    sample(pipeline, request.compare[:1], request.sampling)
    running, start = rss_bytes(), perf_counter()
    reset_peak()
    found = module.quantize(denoiser, bits, lambda: record_inputs(pipeline, request), work)
    seconds, peak = perf_counter() - start, peak_rss_bytes()
    replace_denoiser_(pipeline, found.denoiser)
    return found, {
        "seconds": seconds,
        "peak_bytes": peak - running,
        "peak_rss_bytes": peak,
        "running_rss_bytes": running,
        "denoiser_bytes": found.size_bytes,
        "simulated": found.simulated,
        "quantized_parameters_share": found.parameters / numbers,
    }


def replace_denoiser_(pipeline: Any, denoiser: nn.Module) -> None:
    name = next(name for name, part in pipeline.components.items() if part is denoiser_of(pipeline))
    setattr(pipeline, name, denoiser)


def compare_times(pipeline: Any, plain: Any, request: Request) -> dict[str, float]:
    """Milliseconds of one image from each, taken in alternation."""
    both = (pipeline, plain)
    times = latencies_ms([lambda p=p: sample(p, request.compare[:1], request.sampling) for p in both], REPEATS)
    return {"latency_ms": statistics.median(times[0]), "float_latency_ms": statistics.median(times[1])}


def run(peer: str, model: Path, bits: str, request: Request, out: Path) -> None:
    """Quantize, draw, time and write."""
    pipeline = load(model)
    with TemporaryDirectory() as work:
        found, row = quantize_(pipeline, peer, bits, request, Path(work))
        images = draw(pipeline, request.compare, request)
        if found.compiled:
            found.denoiser.compile()
        row |= compare_times(pipeline, load(model), request)
    versions = ", ".join(f"{name} {version(name)}" for name in PEERS[peer].packages())
    metadata = {"peer": json.dumps({"peer": peer, "version": versions, "bits": bits, **row})}
    save_file({"images": images.images.contiguous(), "latents": images.latents.contiguous()}, out, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", type=Path, required=True, help="folder of a float pipeline")
    parser.add_argument("--bits", required=True)
    parser.add_argument("--request", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        run(arguments.peer, arguments.model, arguments.bits, read_request(arguments.request), arguments.out)
    except Exception as error:
        traceback.print_exc()
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))


if __name__ == "__main__":
    main()
