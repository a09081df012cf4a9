"""One row of `bench/steps.py`: `python bench/caches/run_row.py ROW --model FOLDER --settings JSON --request JSON --out FILE`.

Leaves the images, their latents and, as metadata `row`, what they cost. Exits non-zero with the reason as the last line of
standard error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import traceback
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from diffpress.calibration.cost import latencies_ms, median_ratio

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))
from environment import CACHES
from measure import Run, cached_bytes, draw_and_count, full_macs, load
from task import Request, read_request

REPEATS = 5
ROWS = {
    "fewer-steps": "by_steps",
    "deepcache": "by_deepcache",
    "first-block": "by_diffusers",
    "taylorseer": "by_diffusers",
    "magcache": "by_diffusers",
    "faster-cache": "by_diffusers",
    "pyramid-attention": "by_diffusers",
    "dbcache": "by_cache_dit",
    "inherit": "by_diffpress",
    "inherit+W8A8": "by_diffpress",
}
"""Name to the module that makes it."""
PACKAGES = {"by_diffusers": ("diffusers",), "by_deepcache": CACHES["deepcache"].packages()} | {
    "by_cache_dit": CACHES["cache-dit"].packages()
}
PLAIN = "fewer-steps"
"""The one row that may compute all: in all steps it is what the others are compared with."""


def run(row: str, folder: Path, settings: dict[str, Any], request: Request, out: Path) -> None:
    """Accelerate, draw, count, time and write. Raises RuntimeError where a cache is on and all is computed."""
    own = import_module(ROWS[row]).accelerate(row, folder, settings, request)
    plain = Run(load(folder), request.sampling)
    images, macs = draw_and_count(own, request.compare, request.batch)
    full = full_macs(folder, request)
    if macs >= full and row != PLAIN:
        raise RuntimeError("every call of the denoiser is computed in full: nothing is cached")
    figures = {
        "macs": round(macs),
        "full_macs": round(full),
        "mac_speedup": full / macs,
        **latencies(own, plain, request),
        "cached_bytes": cached_bytes(own, plain, request.compare[0]),
        "version": ", ".join(f"{name} {version(name)}" for name in PACKAGES.get(ROWS[row], ())),
    }
    tensors = {"images": images.images.contiguous(), "latents": images.latents.contiguous()}
    save_file(tensors, out, {"row": json.dumps(figures)})


def latencies(own: Run, plain: Run, request: Request) -> dict[str, float]:
    """Of one image from each, taken in alternation."""
    times = latencies_ms([partial(each.draw, request.compare[:1]) for each in (own, plain)], REPEATS)
    return {
        "latency_ms": statistics.median(times[0]),
        "full_latency_ms": statistics.median(times[1]),
        "latency_ratio": median_ratio(times[0], times[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--model", type=Path, required=True, help="folder of a float pipeline")
    parser.add_argument("--settings", type=json.loads, required=True)
    parser.add_argument("--request", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        run(arguments.row, arguments.model, arguments.settings, read_request(arguments.request), arguments.out)
    except Exception as error:
        traceback.print_exc()
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))


if __name__ == "__main__":
    main()
