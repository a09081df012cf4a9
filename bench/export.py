"""Exports beside torch, engine by engine: `python bench/export.py zoo:digits-unet out/w8a8 out/w4a8 --json`.

Every model is a pipeline or an artifact of it. Parity is the PSNR of final images against torch's run of the same weights.
Speed is of one call of the denoiser, in alternation with all other rows; ratios are medians of pairs with float in the same
engine. The first model is the float one that the others' ratios are over.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from diffpress.compare_exports import compare_exports
from diffpress.defaults import default_sampling
from diffpress.export.engines.engine import Array, Session
from diffpress.export.engines.named import engine_named
from diffpress.export.onnx.export import export_onnx
from diffpress.export.portable.manifest import is_export, read_export
from diffpress.models import resolve

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine
from onnx_speed import WARM_UP, inputs_of

ENGINES = ("onnx", "openvino")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="the float pipeline, then artifacts of it")
    parser.add_argument(
        "--exports", nargs="*", default=[], help="of the models, in their order, where there are some already"
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--count", type=int, default=4, help="images that are compared")
    parser.add_argument("--calls", type=int, default=30, help="rounds of calls")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        exports = [Path(path) for path in arguments.exports] or exported(arguments.models, Path(folder))
        parity = [
            images(model, export, arguments.count) for model, export in zip(arguments.models, exports, strict=True)
        ]
        speed = calls(exports, arguments.batch, arguments.calls)
        rows = [
            {"model": model, **about(export), **own, "milliseconds": ms}
            for model, export, own, ms in zip(arguments.models, exports, parity, speed, strict=True)
        ]
    versions = {name: engine_named(name).version() for name in ENGINES}
    found = {"machine": {**machine(), **versions}, "batch": arguments.batch, "threads": 1, "rows": rows}
    print(json.dumps(found, indent=1) if arguments.json else words(found))


def exported(models: list[str], folder: Path) -> list[Path]:
    """Export each as it was made to be sampled."""
    paths = [folder / str(place) for place in range(len(models))]
    for model, path in zip(models, paths, strict=True):
        source = resolve(model)
        sampling = default_sampling(source)
        export_onnx(source, path, steps=sampling.steps, guidance_scale=sampling.guidance_scale)
    return paths


def about(export: Path) -> dict[str, Any]:
    """What an export stores, and what ran in integers in onnxruntime."""
    assert is_export(export)
    manifest = read_export(export)
    graph = manifest.components["denoiser"]
    kernels = None if graph.kernels is None else graph.kernels.model_dump()
    return {"denoiser_bytes": manifest.files[graph.data].size_bytes, "onnxruntime_kernels": kernels}


def images(model: str, export: Path, count: int) -> dict[str, Any]:
    """How close the images of every engine come to torch's."""
    found = {
        name: compare_exports(model, str(export), name, count, None, 0, lambda done, total: None) for name in ENGINES
    }
    return {
        "psnr_db": {name: own.metrics["psnr_db"] for name, own in found.items()},
        "steps": found["onnx"].metrics["steps"],
    }


def calls(exports: list[Path], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Times of a call of every export in every engine, and their ratios to the first export's in the same engine."""
    inputs = inputs_of(read_export(exports[0]), batch)
    sessions = {
        (place, name): engine_named(name).open(export / "denoiser.onnx", 1)
        for place, export in enumerate(exports)
        for name in ENGINES
    }
    times = [{key: milliseconds(session, inputs) for key, session in sessions.items()} for _ in range(WARM_UP + rounds)]
    times = times[WARM_UP:]
    return [
        {
            name: {
                "median": statistics.median(own[place, name] for own in times),
                "over_float": statistics.median(own[place, name] / own[0, name] for own in times),
                "over_float_in_onnxruntime": statistics.median(own[place, name] / own[0, "onnx"] for own in times),
            }
            for name in ENGINES
        }
        for place in range(len(exports))
    ]


def milliseconds(session: Session, inputs: dict[str, Array]) -> float:
    """Of one call."""
    start = perf_counter()
    session.run(inputs)
    return 1e3 * (perf_counter() - start)


def words(found: dict[str, Any]) -> str:
    lines = [
        f"{row['model']}, {name}: {row['psnr_db'][name]:.1f} dB, {row['denoiser_bytes'] / 1e6:.2f} MB, "
        f"{row['milliseconds'][name]['median']:.2f} ms, {row['milliseconds'][name]['over_float']:.2f} of float"
        for row in found["rows"]
        for name in ENGINES
    ]
    return "\n".join([*lines, str(found["machine"])])


if __name__ == "__main__":
    main()
