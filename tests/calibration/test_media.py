"""Files that pipelines are called with, and what is drawn in their place."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffpress.calibration.calls import call_of
from diffpress.calibration.given import Given, given_to, read_calls
from diffpress.calibration.media import Setting, StandIn, media_file
from diffpress.export.errors import RecipeError, UserError

SMALL = Setting(24, 16, 3, 8000, 2)
INPAINT = call_of(diffusers.StableDiffusionInpaintPipeline)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_picture_is_read_as_it_is(photo: Path) -> None:
    file = media_file(photo, "image")
    assert np.array_equal(np.asarray(file.open(SMALL)), np.asarray(Image.open(photo)))
    assert media_file(photo, "mask").open(SMALL).mode == "L"


def test_other_files_of_one_name_are_other_files(photo: Path) -> None:
    before = media_file(photo, "image")
    Image.new("RGB", (30, 20)).save(photo)
    assert media_file(photo, "image") != before


def test_a_video_is_a_file_of_frames_or_a_folder_of_pictures(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 128, 255)]
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    (tmp_path / "clip").mkdir()
    for index, frame in enumerate(frames):
        frame.save(tmp_path / "clip" / f"{index}.png")
    for name in ("clip.webp", "clip"):
        found = media_file(tmp_path / name, "video").open(SMALL)
        assert [frame.getpixel((0, 0)) for frame in found] == [(0, 0, 0), (128, 0, 0), (255, 0, 0)]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_sounds_of_every_width_are_between_minus_one_and_one(tmp_path: Path, width: int) -> None:
    whole = [-(2 ** (8 * width - 1)), 0, 2 ** (8 * width - 1) - 1, 0]
    unsigned = 128 if width == 1 else 0
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((2, width, 8000, 0, "NONE", ""))
        values = [(value + unsigned).to_bytes(width, "little", signed=width > 1) for value in whole]
        file.writeframes(b"".join(values))
    sound = media_file(tmp_path / "a.wav", "audio").open(SMALL)
    assert sound.rate == 8000
    # The largest whole number is one step below 1.
    assert torch.allclose(sound.samples, torch.tensor([[-1.0, 1.0], [0, 0]]), rtol=0, atol=2.0 ** (1 - 8 * width))


@pytest.mark.parametrize(
    ("name", "content", "medium", "words"),
    [
        ("no.png", None, "image", "there is no file .*no.png. Give an image, such as photo.png"),
        ("a.png", b"text", "image", "a.png cannot be read as an image"),
        ("a.wav", b"text", "audio", "a.wav cannot be read as an audio"),
        ("a.npy", b"text", "array", "a.npy cannot be read as an array"),
    ],
)
def test_what_is_no_such_file_is_refused(
    tmp_path: Path, name: str, content: bytes | None, medium: Any, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        media_file(tmp_path / name, medium)


def test_drawings_are_the_same_every_time_and_differ_by_number() -> None:
    for medium in ("image", "mask"):
        first, again, other = (np.asarray(StandIn(medium, index).open(SMALL)) for index in (0, 0, 1))
        assert first.shape[:2] == (16, 24)
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
    video = StandIn("video", 0).open(SMALL)
    assert [frame.size for frame in video] == [(24, 16)] * 3
    assert np.asarray(video[0]).tobytes() != np.asarray(video[1]).tobytes()
    sound = StandIn("audio", 0).open(SMALL)
    assert sound.samples.shape == (2, 8000)
    assert 0 < float(sound.samples.abs().max()) <= 1


def test_what_is_not_given_is_drawn(photo: Path) -> None:
    given = given_to(INPAINT, {"strength": 0.5}, [{"prompt": "a", "image": "photo.png"}, {"prompt": "b"}], photo.parent)
    assert given.texts(INPAINT) == ["a", "b"]
    first, second = (given.arguments(INPAINT, index, 10) for index in (0, 1))
    assert first == {"image": media_file(photo, "image"), "mask_image": StandIn("mask", 10)}
    assert second == {"image": StandIn("image", 11), "mask_image": StandIn("mask", 11)}
    assert Given().arguments(call_of(diffusers.DDPMPipeline), 0, 0) == {}


def test_pictures_of_other_sizes_are_fitted_to_the_first(photo: Path) -> None:
    Image.new("RGB", (50, 70)).save(photo.with_name("tall.png"))
    given = given_to(INPAINT, {}, [{"image": "photo.png"}, {"image": "tall.png"}], photo.parent)
    assert [given.arguments(INPAINT, index, 0)["image"].open(SMALL).size for index in (0, 1)] == [(30, 20)] * 2


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([{"prompt": "a"}, {}], r"record.calls\[1\] has no prompt, but others have"),
        ([{"height": 8}, {"height": 16}], r"record.calls\[1\].height: all outputs have one size"),
        ([{"prompt": ["a", "b"]}], r"record.calls\[0\].prompt = \['a', 'b'\]: give one text"),
        ([{"imag": "x.png"}], r"record.calls\[0\].imag: .* Did you mean image\?"),
    ],
)
def test_calls_that_do_not_fit_are_refused(calls: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        given_to(INPAINT, {}, calls)


@pytest.mark.parametrize("text", ["", "[]", "{a: 1}", "[1]", "[{]", "\0"])
def test_a_file_that_lists_no_calls_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "calls.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"record\.calls"):
        read_calls(tmp_path / "calls.yaml")


def test_json_is_read_as_well(tmp_path: Path) -> None:
    (tmp_path / "calls.json").write_text('[{"prompt": "a", "strength": 0.5}]')
    assert read_calls(tmp_path / "calls.json") == [{"prompt": "a", "strength": 0.5}]
