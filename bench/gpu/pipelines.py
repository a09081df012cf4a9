"""Shipped pipelines compressed on a GPU, and what comes of them there and on the CPU: `python bench/gpu/pipelines.py DIR`.

A part of `gpu.sh`; it takes diffusers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from rows import Row, main

CLI = "from diffpress.cli import main; main()"
MADE = (
    ("zoo:digits", "balanced"),
    ("zoo:emoji", "balanced-fast"),
    ("zoo:digits-unet", "w4"),
    ("zoo:digits", "balanced-faster"),
    ("zoo:emoji", "small"),
)
"""Pipelines and presets: transformers and UNets, integers, few bits, step plans."""
IMAGES = 4
INDEPENDENT = 2
"""Times what compressing lost by which two devices may differ: codes at an edge fall to either side, and after some layers the
errors of both have nothing to do with each other, so that their squares add up."""
CLOSE = 1e-5
"""Relative error of one layer, given the same inputs: some hundred roundings of float32."""


def measure(
    name: str, preset: str, seed: int, device: str = "cuda", options: Sequence[str] = (), count: int = IMAGES
) -> dict[str, Any]:
    """One row: what compressing on the GPU cost, and how far its images lie from those of the CPU."""
    if find_spec("diffusers") is None:
        return {"skipped": "diffusers is not installed here"}
    with TemporaryDirectory() as folder:
        out = Path(folder) / "artifact"
        command = ["compress", name, "--recipe", preset, "--out", str(out), "--device", device, "--json", *options]
        start = perf_counter()
        # Times of layers that are taken here are not the user's.
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        done = subprocess.run(
            [sys.executable, "-c", CLI, *command], capture_output=True, text=True, check=False, env=environment
        )
        took = perf_counter() - start
        if done.returncode:
            return {"error": " ".join(done.stderr.split())[-2000:]}
        said = json.loads(done.stdout)
        kept = ("psnr_db", "latent_mse", "latency_ms", "speed")
        found = {"compress_seconds": took, **{name: said.get(name) for name in kept}}
        return {**found, **_places(out, seed, device, count)}


def _places(artifact: Path, seed: int, device: str, count: int) -> dict[str, Any]:
    """The packed artifact on the GPU and on the CPU, as a whole with the same conditions and noise, and layer by layer."""
    pairs, defaults = import_module("diffpress.pairs"), import_module("diffpress.defaults")
    models, diffpress = import_module("diffpress.models"), import_module("diffpress")
    sampling = defaults.default_sampling(models.resolve(str(artifact)))
    on_cpu, on_gpu = (diffpress.load(artifact, prefer="memory") for _ in range(2))
    on_gpu.to(device)
    conditions = pairs.paired_conditions(on_cpu, count, seed)
    between = pairs.compare_pairs(on_cpu, on_gpu, conditions, sampling).metrics()
    with layer_errors(on_cpu, on_gpu, device) as errors:
        pairs.compare_pairs(on_cpu, on_cpu, conditions[:1], sampling)
    source = json.loads((artifact / "diffpress.json").read_text())["metrics"]["latent_mse"]
    passed = between["latent_mse"] <= INDEPENDENT * source and max(errors, default=inf) <= CLOSE
    return {
        "db_from_cpu": between["psnr_db"],
        "latent_mse_from_cpu": between["latent_mse"],
        "largest_layer_error": max(errors, default=None),
        "passed": passed,
    }


@contextmanager
def layer_errors(on_cpu: Any, on_gpu: Any, device: str) -> Iterator[list[float]]:
    """While it lasts: the relative error of every call of a packed layer on the GPU, given what the CPU's is given."""
    runtime, denoiser_of = (
        import_module("diffpress.export.runtime"),
        import_module("diffpress.calibration.sampling").denoiser_of,
    )
    twins, errors = dict(denoiser_of(on_gpu).named_modules()), list[float]()

    def compare(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        twin = twins[name]
        if twin.clock is not None:
            twin.clock.weights = layer.clock.weights.to(device)
        there = twin(*(x.to(device) for x in inputs)).cpu()
        errors.append(((there - output).norm() / output.norm().clamp(min=1e-30)).item())

    layers = [
        (name, layer) for name, layer in denoiser_of(on_cpu).named_modules() if isinstance(layer, runtime.PackedLayer)
    ]
    handles = [layer.register_forward_hook(partial(compare, name)) for name, layer in layers]
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()


def rows(seed: int) -> Iterator[Row]:
    """All there are; products of float32 are to be those of the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name, preset in MADE:
        yield Row({"model": name, "form": preset}, partial(measure, name, preset, seed))


if __name__ == "__main__":
    raise SystemExit(main(__doc__, "pipelines.json", rows, lambda row: row.get("passed", "skipped" in row)))
