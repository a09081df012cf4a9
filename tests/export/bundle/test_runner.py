"""The runner: Python's image, and one sentence for whatever it does not take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffpress.export.bundle.manifest import BUNDLE
from diffpress.export.engines.onnxruntime import ONNXRUNTIME
from diffpress.export.portable.manifest import EXPORT
from diffpress.export.portable.pipeline import PortablePipeline

PROMPT = "Slice of PIZZA, café"


def psnr(left: np.ndarray, right: np.ndarray) -> float:
    """In dB, of images in 0..1."""
    return float(-10 * np.log10(max(np.square(left - right).mean(), 1e-12)))


def image_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), np.float64) / 255


@pytest.mark.parametrize("more", [{}, {"steps": 10, "seed": 2**40 + 3, "guidance_scale": 1.0}])
def test_draws_what_python_draws(run_alone, unzipped_once, prompt_export, tmp_path, more: dict[str, Any]):
    """Sums over terms are rounded in another order, which moves no pixel further than the next of 255 levels.

    Were a pixel in a hundred at an edge between two, images would be 20 + 48 dB apart.
    """
    options = [word for name, value in more.items() for word in (f"--{name.removesuffix('_scale')}", value)]
    done = run_alone(unzipped_once, "--prompt", PROMPT, *options, "--out", tmp_path / "a.png")
    assert done.status == 0, done.errors
    expected = PortablePipeline(prompt_export, ONNXRUNTIME, 1).generate(PROMPT, **more)
    assert psnr(image_of(tmp_path / "a.png"), (expected * 255).round() / 255) >= 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]


def test_self_test_and_bench(run_alone, unzipped_once, tmp_path):
    done = run_alone(unzipped_once, "--selftest", "--out", tmp_path / "a.png")
    assert done.status == 0, done.errors
    assert psnr(image_of(tmp_path / "a.png"), image_of(unzipped_once / "selftest.png")) >= 60
    done = run_alone(unzipped_once, "--bench", "--prompt", "a", "--steps", 4)
    found = json.loads(done.output)
    assert found["steps"] == 4
    assert 0 < found["denoiser_ms"] * 4 < found["image_ms"]
    assert found["peak_memory_bytes"] > 1e7


def test_a_prompt_that_is_too_long_is_cut_and_said(run_alone, unzipped_once, tmp_path):
    done = run_alone(unzipped_once, "--prompt", "red " * 40, "--steps", 4, "--out", tmp_path / "a.png")
    assert done.status == 0
    assert "its last" in done.errors
    assert "tokens were cut" in done.errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--out is missing"),
        (("--out", "a.jpg"), "must end in .png"),
        (("--out", "a.png", "--fast"), "--fast is no option"),
        (("--out", "a.png", "more"), "more is no option"),
        (("--out",), "--out needs a value"),
        (("--out", "a.png", "--prompt", "a", "--label", "1"), "not both"),
        (("--out", "a.png", "--label", "1"), "does not draw classes: give --prompt TEXT"),
        (("--out", "a.png", "--steps", "7"), "no schedule of 7 steps. Use one of 4, 6, 10"),
        (("--out", "a.png", "--steps", "0"), "--steps 0 must be a whole number from 1"),
        (("--out", "a.png", "--seed", "-1"), "--seed -1 must be a whole number"),
        (("--out", "a.png", "--seed", str(2**63)), "must be a whole number"),
        (("--out", "a.png", "--guidance", "nan"), "must be a finite number"),
        (("--out", "a.png", "--prompt", b"\xff"), "not text in UTF-8"),
        (("--out", "no/such/a.png", "--steps", "4"), "no/such/a.png cannot be written"),
    ],
)
def test_wrong_arguments_are_refused(unzipped_once, tmp_path, monkeypatch, arguments, said):
    import subprocess

    done = subprocess.run([unzipped_once / "diffpress-run", *arguments], capture_output=True, cwd=tmp_path, check=False)
    refused(done.returncode, done.stderr.decode(errors="replace"), said)
    assert list(tmp_path.iterdir()) == []


def refused(status: int, errors: str, said: str) -> None:
    assert status == 2, errors
    assert said in errors
    assert errors.startswith("diffpress-run: ")
    assert errors.count("\n") == 1


def replaced(file: Path, content: bytes) -> None:
    """Another file in the place of a link."""
    file.unlink()
    file.write_bytes(content)


def edited(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(file.read_text())
    edit(data)
    replaced(file, json.dumps(data).encode())


@pytest.mark.parametrize(
    "name", ["export/denoiser.onnx.data", "export/export.json", "tokenizer.bin", "lib/libonnxruntime.so", "README.txt"]
)
def test_a_changed_file_is_refused(run_alone, unzipped, tmp_path, name):
    content = bytearray((unzipped / name).read_bytes())
    content[-2] ^= 1
    replaced(unzipped / name, bytes(content))
    done = run_alone(unzipped, "--prompt", "a", "--out", tmp_path / "a.png")
    refused(done.status, done.errors, name.removeprefix("export/") if name.endswith("json") else name)
    assert not (tmp_path / "a.png").exists()


BUNDLES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda data: data.update(peak_memory_bytes=2**60), "MiB are free here"),
    (lambda data: data.update(schema_version=9), "made by a newer diffpress"),
    (lambda data: data.update(library="../libonnxruntime.so"), "leaves the bundle"),
    (lambda data: data.update(folder="/tmp"), "leaves the bundle"),
    (lambda data: data["files"].update({"a/../../b": {"size_bytes": 1, "sha256": ""}}), "leaves the bundle"),
    (lambda data: data["files"].update({"none": {"size_bytes": 1, "sha256": ""}}), "none cannot be read"),
    (lambda data: data["files"].pop("export/denoiser.onnx"), "lists no digest of export/denoiser.onnx"),
    (lambda data: data["files"].pop("tokenizer.bin"), "lists no digest of tokenizer.bin"),
    (lambda data: data.pop("library"), "bundle.json is damaged: it lacks library"),
    (lambda data: data.update(files=[]), "bundle.json is damaged: files is no object"),
    (lambda data: data.update(peak_memory_bytes=-1), "peak_memory_bytes is no whole number"),
]


@pytest.mark.parametrize(("edit", "said"), BUNDLES)
def test_a_manifest_that_is_wrong_is_refused(run_alone, unzipped, tmp_path, edit, said):
    edited(unzipped / BUNDLE, edit)
    done = run_alone(unzipped, "--prompt", "a", "--out", tmp_path / "a.png")
    refused(done.status, done.errors, said)


AHEAD = {"weights": [[9, 1.0]], "low": None, "high": None}
EXPORTS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda data: data.update(latent_shape=[2**16] * 3), "latent_shape is out of all bounds"),
    (lambda data: data.update(latent_shape=[4, 8]), "latent_shape has not three sides"),
    (lambda data: data.update(latent_shape=[1e300, 8, 8]), "latent_shape is no whole number"),
    (lambda data: data["schedules"]["4"]["coefficients"].pop(), "no numbers for some of its calls"),
    (lambda data: data["schedules"]["4"]["coefficients"][1].pop(), "a row of coefficients has another length"),
    (lambda data: data["schedules"]["4"].update(updates=[[]] * 4), "an update has no operations"),
    (lambda data: data["schedules"]["4"].update(updates=[[AHEAD]] * 4), "weights is no whole number from 0 to 1"),
    (lambda data: data["schedules"].pop("6"), "no schedule for its own steps"),
    (lambda data: data["schedules"].update({"1e9": data["schedules"]["4"]}), "is no number of steps"),
    (lambda data: data["components"].pop("denoiser"), "it has no denoiser"),
    (lambda data: data["components"]["denoiser"]["inputs"][0].update(dtype="complex64"), "complex64 is unknown"),
    (lambda data: data["components"]["denoiser"]["inputs"][0].update(shape=[2**16] * 9), "out of all bounds"),
    (lambda data: data["components"]["denoiser"].update(file="/etc/passwd"), "lists no digest of export//etc/passwd"),
    (lambda data: data.update(schema_version=99), "made by a newer diffpress"),
    (lambda data: data.update(step_plan={"kept": [], "calls": {}}), "step plan does not fit"),
]


@pytest.mark.parametrize(("edit", "said"), EXPORTS)
def test_tables_that_are_wrong_are_refused(run_alone, unzipped, tmp_path, edit, said):
    edited(unzipped / "export" / EXPORT, edit)
    done = run_alone(unzipped, "--prompt", "a", "--out", tmp_path / "a.png")
    refused(done.status, done.errors, said)


def test_damaged_json_and_links_are_refused(run_alone, unzipped, tmp_path):
    whole = (unzipped / BUNDLE).read_bytes()
    for content in (b"", whole[:-9], b"[" * 10**6, b'{"a":' * 10**5, b"[1]", b'"\xff"'):
        replaced(unzipped / BUNDLE, content)
        done = run_alone(unzipped, "--prompt", "a", "--out", tmp_path / "a.png")
        refused(done.status, done.errors, "bundle.json is damaged")
    replaced(unzipped / BUNDLE, whole)
    (unzipped / "tokenizer.bin").rename(tmp_path / "elsewhere")
    (unzipped / "tokenizer.bin").symlink_to(tmp_path / "elsewhere")
    done = run_alone(unzipped, "--prompt", "a", "--out", tmp_path / "a.png")
    refused(done.status, done.errors, "leaves the bundle")


def test_a_library_that_is_none_is_refused(run_alone, unzipped, tmp_path):
    replaced(unzipped / "lib" / "libonnxruntime.so", b"no library")
    edited(unzipped / BUNDLE, lambda data: data["files"].pop("lib/libonnxruntime.so"))
    done = run_alone(unzipped, "--prompt", "a", "--out", tmp_path / "a.png")
    refused(done.status, done.errors, "onnxruntime cannot be opened")
