"""Pipelines of flow matching, which set up their own sigmas and shift, with learning: the whole way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from diffpress.export.artifact import verify
from diffpress.export.folder import PipelineFolder
from diffpress.flow import compress
from diffpress.recipe import parse_recipe
from diffpress.zoo.emoji import train_tokenizer

RECIPE = {
    "sampling": {"steps": 3},
    "record": {"trajectories": 4, "batch": 2},
    "quantize": {
        "method": "qalora",
        "weights": 4,
        "activations": 8,
        "iterations": 3,
        "batch": 2,
        "rank": 2,
        "validation_images": 1,
        "rollout_share": 0.5,
    },
}


def autoencoder(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def text_config(words: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def long_text_encoder(words: int, width: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=words, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def stable_diffusion_3(folder: Path, scheduler: object) -> DiffusionPipeline:
    tokenizer = train_tokenizer(["red apple", "blue car"], folder / "vocabulary")
    first, second = (CLIPTextModelWithProjection(text_config(len(tokenizer))) for _ in range(2))
    long = long_text_encoder(len(tokenizer), 32)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
    )
    return StableDiffusion3Pipeline(
        transformer, scheduler, autoencoder(4), first, tokenizer, second, tokenizer, long, tokenizer
    )


def flux(folder: Path, scheduler: object) -> DiffusionPipeline:
    tokenizer = train_tokenizer(["red apple", "blue car"], folder / "vocabulary")
    long = long_text_encoder(len(tokenizer), 16)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    short = CLIPTextModel(text_config(len(tokenizer)))
    return FluxPipeline(scheduler, autoencoder(1), short, tokenizer, long, tokenizer, transformer)


CASES: dict[str, tuple[Callable[[Path, object], DiffusionPipeline], object]] = {
    "SD3, Euler": (stable_diffusion_3, FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "SD3, Heun": (stable_diffusion_3, FlowMatchHeunDiscreteScheduler()),
    "FLUX, shifted by the pipeline": (flux, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_flow_matching_is_learned_from(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # FLUX's own is fixed at 128.
    monkeypatch.setattr(FluxPipeline, "default_sample_size", property(lambda _: 8, lambda *_: None), raising=False)
    torch.manual_seed(0)
    make, scheduler = CASES[case]
    make(tmp_path, scheduler).save_pretrained(tmp_path / "source")
    artifact = compress(PipelineFolder(tmp_path / "source", case), parse_recipe(RECIPE), tmp_path / "out")
    verify(tmp_path / "out")
    assert [row["iteration"] for row in artifact.manifest.learning] == [0, 1, 2, 3]
    # Every step's weight in the image was known.
    assert not [record for record in caplog.records if "learned" in record.message]
