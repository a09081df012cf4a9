"""Pictures, videos and sounds drawn by code: they serve where a pipeline needs one and none is given."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Floats = NDArray[np.float32]
SHAPES = 7
FINE = 6.0
"""Standard deviation of the grain, in 8-bit levels: photographs have some."""
MOVED = 0.02
"""Share of the width that a video moves by from frame to frame."""


def draw_picture(index: int, width: int, height: int) -> Image.Image:
    """Picture number `index`: a coloured sky, overlapping shapes with soft shadows, and grain; the same on every machine."""
    random = np.random.RandomState(index)
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    corners = random.randint(20, 236, (4, 3))
    weights = [(1 - across) * (1 - down), across * (1 - down), (1 - across) * down, across * down]
    sky = sum(weight[..., None] * corner for weight, corner in zip(weights, corners, strict=True))
    drawn = Image.fromarray(np.asarray(sky).astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for _ in range(SHAPES):
        x, y = random.uniform(-0.1, 0.8, 2)
        wide, high = random.uniform(0.1, 0.5, 2)
        colour = tuple(int(level) for level in random.randint(0, 256, 3))
        box = [int(x * width), int(y * height), int((x + wide) * width) + 1, int((y + high) * height) + 1]
        (pen.ellipse if random.rand() < 0.6 else pen.rectangle)(box, fill=colour)
    grain = random.normal(0, FINE, (height, width, 1))
    return Image.fromarray((np.asarray(drawn) + grain).clip(0, 255).astype(np.uint8))


def draw_mask(index: int, width: int, height: int) -> Image.Image:
    """White, where it is painted anew, in about a quarter of a black picture."""
    random = np.random.RandomState(index)
    x, y = random.uniform(0.1, 0.4, 2)
    drawn = Image.new("L", (width, height))
    box = [int(x * width), int(y * height), int((x + 0.5) * width), int((y + 0.5) * height)]
    ImageDraw.Draw(drawn).ellipse(box, fill=255)
    return drawn


def draw_video(index: int, width: int, height: int, frames: int) -> list[Image.Image]:
    """A camera that moves over a picture to the right."""
    step = max(1, round(MOVED * width))
    wide = draw_picture(index, width + step * (frames - 1), height)
    return [wide.crop((step * frame, 0, step * frame + width, height)) for frame in range(frames)]


def draw_sound(index: int, channels: int, samples: int, rate: int) -> Floats:
    """[channels, samples]: three gliding tones that fade."""
    random = np.random.RandomState(index)
    seconds = np.arange(samples) / rate
    total = np.zeros((channels, samples))
    for _ in range(3):
        low, glide, fade = random.uniform(100, 1500), random.uniform(-200, 600), random.uniform(0.5, 3)
        tone = np.sin(2 * np.pi * (low + glide * seconds) * seconds) * np.exp(-fade * seconds)
        total += random.uniform(0.1, 0.3, (channels, 1)) * tone
    return total.astype(np.float32)
