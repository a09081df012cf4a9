"""Modulation collapse by family: ranks, bytes and largest relative errors of small pipelines, and what real ones could save.

Small pipelines have random weights, their time embedders slowed (see small_pipelines.py) but for Lumina 2's, which is slow by
itself; the zoo's are trained. Of real ones no weights are read: their layers are found by tracing them on the meta device.
`random` are the ranks that a random time embedder of Qwen-Image's shape asks for, by how fast its time steps run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import (
    AuraFlowTransformer2DModel,
    FluxPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from diffpress.calibration.conditions import conditions
from diffpress.calibration.sampling import Sampling
from diffpress.calibration.trajectory import Trajectories
from diffpress.compress.changes import Changes, worn
from diffpress.compress.options import Modulation
from diffpress.compress.plan import plan_rows
from diffpress.compress.prune.modulation.low_rank import factorize, largest_error, smallest, span_of
from diffpress.compress.prune.modulation.method import run
from diffpress.compress.prune.modulation.time_tape import TimeTape, trace, watched_layers
from diffpress.compress.stage import Subject
from diffpress.compress.stage_folder import StageFolder
from diffpress.export.artifact import load_pipeline
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.source import forms_of, source_tensors
from diffpress.zoo import PIPELINES as ZOO
from diffpress.zoo import zoo_folder

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine
from small_pipelines import PIPELINES

GRID = 4000
"""Equal parts of the range of time steps at whose ends errors are measured: four to a training step."""
RANKS = (16, 64, 256)
"""At which the bytes of real denoisers are told."""
SPEEDS = (1, 10, 100, 1000)
"""By what time steps from 0 to 1 are multiplied before they are embedded: MiniMax-H3 and Lumina 2 by 1, most others by 1000."""
WIDTH = 3072
"""Of Qwen-Image."""
STORED_BYTES = 2
"""Of a number of a real denoiser; a factor's takes float32's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for pipeline in (FluxPipeline, QwenImagePipeline):
        # Of their own they draw 1024 x 1024.
        pipeline.default_sample_size = property(lambda _: 8, lambda *_: None)
    results = {
        "machine": machine(),
        "small": [_shown(_small(name)) for name in PIPELINES],
        "zoo": [_shown(_measured(name, zoo_folder(name))) for name in ZOO],
        "random": [_shown(_random(speed)) for speed in SPEEDS],
        "real": [_shown(_real(name, *make)) for name, make in REAL.items()],
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(row), flush=True)
    return row


