"""`diffpress bench`: what an image takes on this machine, in each way that a model can run here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffpress.calibration.conditions import Condition
from diffpress.calibration.cost import latencies_ms, median_ratio
from diffpress.calibration.sampling import Sampling, sample
from diffpress.export.artifact import is_artifact, load, load_pipeline
from diffpress.export.engines.named import engine_named
from diffpress.export.errors import UserError
from diffpress.export.portable.manifest import is_export, read_export
from diffpress.export.portable.pipeline import schedule_of
from diffpress.export.runtime.expansion import layers_of
from diffpress.kernels.answering import machine_words

from .defaults import check_sampling, default_sampling
from .models import resolve
from .pairs import paired_conditions
from .precision import working_dtype
from .running import open_export

ENGINES = {"onnx": "onnxruntime", "openvino": "openvino"}
"""What runs exports, and the package that has to be installed."""
PACKED, LOADED = "all layers packed", "as diffpress.load leaves it"
Ways = Mapping[str, Callable[[], object]]
"""What makes one image, by its name."""


@dataclass(frozen=True)
class Timed:
    """One way to run a model."""

    way: str
    image_ms: float
    ratio: float
    """Of the first way's time, the median over turns."""

    def row(self) -> tuple[str, ...]:
        """For a table."""
        return self.way, f"{self.image_ms:,.1f}", f"{self.ratio:.2f}"


def bench(
    model: str, engines: Sequence[str], steps: int | None, seed: int, repeats: int, device: str | None
) -> dict[str, Any]:
    """Times of an image of `model`, a pipeline, an artifact or an export, taken in alternation after one that is not timed.

    Exports run in `engines`, those that are installed if none is named; all else on `device`. Raises UserError before anything
    is loaded where the model cannot run so.
    """
    path = Path(model)
    if not is_export(path):
        if engines:
            raise UserError(f"--engine {engines[0]}: {model} is no export, and runs in torch. Leave it out.")
        sampling, ways = _torch_ways(model, steps, seed, device)
        machine = machine_words(device or "cpu")
    else:
        if device is not None:
            raise UserError(f"--device {device}: exports run where their engine does, such as --engine openvino:GPU.")
        sampling, ways = _export_ways(path, engines or _installed(), steps, seed)
        machine = machine_words()
    return {"model": model, "steps": sampling.steps, "machine": machine, "ways": _timed(ways, repeats)}


def _timed(ways: Ways, repeats: int) -> list[Timed]:
    times = latencies_ms(list(ways.values()), repeats)
    return [
        Timed(way, statistics.median(own), median_ratio(own, times[0])) for way, own in zip(ways, times, strict=True)
    ]


def _torch_ways(model: str, steps: int | None, seed: int, device: str | None) -> tuple[Sampling, Ways]:
    folder = resolve(model)
    check_sampling(folder, Sampling(steps))
    made_for = default_sampling(folder)
    sampling = Sampling(steps or made_for.steps, made_for.guidance_scale, made_for.call)
    if is_artifact(folder.path):
        opened = {PACKED: load(folder.path, prefer="memory", device=device)}
        loaded = load(folder.path, device=device)
        if any(layer.floats is not None for _, layer in layers_of(loaded)):
            opened[LOADED] = loaded
    else:
        pipeline = load_pipeline(folder, working_dtype(folder))
        opened = {"in floats": pipeline if device is None else pipeline.to(device)}
    conditions: list[Condition] = paired_conditions(next(iter(opened.values())), 1, seed)
    return sampling, {way: partial(sample, own, conditions, sampling) for way, own in opened.items()}


def _export_ways(folder: Path, engines: Sequence[str], steps: int | None, seed: int) -> tuple[Sampling, Ways]:
    manifest = read_export(folder)
    sampling = Sampling(steps or manifest.steps, manifest.guidance_scale)
    schedule_of(manifest, sampling.steps or manifest.steps)
    # An image of the self test's condition: exports have no list of prompts.
    asked = manifest.self_test.condition, seed, sampling.steps, sampling.guidance_scale
    ways: dict[str, Callable[[], object]] = {}
    for name in dict.fromkeys(engines):
        engine = engine_named(name, manifest.form)
        ways[f"{name} {engine.version()}"] = partial(open_export(folder, engine).generate, *asked)
    return sampling, ways


def _installed() -> list[str]:
    found = [name for name, package in ENGINES.items() if find_spec(package) is not None]
    # Whoever has none is told what to install.
    return found or list(ENGINES)[:1]
