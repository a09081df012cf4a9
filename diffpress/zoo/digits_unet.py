"""`zoo:digits-unet`: unconditional 32x32 digits in pixel space, a DDIMPipeline."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

from .data import load_digits
from .trainer import Schedule, train_

SCHEDULE = Schedule(steps=2600, rate=1.5e-3, save_every=200)
BATCH = 64


def train(data: Path, out: Path, work: Path, seed: int, steps: int | None = None) -> None:
    """Train on the npz at `data` and write the pipeline folder `out`; checkpoints live in `work`."""
    images = load_digits(data, "train").images
    torch.manual_seed(seed)
    unet = build_denoiser()
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    unet.train().to(memory_format=torch.channels_last)

    def loss(generator: torch.Generator) -> Tensor:
        target = images[torch.randint(len(images), (BATCH,), generator=generator)]
        noise = torch.randn(target.shape, generator=generator)
        steps = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
        output = unet(scheduler.add_noise(target, noise, steps), steps).sample
        return F.mse_loss(output, scheduler.get_velocity(target, noise, steps))

    schedule = Schedule(steps or SCHEDULE.steps, SCHEDULE.rate, save_every=SCHEDULE.save_every)
    train_(unet, loss, schedule, work / "unet.safetensors", seed)
    DDIMPipeline(unet.eval(), scheduler).to(dtype=torch.float16).save_pretrained(out)


def build_denoiser() -> UNet2DModel:
    """Four resolutions, attention at 4x4."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
    )
