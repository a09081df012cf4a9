"""Pipelines that are called with more than a text, and give back more than images: the whole way."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image
from transformers import T5Config, T5EncoderModel

from diffpress.calibration.media import StandIn
from diffpress.calibration.trajectory import Trajectories
from diffpress.export.artifact import open_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.flow import compress
from diffpress.recipe import load_recipe
from diffpress.stages import recorded_conditions, sampling_of
from diffpress.zoo.emoji import train_tokenizer

RECIPE = """
sampling: {steps: 4, call: {strength: 0.5}}
record: {trajectories: 3, batch: 2, calls: [{prompt: red, image: red.png}, {prompt: blue, image: blue.png}]}
quantize: {method: ptq, weights: 8, activations: 8}
"""


@pytest.fixture(scope="module")
def as_class(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """A function: the models of `tiny_text` as a pipeline of another class."""

    def make(pipeline_class: Any) -> Path:
        folder = tmp_path_factory.mktemp(pipeline_class.__name__) / "pipeline"
        pipeline_class.from_pretrained(tiny_text, torch_dtype=torch.float16).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def image_to_image(as_class: Callable[[Any], Path]) -> Path:
    return as_class(StableDiffusionImg2ImgPipeline)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with a recipe and its pictures."""
    for name, colour in (("red", (200, 10, 10)), ("blue", (10, 10, 200))):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.long
def test_calls_of_a_recipe_are_recorded_and_measured(image_to_image: Path, pictures: Path) -> None:
    source, recipe = PipelineFolder(image_to_image, "x"), load_recipe(pictures / "recipe.yaml")
    pipeline = open_pipeline(source)
    wanted = recorded_conditions(pipeline, recipe)
    assert [condition.text for condition in wanted] == ["red", "blue", "red"]
    assert [Path(condition.arguments["image"].path).name for condition in wanted] == ["red.png", "blue.png", "red.png"]
    assert sampling_of(pipeline, recipe).call == {"strength": 0.5}

    artifact = compress(source, recipe, pictures / "out")
    metrics = artifact.manifest.metrics
    # Half of the four steps are left.
    assert metrics["steps"] == 2
    assert metrics["drawn_arguments"] == []
    assert metrics["psnr_db"] > 20
    report = (pictures / "out" / "report.html").read_text(encoding="utf-8")
    assert "“blue”" in report
    assert "drawings" not in report


def test_a_changed_picture_is_another_request(image_to_image: Path, pictures: Path) -> None:
    from diffpress.flow import _request

    source, recipe = PipelineFolder(image_to_image, "x"), load_recipe(pictures / "recipe.yaml")
    before = _request(source, recipe, "cpu")
    assert _request(source, load_recipe(pictures / "recipe.yaml"), "cpu") == before
    Image.new("RGB", (16, 16)).save(pictures / "blue.png")
    assert _request(source, recipe, "cpu") != before


def test_each_call_with_a_picture_is_recorded_by_itself(image_to_image: Path, tmp_path: Path) -> None:
    from diffpress.calibration.conditions import Condition
    from diffpress.calibration.sampling import Sampling
    from diffpress.calibration.trajectory import record

    pipeline = open_pipeline(PipelineFolder(image_to_image, "x"))
    wanted = [Condition("red", seed, {"image": StandIn("image", seed)}) for seed in (0, 1)]
    runs = record(pipeline, wanted, Sampling(4), tmp_path, batch=2)
    assert isinstance(runs, Trajectories)
    assert [runs.images(shard) for shard in runs.shards] == [1, 1]
    inputs = [runs.call(shard, 0).inputs["sample"] for shard in runs.shards]
    assert not torch.equal(*inputs)


@pytest.mark.long
def test_drawings_stand_in_and_are_told(
    as_class: Callable[[Any], Path], diffpress: Callable[..., Any], tmp_path: Path
) -> None:
    inpaint = as_class(StableDiffusionInpaintPipeline)
    report = tmp_path / "report.html"
    found = diffpress("compare", inpaint, inpaint, "--count", 1, "--steps", 2, "--report", report, "--json")
    assert found.status == 0
    metrics = json.loads(found.output)
    assert metrics["drawn_arguments"] == ["image", "mask_image"]
    assert metrics["psnr_db"] == pytest.approx(100)
    assert "Nothing was given as image and mask_image: drawings" in report.read_text(encoding="utf-8")


