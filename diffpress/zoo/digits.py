"""`zoo:digits`: class-conditional 32x32 digits, a DiTPipeline of under five million parameters."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor

from .autoencoder import train_autoencoder
from .data import load_digits
from .trainer import Schedule, train_

NO_CLASS = 1000
"""The label DiTPipeline hard-codes for the unconditional half."""
CLASS_DROPOUT = 0.1
AUTOENCODER = Schedule(steps=1000, rate=2e-3, save_every=200)
DENOISER = Schedule(steps=2800, rate=1e-3, save_every=250)
BATCH = 64


def train(data: Path, out: Path, work: Path, seed: int, steps: int | None = None) -> None:
    """Train on the npz at `data` and write the pipeline folder `out`; checkpoints live in `work`."""
    digits = load_digits(data, "train")
    torch.manual_seed(seed)
    vae, transformer = build_autoencoder(), build_denoiser()
    latents = train_autoencoder(vae, digits.images, BATCH, AUTOENCODER, work / "vae.safetensors", seed)
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    schedule = Schedule(steps or DENOISER.steps, DENOISER.rate, save_every=DENOISER.save_every)
    train_denoiser_(transformer, scheduler, latents, digits.labels, schedule, work / "dit.safetensors", seed)
    pipeline = DiTPipeline(transformer, vae, scheduler).to(dtype=torch.float16)
    pipeline.register_to_config(id2label={str(index): str(index) for index in range(10)})
    pipeline.save_pretrained(out)


def build_autoencoder() -> AutoencoderKL:
    """32x32x1 to 8x8x4."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def build_denoiser() -> DiTTransformer2DModel:
    """Eight blocks of width 128 over the 64 latent positions."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        sample_size=8,
        patch_size=1,
        num_embeds_ada_norm=NO_CLASS,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )


def train_denoiser_(
    transformer: DiTTransformer2DModel,
    scheduler: DDIMScheduler,
    latents: Tensor,
    labels: Tensor,
    schedule: Schedule,
    checkpoint: Path,
    seed: int,
) -> None:
    """Train `transformer` in place on latents [N, 4, 8, 8] and labels [N]."""
    transformer.train()

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < CLASS_DROPOUT
        classes = torch.where(dropped, NO_CLASS, labels[chosen])
        target = latents[chosen]
        noise = torch.randn(target.shape, generator=generator)
        steps = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
        noisy = scheduler.add_noise(target, noise, steps)
        with torch.autocast("cpu", torch.bfloat16):
            output = transformer(noisy, timestep=steps, class_labels=classes).sample
        return F.mse_loss(output.float(), scheduler.get_velocity(target, noise, steps))

    train_(transformer, loss, schedule, checkpoint, seed)
    transformer.eval()
