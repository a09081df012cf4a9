"""What `compress` takes, stage by stage, on models of growing size: `python bench/time.py --json`.

Times are CPU seconds of this process beside seconds of the clock, which others on the machine have a part in. Rounding may
take no longer, in calls of the denoiser, for a larger model than for a small one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from diffpress.calibration.cost import parameter_count
from diffpress.calibration.sampling import denoiser_of, sample
from diffpress.export.artifact import open_pipeline
from diffpress.flow import compress
from diffpress.models import resolve
from diffpress.recipe import Recipe, load_recipe
from diffpress.stages import recorded_conditions, sampling_of

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine

SIZES = ((3, 64), (6, 128), (12, 256))
"""Blocks and width of transformers with random weights: each has eight times the multiplications of the one before."""
ZOO = ("zoo:digits-unet", "zoo:digits", "zoo:emoji")


class Seconds(NamedTuple):
    """What something took."""

    cpu: float
    clock: float


class Stages:
    """What each stage took, by when a run says what it is at."""

    def __init__(self) -> None:
        self.seconds: dict[str, Seconds] = {}
        self.now, self.latest = now(), "load"

    def notify(self, stage: str, done: int, total: int) -> None:
        """Everything since the last word belongs to the stage that speaks, or, where that only begins, to the one before."""
        before, self.now = self.now, now()
        name = stage.split(",")[0] if done else self.latest
        self.latest = stage.split(",")[0]
        taken = self.seconds.get(name, Seconds(0, 0))
        cpu, clock = (own + after - start for own, after, start in zip(taken, self.now, before, strict=True))
        self.seconds[name] = Seconds(cpu, clock)


def now() -> Seconds:
    return Seconds(process_time(), perf_counter())


def transformer_pipeline(blocks: int, width: int, folder: Path) -> Path:
    """A DiTPipeline of ten classes with random weights, whose denoiser has so many blocks of that width."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=blocks,
        sample_size=16,
        patch_size=2,
        # Its pipeline asks for this class where none is meant.
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    autoencoder = AutoencoderKL(3, 3, block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=16)
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    labels = {index: str(index) for index in range(10)}
    DiTPipeline(transformer, autoencoder, scheduler, labels).save_pretrained(folder)
    return folder


def measured(model: str, recipe: Recipe) -> dict[str, Any]:
    """One row: what the model weighs, what a call of its denoiser takes, and what the stages take."""
    source = resolve(model)
    pipeline = open_pipeline(source)
    call = call_seconds(pipeline, recipe)
    stages = Stages()
    with tempfile.TemporaryDirectory() as folder:
        compress(source, recipe, Path(folder) / "out", notify=stages.notify)
    return {
        "model": model if model.startswith("zoo:") else Path(model).name,
        "parameters": parameter_count(denoiser_of(pipeline)),
        "call_cpu_seconds": call,
        "stages": {name: own._asdict() for name, own in stages.seconds.items()},
        "quantize_in_calls": stages.seconds["quantize"].cpu / call,
    }


def call_seconds(pipeline: Any, recipe: Recipe) -> float:
    """CPU seconds of one call of the denoiser, for as many images as are recorded at a time: the median of a whole run."""
    wanted = recorded_conditions(pipeline, recipe)[: recipe.record.batch]
    begun: list[float] = []
    taken: list[float] = []
    denoiser = denoiser_of(pipeline)
    handles = [
        denoiser.register_forward_pre_hook(lambda *_: begun.append(process_time())),
        denoiser.register_forward_hook(lambda *_: taken.append(process_time() - begun[-1])),
    ]
    sample(pipeline, wanted, sampling_of(pipeline, recipe))
    for handle in handles:
        handle.remove()
    return median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="balanced", help="a preset or a file")
    parser.add_argument("--zoo", nargs="*", default=ZOO, help="models with trained weights")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the random ones, the smallest first")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = [transformer_pipeline(*size, Path(folder) / "{}x{}".format(*size)) for size in SIZES[: arguments.sizes]]
        for model in [*map(str, made), *arguments.zoo]:
            rows.append(measured(model, recipe))
            print(line(rows[-1]), file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps({"machine": machine(), "recipe": arguments.recipe, "models": rows}, indent=1))
    else:
        print("\n".join(map(line, rows)))


def line(row: dict[str, Any]) -> str:
    """A row of a table."""
    stages = " | ".join(f"{name} {own['cpu']:.1f} s" for name, own in row["stages"].items())
    return (
        f"| {row['model']} | {row['parameters'] / 1e6:.2f} M | call {row['call_cpu_seconds'] * 1e3:.0f} ms | {stages} "
        f"| quantize is {row['quantize_in_calls']:.0f} calls |"
    )


if __name__ == "__main__":
    main()