def _small(name: str) -> dict[str, Any]:
    """A small pipeline of a family, stored in half precision."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        PIPELINES[name](Path(folder)).to(dtype=torch.float16).save_pretrained(folder)
        return _measured(name, Path(folder))


def _measured(name: str, folder: Path) -> dict[str, Any]:
    source = PipelineFolder(folder, name)
    pipeline: Any = load_pipeline(source)
    forms = forms_of(source_tensors(source, source.denoiser))
    draw = lambda count: conditions(pipeline, "builtin", count, 0)  # noqa: E731
    sampling = Sampling(3)
    subject = Subject(pipeline, source.denoiser, forms, Trajectories(Path()), sampling, draw, 1, 0)
    try:
        changes = run(subject, Modulation(method="modulation"), StageFolder(folder), lambda *_: None)
    except UnsupportedModelError as error:
        return {"model": name, "refused": str(error)}
    rows = plan_rows(source.denoiser, forms, changes)
    changed = [row for row in rows if row.format.startswith("rank")]
    return {
        "model": name,
        "layers": len(changed),
        "ranks": sorted({int(row.format.split()[1]) for row in changed}),
        "layer_bytes": sum(row.source_bytes for row in changed),
        "collapsed_bytes": sum(row.bytes for row in changed),
        "size": round(sum(row.bytes for row in rows) / sum(row.source_bytes for row in rows), 4),
        "largest_error": _largest_error(subject, changes),
        "left": {row.module: row.reason for row in rows if row.reason and row not in changed},
    }


@torch.no_grad()
def _largest_error(subject: Subject, changes: Changes) -> float:
    """Of all collapsed layers at all time steps of the GRID, all of them worn, against the originals in float64."""
    model = subject.model
    names = [edit.module for edit in changes.edits]
    before = _walked(subject, names)
    with worn(model, changes, []):
        after = _walked(subject, names)
        found = {name: model.get_submodule(name)(after[name]) for name in names}
    layers = {name: model.get_submodule(name) for name in names}
    bias = {name: None if layer.bias is None else layer.bias.double() for name, layer in layers.items()}
    expected = {name: F.linear(before[name].double(), layers[name].weight.double(), bias[name]) for name in names}
    return max(largest_error(found[name].double(), expected[name]) for name in names)


def _walked(subject: Subject, names: list[str]) -> dict[str, Tensor]:
    traced = trace(subject.pipeline, *subject.conditions(1), subject.sampling)
    last = 1.0 if max(traced.told) <= 1 else 1000.0
    at = traced.tape.replay({name: traced.fed[name] for name in names})
    walked = [at(last * place / GRID) for place in range(GRID + 1)]
    return {name: torch.cat([rows[name] for rows in walked]) for name in names}


@torch.no_grad()
def _random(speed: float) -> dict[str, Any]:
    """The rank that a layer behind a time embedder of random weights asks for, which is told `speed` times 0 to 1."""
    torch.manual_seed(0)
    proj, embedder, layer = Timesteps(256, True, 0), TimestepEmbedding(256, WIDTH), nn.Linear(WIDTH, WIDTH)
    parts = torch.arange(2001) / 2000
    points = F.silu(embedder(proj(speed * parts)))
    factors = factorize(layer.weight, layer.bias, span_of(points[::2]))
    expected = F.linear(points.double(), layer.weight.double(), layer.bias.double())

    def error(rank: int) -> float:
        down, up, bias = (tensor.float() for tensor in factors.cut(rank))
        return largest_error(F.linear(points @ down.T, up, bias).double(), expected)

    most = len(factors.down)
    reached = [tolerance for tolerance in (1e-2, 1e-4, 1e-6) if error(most) <= tolerance]
    ranks = {tolerance: smallest(most, lambda rank, limit=tolerance: error(rank) <= limit) for tolerance in reached}
    floor = largest_error(layer(points).double(), expected)
    return {"width": WIDTH, "speed": speed, "ranks": ranks, "error_at_16": error(16), "float32_floor": floor}


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


def _real(name: str, make: Callable[[], nn.Module], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the layers that read the time step alone take in a denoiser of that config, and would take."""
    with init_empty_weights(include_buffers=True):
        model = make()
    tensors = [(key, value) for key, value in inputs.items() if isinstance(value, Tensor)]
    fed: dict[str, list[Tensor]] = {}
    with torch.no_grad(), watched_layers(model, fed), TimeTape(tensors, "timestep") as tape:
        model(**inputs)
    layers = [model.get_submodule(key) for key, own in fed.items() if tape.sources(own) == tape.alone]
    sizes = [(layer.in_features, layer.out_features, layer.bias is not None) for layer in layers]
    before = sum(STORED_BYTES * (columns * rows + rows * bias) for columns, rows, bias in sizes)
    after = {
        rank: sum(min(4 * (rank * (columns + rows) + rows), 2 * (columns * rows + rows)) for columns, rows, _ in sizes)
        for rank in RANKS
    }
    total = STORED_BYTES * sum(parameter.numel() for parameter in model.parameters())
    return {
        "model": name,
        "layers": len(layers),
        "denoiser_bytes": total,
        "layer_bytes": before,
        "share": round(before / total, 4),
        "size_at_rank": {rank: round(1 - (before - own) / total, 4) for rank, own in after.items()},
        "sharing_saves": {rank: _sharing(sizes, rank, total) for rank in RANKS},
    }


def _sharing(sizes: list[tuple[int, int, bool]], rank: int, total: int) -> float:
    """Share of the denoiser that one `down` for all layers of equal inputs would save more."""
    apart = sum(4 * rank * columns for columns, _, _ in sizes)
    once = sum(4 * rank * columns for columns in {columns for columns, _, _ in sizes})
    return round((apart - once) / total, 4)


TIME = _meta(1)
REAL: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "Qwen-Image": (
        QwenImageTransformer2DModel,
        {
            "hidden_states": _meta(1, 256, 64),
            "encoder_hidden_states": _meta(1, 16, 3584),
            "timestep": TIME,
            "img_shapes": [[(1, 16, 16)]],
        },
    ),
    "PixArt-Sigma": (
        lambda: PixArtTransformer2DModel(out_channels=8, caption_channels=4096, use_additional_conditions=False),
        {
            "hidden_states": _meta(1, 4, 128, 128),
            "encoder_hidden_states": _meta(1, 16, 4096),
            "timestep": TIME,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "AuraFlow": (
        AuraFlowTransformer2DModel,
        {"hidden_states": _meta(1, 4, 64, 64), "encoder_hidden_states": _meta(1, 16, 2048), "timestep": TIME},
    ),
    "Stable Diffusion 1.5": (
        lambda: UNet2DConditionModel(cross_attention_dim=768, sample_size=64),
        {"sample": _meta(1, 4, 64, 64), "timestep": TIME, "encoder_hidden_states": _meta(1, 16, 768)},
    ),
}
"""Denoisers by their configs, and what they are called with."""


if __name__ == "__main__":
    main()
