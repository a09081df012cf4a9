"""cache-dit's DBCache, its residual forecast to first order by its TaylorSeer calibrator.

`enable_cache` knows DiTPipeline; pipelines that it does not know it refuses.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import cache_dit
from measure import Run, full_macs, load
from task import Request
from threshold import WATCHED, find_threshold

from diffpress.calibration.sampling import denoiser_of

FIRST_BLOCKS = 1
"""Always computed, to decide by; its default of 8 is all blocks of a small model."""
WARMUP = 3
"""Steps that are computed first; its default is 8."""


def accelerate(row: str, folder: Path, settings: dict[str, Any], request: Request) -> Run:
    """Nearest to `settings["speedup"]`, in `even` steps or by a threshold."""
    if settings["even"]:
        return cached(folder, request, even_steps=even_steps(folder, request, settings["speedup"]))
    run_at = partial(cached, folder, request)
    return run_at(find_threshold(run_at, full_macs(folder, request), settings["speedup"], request.record[:WATCHED]))


def even_steps(folder: Path, request: Request, speedup: float) -> list[int]:
    """Per step 1 where it is computed, the first always, at even distances; what is skipped costs the first block."""
    steps = request.sampling.steps
    assert steps is not None
    first = FIRST_BLOCKS / len(denoiser_of(load(folder)).transformer_blocks)
    computed = round(steps * (1 / speedup - first) / (1 - first))
    chosen = {index * steps // computed for index in range(computed)}
    return [int(step in chosen) for step in range(steps)]


def cached(folder: Path, request: Request, threshold: float = 0.0, even_steps: list[int] | None = None) -> Run:
    """The pipeline with its cache on, of steps or by a threshold."""
    pipeline = load(folder)
    # It is put into the call of the class: that of the plain pipeline beside it stays as it is.
    pipeline.__class__ = type(type(pipeline).__name__, (type(pipeline),), {})
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=FIRST_BLOCKS,
        Bn_compute_blocks=0,
        residual_diff_threshold=threshold,
        max_warmup_steps=WARMUP,
        num_inference_steps=request.sampling.steps,
        steps_computation_mask=even_steps,
        steps_computation_policy="static" if even_steps else "dynamic",
    )
    cache_dit.enable_cache(
        pipeline, cache_config=config, calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    )
    return Run(pipeline, request.sampling)
