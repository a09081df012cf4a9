"""Pictures, videos, sounds and arrays that a pipeline is called with: files, or what is drawn in their place."""

from __future__ import annotations

import hashlib
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor

from diffpress.export.errors import UserError

from .pictures import draw_mask, draw_picture, draw_sound, draw_video

Medium = Literal["image", "mask", "video", "audio", "array"]
STAND_IN_SECONDS = 1.0
EXAMPLES = {
    "image": "photo.png",
    "mask": "mask.png",
    "video": "clip.gif",
    "audio": "sound.wav",
    "array": "values.npy",
}
"""A file of each."""


class Setting(NamedTuple):
    """What is drawn in the place of a file that is not given."""

    width: int
    height: int
    frames: int
    rate: int
    """Samples of a sound a second."""
    channels: int
    """Of a sound."""


@dataclass(frozen=True)
class StandIn:
    """What diffpress draws where the user gave nothing."""

    medium: Medium
    index: int

    def open(self, setting: Setting) -> Any:
        """As `MediaFile.open`."""
        width, height = setting.width, setting.height
        draw: dict[Medium, Callable[[], Any]] = {
            "image": lambda: draw_picture(self.index, width, height),
            "mask": lambda: draw_mask(self.index, width, height),
            "video": lambda: draw_video(self.index, width, height, setting.frames),
            "audio": lambda: Sound(
                torch.from_numpy(
                    draw_sound(self.index, setting.channels, round(STAND_IN_SECONDS * setting.rate), setting.rate)
                ),
                setting.rate,
            ),
        }
        return draw[self.medium]()


class Sound(NamedTuple):
    """A recording."""

    samples: Tensor
    """[channels, T] in -1..1"""
    rate: int


@dataclass(frozen=True)
class MediaFile:
    """A file of the user's."""

    path: str
    medium: Medium
    sha256: str
    size: tuple[int, int] | None = None
    """Width and height that it is cropped and resized to; None leaves it as it is."""

    def open(self, setting: Setting) -> Any:
        """A picture, a list of them, a `Sound` or a tensor. Raises UserError where the file is none of it."""
        return _fitted(_read(Path(self.path), self.medium), self.size)


def media_file(path: Path, medium: Medium) -> MediaFile:
    """The file, read once to see that it can be. Raises UserError where it cannot."""
    _read(path, medium)
    content = [path] if path.is_file() else sorted(path.iterdir())
    digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in content))
    return MediaFile(str(path), medium, digest.hexdigest())


def picture_size(file: MediaFile) -> tuple[int, int] | None:
    """Width and height of a picture, a mask or a video's first frame."""
    found = _read(Path(file.path), file.medium)
    first = found[0] if isinstance(found, list) else found
    return first.size if isinstance(first, Image.Image) else None


def _read(path: Path, medium: Medium) -> Any:
    if not path.exists():
        raise UserError(f"there is no file {path}. Give {_a(medium)}, such as {EXAMPLES[medium]}.")
    try:
        return READERS[medium](path)
    except (
        UnidentifiedImageError,
        ValueError,
        EOFError,
        wave.Error,
        IndexError,
        Image.DecompressionBombError,
    ) as error:
        raise UserError(
            f"{path} cannot be read as {_a(medium)} ({error}). Give a file such as {EXAMPLES[medium]}."
        ) from error


def _a(medium: Medium) -> str:
    return f"{'an' if medium[0] in 'aeiou' else 'a'} {medium}"


def _read_image(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return ImageOps.exif_transpose(file).convert("RGB")


def _read_mask(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("L")


def _read_video(path: Path) -> list[Image.Image]:
    """The frames of a GIF, WebP or APNG, or the pictures of a folder by name."""
    if path.is_dir():
        return [_read_image(file) for file in sorted(path.iterdir()) if not file.name.startswith(".")]
    with Image.open(path) as file:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]


def _read_audio(path: Path) -> Sound:
    """A WAV of whole numbers, as [channels, T] in -1..1."""
    with wave.open(str(path)) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8).reshape(-1, width)
    # Little-endian, at the top of 32 bits all read alike; one byte is unsigned, more are signed.
    whole = np.zeros((len(raw), 4), np.uint8)
    whole[:, 4 - width :] = raw ^ 128 if width == 1 else raw
    samples = torch.from_numpy((whole.view("<i4")[:, 0] / 2.0**31).astype(np.float32))
    return Sound(samples.reshape(-1, channels).t().contiguous(), rate)


def _read_array(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False))


READERS: dict[Medium, Callable[[Path], Any]] = {
    "image": _read_image,
    "mask": _read_mask,
    "video": _read_video,
    "audio": _read_audio,
    "array": _read_array,
}


def _fitted(found: Any, size: tuple[int, int] | None) -> Any:
    if size is None:
        return found
    if isinstance(found, list):
        return [_fitted(frame, size) for frame in found]
    return ImageOps.fit(found, size) if isinstance(found, Image.Image) and found.size != size else found


def picture_tensor(picture: Image.Image) -> Tensor:
    """[1, C, H, W] in 0..1."""
    pixels = np.asarray(picture, np.float32) / 255
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)[None]
