"""What pipelines give back, how it is measured and how it is shown."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffpress.calibration.made import FLOOR_DB, made_of, picture_of, spectrogram
from diffpress.calibration.metrics import psnr_db, quality
from diffpress.export.errors import UnsupportedModelError

RANDOM = np.random.RandomState(0)
TWO = RANDOM.rand(2, 6, 8, 3).astype(np.float32)
CLIPS = RANDOM.rand(2, 5, 6, 8, 3).astype(np.float32)
SOUNDS = RANDOM.rand(2, 2, 700).astype(np.float32) - 0.5
PICTURES = [Image.fromarray((own * 255).astype(np.uint8)) for own in TWO]


@pytest.mark.parametrize(
    ("output", "kind", "shape"),
    [
        (SimpleNamespace(images=TWO), "image", (2, 3, 6, 8)),
        (SimpleNamespace(images=PICTURES), "image", (2, 3, 6, 8)),
        (SimpleNamespace(images=torch.from_numpy(TWO).movedim(-1, 1)), "image", (2, 3, 6, 8)),
        ({"frames": CLIPS}, "video", (2, 5, 3, 6, 8)),
        ({"frames": list(CLIPS)}, "video", (2, 5, 3, 6, 8)),
        ({"frames": [PICTURES, PICTURES]}, "video", (2, 2, 3, 6, 8)),
        ({"frames": torch.from_numpy(CLIPS).movedim(-1, 2)}, "video", (2, 5, 3, 6, 8)),
        # Four pictures of two conditions.
        ({"images": np.concatenate([TWO, TWO])}, "video", (2, 2, 3, 6, 8)),
        ({"audios": SOUNDS}, "audio", (2, 2, 700)),
        ({"audios": SOUNDS[:, 0]}, "audio", (2, 1, 700)),
        ({"image_embeds": torch.zeros(2, 7), "other": 1}, "array", (2, 7)),
        ((torch.zeros(2, 4, 6, 8),), "array", (2, 4, 6, 8)),
        (torch.zeros(2, 16), "array", (2, 16)),
    ],
)
def test_whatever_comes_back_is_one_tensor(output: Any, kind: str, shape: tuple[int, ...]) -> None:
    found, made = made_of(output, 2)
    assert (found, tuple(made.shape)) == (kind, shape)
    assert made.dtype == torch.float32


def test_what_holds_no_numbers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="gives back a str, and no image"):
        made_of(SimpleNamespace(text="a cat"), 1)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("image", torch.rand(2, 3, 16, 16)),
        ("video", torch.rand(2, 5, 3, 16, 16)),
        ("audio", torch.rand(2, 2, 3000) - 0.5),
        ("array", 100 * torch.randn(2, 4, 6, 8)),
    ],
)
def test_more_noise_is_worse_by_every_measure(kind: Any, value: torch.Tensor) -> None:
    torch.manual_seed(0)
    noise = torch.randn_like(value) * value.std()
    equal, near, far = (quality(kind, value + share * noise, value) for share in (0, 0.01, 0.1))
    assert equal.psnr_db == pytest.approx([100, 100], abs=1e-3)
    assert all(a > b for a, b in zip(near.psnr_db, far.psnr_db, strict=True))
    assert equal.ssim >= near.ssim > far.ssim
    if kind == "audio":
        # Noise of a hundredth of the sound's deviation; its mean and that of the sample are not 0 exactly.
        assert near.more["snr_db"] == pytest.approx(40, abs=1)
        assert near.more["snr_db"] - far.more["snr_db"] == pytest.approx(20, abs=1e-2)


def test_all_frames_count() -> None:
    video = torch.rand(1, 20, 3, 16, 16)
    broken = video.clone()
    broken[:, 13] = 1 - broken[:, 13]
    # One frame of twenty differs.
    expected = psnr_db(broken[:, 13], video[:, 13]) + 10 * math.log10(20)
    assert quality("video", broken, video).psnr_db == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_video_is_shown_as_frames_beside_each_other() -> None:
    video = torch.rand(3, 3, 4, 6)
    assert torch.equal(picture_of("video", video), torch.cat([*video], -1))
    assert picture_of("video", torch.rand(30, 3, 4, 6)).shape == (3, 4, 8 * 6)


def test_a_sine_is_a_line_in_the_spectrogram() -> None:
    # 16 periods a window: the middle of a frequency's band.
    sine = 0.1 * torch.sin(2 * math.pi * 16 / 512 * torch.arange(4000))[None]
    shown = spectrogram(sine)[0]
    assert shown.shape[0] == 257
    assert set(shown.argmax(0).tolist()) == {256 - 16}
    # 0.1 of full scale is 20 dB below it.
    assert float(shown.max()) == pytest.approx(1 - 20 / FLOOR_DB, abs=1e-3)


def test_everything_can_be_shown() -> None:
    for kind, value in (("image", torch.rand(4, 8, 8)), ("audio", torch.zeros(1, 10)), ("array", torch.randn(9))):
        shown = picture_of(kind, value)  # type: ignore[arg-type]
        assert shown.ndim == 3
        assert shown.shape[0] in (1, 3)
        assert 0 <= float(shown.min()) <= float(shown.max()) <= 1
