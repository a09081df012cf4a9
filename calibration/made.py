"""What a pipeline gives back: images, videos, sounds or arrays, as one tensor, and how each is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from diffpress.export.errors import UnsupportedModelError

from .calls import OUTPUTS, OutputKind

STRIP = 8
"""Frames of a video that are shown beside each other."""
WINDOW, HOP = 512, 128
"""Samples that a spectrum is taken of, and from one to the next."""
FLOOR_DB = 80.0
"""Below the loudest that is black in a spectrogram."""
WIDEST = 1024
"""Spectra that a spectrogram is averaged down to."""


def made_of(output: Any, count: int) -> tuple[OutputKind, Tensor]:
    """What a call gave of `count` conditions, in single precision at least: images [N, C, H, W] or videos [N, F, C, H, W] in
    0..1, sounds [N, C, T], or arrays [N, ...].

    Raises UnsupportedModelError where there is nothing of the kind in it.
    """
    kind, value = _found(output)
    made = _tensor(value)
    if made is None:
        raise UnsupportedModelError(
            f"The pipeline gives back a {type(value).__name__}, and no image, video, sound or array: it cannot be compared."
        )
    kind, made = _in_form(kind, made)
    if len(made) != count and len(made) % count == 0:
        # Several images of one condition, as layers and frames that have no axis of their own are.
        made = made.unflatten(0, (count, -1))
        kind = "video" if kind == "image" else kind
    return kind, made.to(torch.promote_types(made.dtype, torch.float32))


def _found(output: Any) -> tuple[OutputKind, Any]:
    fields = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    for name, kind in OUTPUTS.items():
        if fields.get(name) is not None:
            return kind, fields[name]
    if isinstance(output, (tuple, list)) and output:
        return "array", output[0]
    values = [value for value in fields.values() if value is not None]
    return "array", values[0] if values else output


def _tensor(value: Any) -> Tensor | None:
    """[N, ...] with channels where the library puts them; None where there are no numbers in it."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        return None if value.dtype == object else _channels_first(torch.from_numpy(value))
    if isinstance(value, Image.Image):
        return _channels_first(torch.from_numpy(np.asarray(value.convert("RGB"), np.float32) / 255))
    if isinstance(value, (list, tuple)) and value:
        parts = [_tensor(item) for item in value]
        known = [part for part in parts if part is not None]
        if len(known) == len(parts) and len({part.shape for part in known}) == 1:
            return torch.stack(known)
    return None


def _channels_first(x: Tensor) -> Tensor:
    """[..., H, W, C] of images as [..., C, H, W]; others as they are."""
    if x.ndim >= 3 and x.shape[-1] in (1, 3, 4) and x.shape[-3] not in (1, 3, 4):
        return x.movedim(-1, -3)
    return x.movedim(-1, -3) if x.ndim >= 4 and x.shape[-1] in (1, 3, 4) else x


def _in_form(kind: OutputKind, made: Tensor) -> tuple[OutputKind, Tensor]:
    """With the axes of its kind; what has others is an array."""
    if kind == "audio":
        made = made[None] if made.ndim == 1 else made
        return ("audio", made[:, None] if made.ndim == 2 else made) if made.ndim <= 3 else ("array", made)
    if kind == "video" and made.ndim == 4:
        made = made[None]
    if kind == "image" and made.ndim == 3:
        made = made[None]
    coloured = made.ndim >= 4 and made.shape[-3] in (1, 3, 4)
    if kind == "array" or not coloured:
        return "array", made if made.ndim > 1 else made[None]
    return ("video" if made.ndim == 5 else "image"), made


def picture_of(kind: OutputKind, made: Tensor) -> Tensor:
    """[C, H, W] in 0..1, with 1 or 3 channels, that shows one output: a video's frames beside each other, a spectrogram, or
    an array from its lowest to its highest value.
    """
    made = made.float()
    if kind == "video":
        frames = made[_spread(len(made), STRIP)]
        return _shown(torch.cat(list(frames), -1))
    if kind == "image":
        return _shown(made)
    if kind == "audio":
        return spectrogram(made)
    flat = made.reshape(1, 1, -1) if made.ndim < 2 else made.reshape(1, -1, made.shape[-1])
    low, high = flat.min(), flat.max()
    return _averaged((flat - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny))


def _shown(image: Tensor) -> Tensor:
    """Without what is transparent."""
    return image[:3].clamp(0, 1)


def spectrogram(sound: Tensor) -> Tensor:
    """[1, frequencies, times] in 0..1 of a sound [C, T]: how loud each frequency is, in decibels below full scale."""
    padded = sound.mean(0)
    if len(padded) < WINDOW:
        padded = torch.nn.functional.pad(padded, (0, WINDOW - len(padded)))
    spectrum = torch.stft(padded, WINDOW, HOP, window=torch.hann_window(WINDOW), center=False, return_complex=True)
    # A sine at full scale has half the window's sum as its peak.
    loud = 20 * torch.log10(spectrum.abs() / (WINDOW / 4) + 1e-12)
    return _averaged((1 + loud / FLOOR_DB).clamp(0, 1).flip(0)[None])


def _averaged(picture: Tensor) -> Tensor:
    height, width = picture.shape[-2:]
    if max(height, width) <= WIDEST:
        return picture
    return adaptive_avg_pool2d(picture, (min(height, WIDEST), min(width, WIDEST)))


def _spread(count: int, most: int) -> list[int]:
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]
