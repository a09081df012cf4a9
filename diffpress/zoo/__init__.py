"""Small real pipelines, trained by this project and shipped with it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

PIPELINES = {
    "digits": "class-conditional 32x32 handwritten digits, DiTPipeline in latent space",
    "digits-unet": "unconditional 32x32 handwritten digits, DDIMPipeline in pixel space",
    "emoji": "text to a 64x64 emoji, StableDiffusionPipeline in latent space",
}
"""Name and one line on each."""


def zoo_folder(name: str) -> Path:
    """The shipped folder of one model."""
    return Path(str(files("diffpress.zoo") / "models" / name))
