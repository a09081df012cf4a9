"""Small autoencoders: trained once, then every image becomes a latent."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .trainer import Schedule, train_

KL_WEIGHT = 1e-5


def train_autoencoder(
    vae: AutoencoderKL, images: Tensor, batch: int, schedule: Schedule, checkpoint: Path, seed: int
) -> Tensor:
    """Fit `vae` to images [N, C, H, W] in -1..1, set its scaling factor and return the scaled latents of `images`."""
    vae.train().to(memory_format=torch.channels_last)

    def loss(generator: torch.Generator) -> Tensor:
        target = images[torch.randint(len(images), (batch,), generator=generator)]
        target = target.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        error = output.float() - target
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean()

    train_(vae, loss, schedule, checkpoint, seed)
    vae.eval()
    latents = encode(vae, images)
    factor = 1 / latents.std().item()
    vae.register_to_config(scaling_factor=factor)
    return latents * factor


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, batch: int = 128) -> Tensor:
    """Posterior means of images [N, C, H, W], unscaled."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(batch)])
