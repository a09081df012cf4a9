"""Presets on every model of the zoo, beside what one would pick instead: `python bench/recipes.py --json`.

All rows of a model are taken in one run: same prompts, same noise, times in alternation.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffpress.calibration.conditions import Condition
from diffpress.calibration.cost import latencies_ms, median_ratio, peak_memory_bytes
from diffpress.calibration.metrics import psnr_db, ssim
from diffpress.calibration.sampling import Sampling, sample
from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.flow import compress
from diffpress.models import resolve
from diffpress.pairs import paired_conditions
from diffpress.recipe import load_recipe, presets
from diffpress.zoo import PIPELINES

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine
from tables import recipes

STEPS = 25
FEWER_STEPS = 20
SEED = 1000
"""Apart from the seeds that anything was tuned on."""


@dataclass(frozen=True)
class Row:
    """One way of running a model."""

    name: str
    pipeline: Any
    steps: int
    size_bytes: int
    folder_bytes: int


def rows_of(model: str, chosen: list[str], work: Path) -> list[Row]:
    """The original, its cheap alternatives, and an artifact of each chosen preset."""
    source = resolve(model)
    sizes = source.component_bytes(source.denoiser), source.size_bytes()
    rows = [
        Row("original, float32", load_pipeline(source), STEPS, *sizes),
        Row("original, bfloat16", load_pipeline(source, torch.bfloat16), STEPS, *sizes),
        Row(f"original, {FEWER_STEPS} steps", load_pipeline(source), FEWER_STEPS, *sizes),
    ]
    for preset in chosen:
        out = work / f"{model.removeprefix('zoo:')}-{preset}"
        artifact = compress(source, load_recipe(preset), out)
        folder = PipelineFolder(out, str(out))
        sizes = folder.component_bytes(folder.denoiser), folder.size_bytes()
        rows.append(Row(f"recipe {preset}", artifact.load(), STEPS, *sizes))
    return rows


def measure(rows: list[Row], count: int, repeats: int) -> list[dict[str, Any]]:
    """Quality against the first row, and cost of all; a row that does not run says why."""
    wanted = paired_conditions(rows[0].pipeline, count, SEED)
    images: dict[str, torch.Tensor] = {}
    failures: list[dict[str, Any]] = []
    for row in rows:
        try:
            images[row.name] = draw(row, wanted)
        except (RuntimeError, TypeError) as error:
            failures.append({"row": row.name, "error": str(error)})
    running = [row for row in rows if row.name in images]
    times = latencies_ms([lambda row=row: draw(row, wanted[:1]) for row in running], repeats)
    truth = images[rows[0].name]
    return failures + [
        {
            "row": row.name,
            "psnr_db": float(psnr_db(images[row.name], truth).mean()),
            "ssim": ssim(images[row.name], truth),
            "denoiser_bytes": row.size_bytes,
            "folder_bytes": row.folder_bytes,
            "latency_ratio": median_ratio(own, times[0]),
            "peak_memory_bytes": peak_memory_bytes(row.pipeline, wanted[0], Sampling(row.steps)),
        }
        for row, own in zip(running, times, strict=True)
    ]


def draw(row: Row, wanted: list[Condition]) -> torch.Tensor:
    return sample(row.pipeline, wanted, Sampling(row.steps)).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[f"zoo:{name}" for name in PIPELINES])
    parser.add_argument("--presets", nargs="+", default=list(presets()), choices=list(presets()))
    parser.add_argument("--count", type=int, default=32, help="pairs of images")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each row, in alternation")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as work:
        for model in arguments.models:
            results[model] = measure(rows_of(model, arguments.presets, Path(work)), arguments.count, arguments.repeats)
    found = {"machine": machine(), "count": arguments.count, "models": results}
    print(json.dumps(found, indent=1) if arguments.json else recipes(found))


if __name__ == "__main__":
    main()
