"""Pipelines of families whose real ones are too large to run here: small, with random weights, from diffusers' own configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
)

from diffpress.zoo.emoji import train_tokenizer

CAPTIONS = ["red apple", "blue car", "green tree"]
WIDTH = 64
"""Of the denoisers."""


def make_slow_(embedder: nn.Linear) -> None:
    """Let a time embedder read only what turns round less than twice over all time steps, as large trained ones mostly do.

    What random weights make of the fast half is no curve that a few directions hold.
    """
    half = embedder.in_features // 2
    fast = torch.arange(embedder.in_features) % half < half // 2
    with torch.no_grad():
        embedder.weight[:, fast] = 0


def pixart(folder: Path) -> DiffusionPipeline:
    """PixArt-Sigma's: one modulation of all blocks, which reads the time step alone."""
    return PixArtSigmaPipeline(**_pixart_parts(folder, 4))


def pixart_alpha(folder: Path) -> DiffusionPipeline:
    """PixArt-Alpha's, which reads each image's resolution and aspect ratio beside: for them it takes a width of threes."""
    return PixArtAlphaPipeline(**_pixart_parts(folder, 3, micro_conditions=True))


def _pixart_parts(folder: Path, heads: int, micro_conditions: bool = False) -> dict[str, Any]:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=WIDTH // 4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=WIDTH // 4 * heads,
        # The pipeline gives micro-conditions to the size of PixArt's largest only.
        sample_size=128 if micro_conditions else 32,
        patch_size=4,
        caption_channels=16,
        use_additional_conditions=micro_conditions,
    )
    if not micro_conditions:
        make_slow_(transformer.adaln_single.emb.timestep_embedder.linear_1)
    blocks = 6 if micro_conditions else 4
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(4,) * blocks,
        latent_channels=4,
        norm_num_groups=1,
    )
    return {
        "tokenizer": train_tokenizer(CAPTIONS, folder / "vocabulary"),
        "text_encoder": _text_encoder(16),
        "vae": vae,
        "transformer": transformer,
        "scheduler": DPMSolverMultistepScheduler(),
    }


def qwen_image(folder: Path) -> DiffusionPipeline:
    """Qwen-Image's: two modulations a block, which read the time step alone."""
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=WIDTH // 4,
        num_attention_heads=4,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    make_slow_(transformer.time_text_embed.timestep_embedder.linear_1)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    tokenizer = train_tokenizer(CAPTIONS, folder / "vocabulary")
    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, _text_encoder(16), tokenizer, transformer)


def lumina2(folder: Path) -> DiffusionPipeline:
    """Lumina 2's, whose time steps are between 0 and 1 as they are embedded: nothing needs to be slowed."""
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(300, 64, 64),
        cap_feat_dim=16,
    )
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=2000,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    tokenizer = train_tokenizer(CAPTIONS, folder / "vocabulary")
    return Lumina2Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), _autoencoder(4), text_encoder, tokenizer)


def stable_diffusion_3(folder: Path) -> DiffusionPipeline:
    """SD3's, whose modulations read pooled text beside the time step."""
    tokenizer = train_tokenizer(CAPTIONS, folder / "vocabulary")
    first, second = (CLIPTextModelWithProjection(_clip_config(len(tokenizer))) for _ in range(2))
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
    scheduler, vae = FlowMatchEulerDiscreteScheduler(), _autoencoder(4)
    return StableDiffusion3Pipeline(
        transformer, scheduler, vae, first, tokenizer, second, tokenizer, _text_encoder(32), tokenizer
    )


def flux(folder: Path) -> DiffusionPipeline:
    """FLUX.1's, whose modulations read guidance and pooled text beside the time step."""
    tokenizer = train_tokenizer(CAPTIONS, folder / "vocabulary")
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
        guidance_embeds=True,
    )
    short = CLIPTextModel(_clip_config(len(tokenizer)))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(scheduler, _autoencoder(1), short, tokenizer, _text_encoder(16), tokenizer, transformer)


def _autoencoder(channels: int) -> AutoencoderKL:
    """Of twice as many pixels a side as latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=channels,
        norm_num_groups=1,
        shift_factor=0.06,
    )


def _clip_config(words: int) -> CLIPTextConfig:
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


def _text_encoder(width: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=2000, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "PixArt-Sigma": pixart,
    "PixArt-Alpha": pixart_alpha,
    "Qwen-Image": qwen_image,
    "Lumina 2": lumina2,
    "SD3": stable_diffusion_3,
    "FLUX.1": flux,
}
"""By what the family is called; each is given a folder to write vocabularies into."""
