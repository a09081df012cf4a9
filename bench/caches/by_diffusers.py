"""The caches that diffusers brings along.

Neither DiTTransformer2DModel nor a UNet is a `CacheMixin`: they are given it, and its context around every call, as
diffusers' own pipelines do for models that are. The registries of blocks stay as they are.
"""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial, wraps
from math import ceil
from pathlib import Path
from typing import Any

from diffusers import (
    CacheMixin,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from measure import Run, full_macs, load
from task import Request
from threshold import WATCHED, find_threshold
from torch import Tensor, float32, nn

from diffpress.calibration.conditions import call_parameters
from diffpress.calibration.sampling import denoiser_of

ALL_STEPS = (-1, 1001)
"""Of time, as the smallest and largest are left out."""
FORECAST = [
    # All that is added to a residual,
    r".*\.attn[12]",
    r".*\.ff",
    r".*resnets\.\d+\.conv2",
    r".*attentions\.\d+\.to_out\.0",
    # and what else of a UNet takes multiplications.
    r".*samplers\.\d+\.conv",
    r".*\.conv_shortcut",
    r".*\.proj_(in|out)",
]
"""What TaylorSeer forecasts. What it looks for by itself, none of these models has: its users name it."""
BEFORE_FORECAST = [r".*resnets\.\d+\.conv1", r".*attentions\.\d+\.to_[qkv]"]
"""What need not be computed where those are forecast."""
RETAINED = 0.1
"""Share of the steps that MagCache computes first; of its default of 0.2 not even 2.5 times fewer are left."""


def accelerate(row: str, folder: Path, settings: dict[str, Any], request: Request) -> Run:
    """With the settings of the row, or with the threshold that gives `settings["speedup"]`."""
    if row in FIXED:
        return cached(folder, request, partial(FIXED[row], settings, request))
    config_at = THRESHOLDS[row](settings, folder, request)

    def run_at(threshold: float) -> Run:
        return cached(folder, request, lambda _: config_at(threshold))

    return run_at(find_threshold(run_at, full_macs(folder, request), settings["speedup"], request.record[:WATCHED]))


def cached(folder: Path, request: Request, config_for: Callable[[Any], Any]) -> Run:
    """The pipeline with a cache on. Raises RuntimeError where the cache finds nothing in its denoiser."""
    pipeline = load(folder)
    denoiser: Any = denoiser_of(pipeline)
    name = type(denoiser).__name__
    denoiser.__class__ = type(name, (CacheMixin, type(denoiser)), {})
    config = config_for(pipeline)
    denoiser.enable_cache(config)
    hooks = [each._diffusers_hook.hooks for each in denoiser.modules() if hasattr(each, "_diffusers_hook")]
    if not any(hooks):
        raise RuntimeError(f"{type(config).__name__} finds nothing in {name} to cache")
    forward = denoiser.forward

    @wraps(forward)
    def in_context(*arguments: Any, **options: Any) -> Any:
        with denoiser.cache_context("conditional and unconditional in one batch"):
            return forward(*arguments, **options)

    denoiser.forward = in_context
    return Run(pipeline, request.sampling)


def taylorseer(settings: dict[str, Any], request: Request, pipeline: Any) -> TaylorSeerCacheConfig:
    steps = request.sampling.steps
    assert steps is not None
    return TaylorSeerCacheConfig(
        cache_interval=settings["interval"],
        disable_cache_before_step=settings["warmup"],
        disable_cache_after_step=steps - settings.get("last", 0),
        max_order=1,
        taylor_factors_dtype=float32,
        cache_identifiers=FORECAST,
        skip_predict_identifiers=BEFORE_FORECAST,
    )


def pyramid_attention(settings: dict[str, Any], request: Request, pipeline: Any) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=settings["interval"],
        cross_attention_block_skip_range=settings["interval"],
        spatial_attention_timestep_skip_range=ALL_STEPS,
        cross_attention_timestep_skip_range=ALL_STEPS,
        current_timestep_callback=current_timestep(denoiser_of(pipeline)),
    )


def faster_cache(settings: dict[str, Any], request: Request, pipeline: Any) -> FasterCacheConfig:
    # Its own list of what holds both halves of the batch, and the labels of a DiT.
    both = (*FasterCacheConfig._unconditional_conditional_input_kwargs_identifiers, "class_labels")
    return FasterCacheConfig(
        spatial_attention_block_skip_range=settings["interval"],
        spatial_attention_timestep_skip_range=ALL_STEPS,
        unconditional_batch_skip_range=settings["interval"],
        unconditional_batch_timestep_skip_range=ALL_STEPS,
        tensor_format="BCHW",
        is_guidance_distilled="guidance_scale" not in call_parameters(pipeline),
        current_timestep_callback=current_timestep(denoiser_of(pipeline)),
        _unconditional_conditional_input_kwargs_identifiers=both,
    )


def current_timestep(denoiser: nn.Module) -> Callable[[], float]:
    """What the denoiser was last called with, for caches that ask."""
    signature = inspect.signature(denoiser.forward)
    latest: list[float] = []

    def remember(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        timestep = signature.bind(*arguments, **options).arguments["timestep"]
        latest[:] = [float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)]

    denoiser.register_forward_pre_hook(remember, with_kwargs=True)
    return lambda: latest[0]


def first_block(settings: dict[str, Any], folder: Path, request: Request) -> Callable[[float], FirstBlockCacheConfig]:
    return FirstBlockCacheConfig


def magnitudes(settings: dict[str, Any], folder: Path, request: Request) -> Callable[[float], MagCacheConfig]:
    """Its ratios are measured on recorded seeds, as it asks for: it prints them, to be copied."""
    known: dict[str, Any] = {"num_inference_steps": request.sampling.steps, "retention_ratio": RETAINED}
    run = cached(folder, request, lambda _: MagCacheConfig(calibrate=True, **known))
    printed = io.StringIO()
    with redirect_stdout(printed):
        run.draw(request.record[: request.batch])
    ratios = json.loads(printed.getvalue().strip().splitlines()[-1])
    # How many steps in a row may be skipped.
    known |= {"mag_ratios": ratios, "max_skip_steps": ceil(settings["speedup"])}
    return lambda threshold: MagCacheConfig(threshold=threshold, **known)


FIXED: dict[str, Callable[[dict[str, Any], Request, Any], Any]] = {
    "taylorseer": taylorseer,
    "pyramid-attention": pyramid_attention,
    "faster-cache": faster_cache,
}
THRESHOLDS: dict[str, Callable[[dict[str, Any], Path, Request], Callable[[float], Any]]] = {
    "first-block": first_block,
    "magcache": magnitudes,
}
