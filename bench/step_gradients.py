"""Gradients through a whole sampling run: peak memory and time of ways to get them, by the number of steps.

Peaks are resident memory of this process above what it held before the run. Beside them what one call of a UNet in the shape of
Stable Diffusion XL's keeps for the way back, counted at three small sizes and, without memory, at its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import diffpress
from diffpress.calibration.conditions import Condition
from diffpress.calibration.gradients import sample_with_gradients
from diffpress.calibration.sampling import Sampling, sample
from diffpress.compress.overlay import checkpointed

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))
from machine import machine
from rss import peak_rss_bytes, reset_peak, rss_bytes

RECORDED = Path(__file__).parent / "results" / "step_gradients.json"
STEPS = (5, 10, 20, 50)
IMAGES = 2
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Has the C library give memory back at once, so that what is resident is what is alive."""
NO_GRADIENT = "no gradient"
WAYS: dict[str, Callable[[Any], AbstractContextManager[None]]] = {
    "plain autograd": lambda pipeline: nullcontext(),
    "checkpoints per block": lambda pipeline: checkpointed(pipeline.unet, True),
    "checkpoint_steps": diffpress.checkpoint_steps,
    "checkpoint_steps, and per block": lambda pipeline: _both(pipeline),
    NO_GRADIENT: lambda pipeline: nullcontext(),
}
SDXL_WIDTH, SDXL_LATENTS = 5, 128
"""Heads in its first blocks with attention, half of those in the next, and its latents' height and width."""
SMALL = ((1, 32), (1, 64), (2, 32))
"""Widths and latents that one call is counted at."""


@contextmanager
def _both(pipeline: Any) -> Iterator[None]:
    with diffpress.checkpoint_steps(pipeline), checkpointed(pipeline.unet, True):
        yield


def small_pipeline() -> DDIMPipeline:
    """Random weights, 32 x 32 pixels."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
    )
    pipeline = DDIMPipeline(unet.eval(), DDIMScheduler(timestep_spacing="trailing", clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure(pipeline: DDIMPipeline, way: str, steps: int) -> dict[str, Any]:
    """One run of that many steps and, but for the way without a gradient, back again."""
    wanted, sampling = [Condition("", seed) for seed in range(IMAGES)], Sampling(steps)
    pipeline.unet.zero_grad(set_to_none=True)
    gc.collect()
    before = rss_bytes()
    reset_peak()
    clock, processor = perf_counter(), process_time()
    with WAYS[way](pipeline):
        if way == NO_GRADIENT:
            sample(pipeline, wanted, sampling)
        else:
            sample_with_gradients(pipeline, wanted, sampling).square().mean().backward()
    seconds = {"seconds": perf_counter() - clock, "cpu_seconds": process_time() - processor}
    return {"way": way, "steps": steps, "peak_bytes": peak_rss_bytes() - before, **seconds}


def sdxl(width: int) -> UNet2DConditionModel:
    """In the shape of Stable Diffusion XL's, which has a width of 5."""
    return UNet2DConditionModel(
        sample_size=SDXL_LATENTS,
        block_out_channels=(64 * width, 128 * width, 256 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(width, 2 * width, 4 * width),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def kept_bytes(unet: nn.Module, latents: int) -> int:
    """What autograd keeps of one call for one image, less the weights."""
    own = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            kept[x.untyped_storage()._cdata] = x
        return x

    added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        unet(torch.zeros(1, 4, latents, latents), torch.tensor(1.0), torch.zeros(1, 77, 2048), added_cond_kwargs=added)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def count(width: int, latents: int, measured: bool) -> dict[str, Any]:
    """Bytes by shapes alone, and, where it fits, of tensors that were there."""
    with FakeTensorMode():
        unet = sdxl(width)
        parameters = sum(parameter.numel() for parameter in unet.parameters())
        row = {
            "width": width,
            "latents": latents,
            "parameters": parameters,
            "bytes_by_shapes": kept_bytes(unet, latents),
        }
    return row | ({"bytes": kept_bytes(sdxl(width), latents)} if measured else {})


def draw(results: dict[str, Any], out: Path) -> None:
    """Peak memory over the number of steps, of what has a gradient."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for way in (way for way in WAYS if way != NO_GRADIENT):
        rows = [row for row in results["rows"] if row["way"] == way]
        panel.plot([row["steps"] for row in rows], [row["peak_bytes"] / 1e6 for row in rows], marker="o", label=way)
    panel.set(xlabel="sampling steps", ylabel="peak memory above the model's, MB", yscale="log")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--no-sizes", action="store_true", help="leave the UNet of Stable Diffusion XL's shape out")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--draw", type=Path, metavar="PNG", help="draw what is recorded instead of measuring")
    arguments = parser.parse_args()
    if arguments.draw is not None:
        draw(json.loads(RECORDED.read_text(encoding="utf-8")), arguments.draw)
        return
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        # The C library reads these when a process begins.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    torch.set_num_threads(1)
    pipeline = small_pipeline()
    # What is made once and kept, such as gradients' buffers in the libraries, is nobody's peak.
    measure(pipeline, "plain autograd", 2)
    rows = []
    for steps in arguments.steps:
        for way in WAYS:
            rows.append(measure(pipeline, way, steps))
            print(
                f"{way:32} {steps:3} steps {rows[-1]['peak_bytes'] / 1e6:9.1f} MB {rows[-1]['cpu_seconds']:7.1f} s",
                flush=True,
            )
    sizes = [] if arguments.no_sizes else [count(*size, measured=True) for size in SMALL]
    sizes += [] if arguments.no_sizes else [count(SDXL_WIDTH, SDXL_LATENTS, measured=False)]
    for row in sizes:
        print(row, flush=True)
    parameters = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    found = {"machine": machine(), "parameters": parameters, "images": IMAGES, "rows": rows, "sizes": sizes}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
