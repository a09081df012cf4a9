"""Times of every tile that a product could be cut into: `python bench/gpu/tiles.py DIR`, to choose those of the kernels by.

The sizes are those of models that `shapes.py` leaves out, so that nothing is tuned on what is reported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.testing import do_bench

from diffpress.kernels.tiles import Tile

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from correctness import implementation
from inputs import Source, arguments
from rows import Row, main, together
from shapes import Attention, Conv, Form, Linear, Shape, Spec
from speed import Timer, once


class Sweep(NamedTuple):
    """Tiles of one kernel, on some sizes and in some forms."""

    op: str
    chooser: str
    """What of the kernel's module chooses the tile."""
    shapes: Sequence[Shape]
    forms: Sequence[Form]
    tiles: Sequence[Tile]


LINEARS = (
    Linear(6144, 2560, 10240),
    Linear(3600, 1408, 5632),
    Linear(3600, 1408, 1408),
    Linear(1024, 1536, 1536),
    Linear(224, 4096, 1920),
    Linear(16, 1536, 9216),
)
"""Wan's, HunyuanDiT's, AuraFlow's and CogVideoX's."""
CONVS = (Conv(2, 96, 96, 384, 384), Conv(2, 24, 24, 1024, 1024), Conv(2, 48, 48, 1024, 512, kernel=1))
"""Kandinsky's and Stable Cascade's."""
ATTENTIONS = (Attention(2, 12, 3600, 3600, 64), Attention(1, 16, 2304, 2304, 128), Attention(2, 12, 3600, 224, 64))
WIDE = tuple(
    Tile(rows, columns, depth, warps, stages)
    for rows, columns, depth, warps, stages in (
        (128, 256, 128, 8, 3),
        (128, 256, 64, 8, 4),
        (256, 128, 128, 8, 3),
        (256, 128, 64, 8, 4),
        (128, 128, 128, 8, 3),
        (128, 128, 128, 4, 3),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 4, 4),
        (128, 64, 128, 4, 4),
        (128, 64, 64, 8, 3),
        (64, 256, 128, 4, 3),
        (64, 128, 128, 4, 4),
        (64, 64, 128, 4, 4),
        (64, 64, 64, 4, 4),
        (64, 32, 128, 4, 4),
        (16, 64, 128, 4, 4),
        (16, 32, 256, 4, 4),
        (16, 64, 256, 4, 4),
        (16, 128, 128, 4, 4),
    )
)
"""Of products of bytes."""
NARROW = tuple(tile._replace(depth=64) for tile in WIDE if tile.depth == 128 and tile.rows > 16) + tuple(
    tile for tile in WIDE if tile.depth == 64 or tile.rows == 16
)
"""Where groups of 64 columns have a scale."""
QUERIES = tuple(
    Tile(rows, keys, 0, warps, stages)
    for rows, keys, warps, stages in (
        (128, 64, 4, 3),
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (64, 64, 8, 2),
        (128, 32, 4, 4),
    )
)
"""Queries and keys; the depth is that of the heads."""
SWEEPS = (
    Sweep(
        "integer_linear",
        "pick",
        LINEARS,
        (Form("W8A8"), Form("W4A8", 4), Form("W4A8 g128", 4, group=128), Form("W8A8 geglu", activation="geglu")),
        WIDE,
    ),
    Sweep("weight_only_linear", "pick", LINEARS, (Form("W4 g64", 4, cores="half", group=64),), NARROW),
    Sweep("fp8_linear", "pick", LINEARS, (Form("FP8", cores="fp8"),), [tile for tile in WIDE if tile.rows > 16]),
    Sweep("integer_conv2d", "tile_for", CONVS, (Form("W8A8"),), WIDE),
    Sweep("int8_attention", "tile_for", ATTENTIONS, (Form("int8"), Form("int8 values", integer_values=True)), QUERIES),
)


def measure(sweep: Sweep, shape: Shape, form: Form, tile: Tile, seed: int, timer: Timer) -> dict[str, Any]:
    """One row: microseconds of a call."""
    spec = Spec(sweep.op, "tuned", shape, form)
    module = import_module(f"diffpress.kernels.{sweep.op}.triton_kernel")
    given = arguments(spec, Source(seed, "cuda", torch.bfloat16))
    if isinstance(shape, Attention):
        tile = tile._replace(depth=shape.columns)
    chooser: Callable[..., Tile] = getattr(module, sweep.chooser)
    setattr(module, sweep.chooser, lambda *_: tile)
    try:
        return {"us": timer(partial(implementation(sweep.op, "cuda"), **given)) * 1e3}
    finally:
        setattr(module, sweep.chooser, chooser)


def median_ms(call: Callable[[], Any]) -> float:
    """Of few calls: tiles that matter differ by more than these do."""
    return do_bench(call, warmup=2, rep=10, return_mode="median")


def rows(seed: int, timer: Timer = median_ms) -> Iterator[Row]:
    """Every tile of every sweep; what was compiled for one size serves the others."""
    for sweep in SWEEPS:
        for form in sweep.forms:
            for tile in sweep.tiles:
                for shape in sweep.shapes:
                    names = {"op": sweep.op, "shape": "x".join(map(str, shape)), "form": form.words}
                    names["tile"] = " ".join(map(str, tile))
                    yield Row(names, partial(measure, sweep, shape, form, tile, seed, timer))


def rehearsal(seed: int) -> list[Row]:
    """All sizes of a tile as one row, so that no two workers compile one kernel."""
    return together(rows(seed, once), _compiled_alike)


def _compiled_alike(row: Row) -> tuple[str, ...]:
    names = row.names
    width = names["shape"].rpartition("x")[2] if names["op"] == "int8_attention" else ""
    return names["op"], names["form"], names["tile"], width


if __name__ == "__main__":
    raise SystemExit(main(__doc__, "tiles.json", rows, lambda row: "us" in row or "error" in row, rehearsal))
