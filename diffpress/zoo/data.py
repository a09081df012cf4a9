"""The two data sets the zoo is trained on, as tensors in -1..1."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpress.export.errors import UserError


class Digits(NamedTuple):
    """MNIST padded to 32x32: images [N, 1, 32, 32] in -1..1, labels [N] in 0..9."""

    images: Tensor
    labels: Tensor


class Emoji(NamedTuple):
    """Noto emoji at 64x64: images [N, 3, 64, 64] in -1..1, one caption each."""

    images: Tensor
    captions: list[str]


def load_digits(path: Path, split: str) -> Digits:
    """Read `train` or `test` from an npz with `{split}_x` uint8 [N, 28, 28] and `{split}_y`."""
    pixels, labels = _arrays(path, f"{split}_x", f"{split}_y")
    images = F.pad(torch.from_numpy(pixels)[:, None].float(), (2, 2, 2, 2))
    return Digits(images / 127.5 - 1, torch.from_numpy(labels).long())


def load_emoji(path: Path) -> Emoji:
    """Read an npz with `image` uint8 [N, 72, 72, 3] and `caption`; skin-tone variants are left out."""
    pixels, names = _arrays(path, "image", "caption")
    captions = [str(name) for name in names]
    kept = [index for index, caption in enumerate(captions) if " skin" not in caption]
    images = torch.from_numpy(pixels[kept]).permute(0, 3, 1, 2).float() / 127.5 - 1
    images = F.interpolate(images, size=(64, 64), mode="bicubic", antialias=True).clamp(-1, 1)
    return Emoji(images, [captions[index] for index in kept])


def _arrays(path: Path, *names: str) -> list[np.ndarray]:
    """The named arrays of an npz file. Raises UserError where it is none or lacks one; pickles are refused."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"--data {path} must be an npz file with the arrays {' and '.join(names)} ({error})."
        ) from error
