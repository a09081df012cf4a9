"""More small pipelines: their denoisers are called with lists and tuples, or are two by step range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from small_pipelines import CAPTIONS
from transformers import Qwen3Config, Qwen3Model, T5Config, T5EncoderModel

from diffpress.zoo.emoji import train_tokenizer

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def wan22(folder: Path) -> DiffusionPipeline:
    """Wan 2.2's: one expert for early steps and one for late ones; videos."""
    experts = [
        WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        )
        for _ in range(2)
    ]
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    text_encoder = T5EncoderModel(T5Config(vocab_size=2000, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))
    tokenizer = train_tokenizer(CAPTIONS, folder / "vocabulary")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return WanPipeline(tokenizer, text_encoder, vae, scheduler, *experts, boundary_ratio=0.875)


def z_image(folder: Path) -> DiffusionPipeline:
    """Z-Image's, which takes lists of images and of captions, and answers with a list."""
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=2000,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    tokenizer = train_tokenizer(CAPTIONS, folder / "vocabulary")
    tokenizer.chat_template = TEMPLATE
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=16,
        norm_num_groups=1,
        shift_factor=0.06,
    )
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, text_encoder, tokenizer, transformer)


DENOISERS: dict[str, Callable[[Path], Any]] = {"Wan 2.2": wan22, "Z-Image": z_image}
"""By what the family is called, as in `small_pipelines.PIPELINES`."""
