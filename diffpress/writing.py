"""What `run` made as a file: an image, a moving or still picture of a video, a sound or its spectrogram, an array."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diffpress.export.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from diffpress.calibration.calls import OutputKind

FRAME_MS = 125
"""Eight frames a second."""
ENDINGS = {
    "image": {".png": "an image"},
    "video": {".gif": "a video", ".webp": "the same in more colours", ".png": "frames beside each other"},
    "audio": {".wav": "a sound", ".png": "its spectrogram"},
    "array": {".npy": "an array", ".png": "a picture of it"},
}
"""Of files that each kind of output can be written to."""


class Made(NamedTuple):
    """One output."""

    kind: OutputKind
    value: Tensor
    """An image [C, H, W] or frames [F, C, H, W] in 0..1, a sound [C, T], or an array."""
    rate: int
    """Samples a second of a sound."""

    def words(self) -> str:
        """Its size."""
        height, width = self.value.shape[-2:] if self.value.ndim > 1 else (1, *self.value.shape)
        if self.kind == "audio":
            return f"{width / self.rate:.2f} s at {self.rate} Hz"
        if self.kind == "array":
            return " x ".join(map(str, self.value.shape))
        return f"{width}x{height}" + (f", {len(self.value)} frames" if self.kind == "video" else "")


def check_ending(out: Path, kind: OutputKind) -> None:
    """Raises UserError where an output of that kind cannot be written to a file of that name."""
    known = ENDINGS[kind]
    if out.suffix.lower() not in known:
        words = " or ".join(f"{ending} ({what})" for ending, what in known.items())
        raise UserError(f"--out {out} must end in {words}.")


def write_made(file: Path, made: Made) -> None:
    """Write it in the form that the file's ending names."""
    check_ending(file, made.kind)
    ending, value = file.suffix.lower(), made.value
    if ending == ".npy":
        np.save(file, value.numpy())
    elif ending == ".wav":
        _write_wave(file, value, made.rate)
    elif ending == ".png":
        from diffpress.calibration.made import picture_of

        shown = value if made.kind == "image" else picture_of(made.kind, value)
        to_picture(shown.permute(1, 2, 0).numpy()).save(file)
    else:
        first, *others = (to_picture(frame.permute(1, 2, 0).numpy()) for frame in value)
        first.save(file, save_all=True, append_images=others, duration=FRAME_MS, loop=0)


def _write_wave(file: Path, sound: Tensor, rate: int) -> None:
    """16 bits a sample."""
    whole = (sound.clamp(-1, 1) * 32767).round().numpy().astype("<i2")
    with wave.open(str(file), "wb") as written:
        written.setnchannels(len(whole))
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes(whole.T.tobytes())


def to_picture(pixels: np.ndarray) -> Image:
    """Pixels [H, W, C] in 0..1 as an 8-bit image, grey where C is 1."""
    from PIL import Image

    rounded = (pixels * 255).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(rounded[:, :, 0] if rounded.shape[2] == 1 else rounded)