def test_run_asks_for_a_picture_before_any_work(
    image_to_image: Path, diffpress: Callable[..., Any], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = pictures / "out.png"
    start = ("run", image_to_image, "--prompt", "red", "--steps", 4, "--out", out)
    done = diffpress(*start, "--image", pictures / "red.png", "--set", "sampling.call.strength=0.5")
    assert (done.status, " ".join(done.output.split())) == (0, f"{out}: 16x16, seed 0, torch")
    first = out.read_bytes()
    assert diffpress(*start, "--image", pictures / "blue.png", "--set", "sampling.call.strength=0.5").status == 0
    assert out.read_bytes() != first

    monkeypatch.setattr("diffpress.export.artifact.open_pipeline", lambda *_, **__: pytest.fail("weights were read"))
    refused = diffpress(*start)
    assert refused.status == 2
    assert "needs image: give --image photo.png" in refused.errors.replace("\n", " ")
    for more, words in (
        (("--image", "no.png"), "there is no file no.png"),
        (("--image", pictures / "red.png", "--height", 16), "--height 16: a StableDiffusionImg2ImgPipeline takes none"),
        (("--set", "sampling.call.strenth=1"), "Did you mean strength?"),
        (("--set", "record.batch=1"), "only sampling.* can be set here"),
    ):
        refused = diffpress(*start, *more)
        assert refused.status == 2
        assert words in " ".join(refused.errors.split())


def test_what_the_pipeline_itself_refuses_is_one_message(
    image_to_image: Path, diffpress: Callable[..., Any], pictures: Path
) -> None:
    image = pictures / "red.png"
    refused = diffpress(
        "run", image_to_image, "--image", image, "--set", "sampling.call.strength=3", "--out", pictures / "a.png"
    )
    assert refused.status == 2
    words = " ".join(refused.errors.split())
    assert "StableDiffusionImg2ImgPipeline does not take this call: The value of strength should in [0.0, 1.0]" in words
    assert "Traceback" not in words


@pytest.fixture(scope="module")
def tiny_sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableAudioPipeline that makes sounds of two channels."""
    folder = tmp_path_factory.mktemp("tiny-sound")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["rain on a roof"], folder / "vocabulary")
    encoder = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    pipeline = StableAudioPipeline(
        vae=AutoencoderOobleck(
            encoder_hidden_size=8,
            downsampling_ratios=[2, 4],
            decoder_channels=3,
            decoder_input_channels=4,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=800,
        ),
        text_encoder=T5EncoderModel(encoder),
        projection_model=StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=8, min_value=0, max_value=32),
        tokenizer=tokenizer,
        transformer=StableAudioDiTModel(
            sample_size=100,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            out_channels=4,
            cross_attention_dim=16,
            time_proj_dim=8,
            global_states_input_dim=16,
            cross_attention_input_dim=8,
        ),
        scheduler=EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def test_a_sound_is_written_and_given(tiny_sound: Path, diffpress: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "rain.wav"
    start = ("run", tiny_sound, "--prompt", "rain", "--steps", 2, "--set", "sampling.call.audio_end_in_s=1")
    done = diffpress(*start, "--out", out)
    assert (done.status, " ".join(done.output.split())) == (0, f"{out}: 1.00 s at 800 Hz, seed 0, torch")
    with wave.open(str(out)) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 800, 800)
        sound = np.frombuffer(file.readframes(800), "<i2")
    assert sound.any()
    given = f"sampling.call.initial_audio_waveforms={out}"
    assert diffpress(*start, "--set", given, "--out", tmp_path / "other.wav").status == 0
    assert (tmp_path / "other.wav").read_bytes() != out.read_bytes()
    assert diffpress(*start, "--out", tmp_path / "rain.png").status == 0
    assert Image.open(tmp_path / "rain.png").mode == "L"
    refused = diffpress(*start, "--out", tmp_path / "rain.mp3")
    assert refused.status == 2
    assert "must end in .wav (a sound) or .png (its spectrogram)" in " ".join(refused.errors.split())
