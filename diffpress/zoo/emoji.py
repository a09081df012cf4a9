"""`zoo:emoji`: text to a 64x64 emoji, a StableDiffusionPipeline of under five million parameters."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .autoencoder import train_autoencoder
from .data import load_emoji
from .trainer import Schedule, train_

TOKENS = 16
TEXT_WIDTH = 96
CAPTION_DROPOUT = 0.1
AUTOENCODER = Schedule(steps=1600, rate=2e-3, save_every=200)
DENOISER = Schedule(steps=7500, rate=1.2e-3, save_every=250)
REFINEMENT = Schedule(steps=1800, rate=6e-4, cooldown=0.8, save_every=200)
"""A second stage that also shows shortened captions, so that `pizza` alone means the slice of pizza."""
SHORTENED_SHARE = 0.3
VERSIONS = 8
"""Each caption whole, and so many less one with some of its words."""
VAE_BATCH, BATCH = 32, 64


def train(data: Path, out: Path, work: Path, seed: int, steps: int | None = None) -> None:
    """Train on the npz at `data` and write the pipeline folder `out`; checkpoints live in `work`."""
    emoji = load_emoji(data)
    torch.manual_seed(seed)
    vae, tokenizer = build_autoencoder(), train_tokenizer(emoji.captions, work / "tokenizer")
    unet, text_encoder = build_denoiser(), build_text_encoder(tokenizer)
    latents = train_autoencoder(vae, emoji.images, VAE_BATCH, AUTOENCODER, work / "vae.safetensors", seed)
    schedule = Schedule(steps or DENOISER.steps, DENOISER.rate, save_every=DENOISER.save_every)
    scheduler = build_scheduler()
    models = (unet, text_encoder, scheduler)
    whole = tokenize(tokenizer, emoji.captions)[None]
    train_denoiser_(*models, latents, whole, schedule, work / "unet.safetensors", seed)
    short = [tokenize(tokenizer, shorten(emoji.captions, seed + index)) for index in range(1, VERSIONS)]
    versions = torch.cat([whole, torch.stack(short)])
    train_denoiser_(*models, latents, versions, REFINEMENT, work / "unet-refined.safetensors", seed + 1)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.to(dtype=torch.float16).save_pretrained(out)
    _load_in_float32(out / "text_encoder" / "config.json")


def _load_in_float32(config: Path) -> None:
    """Transformers loads in the dtype its config names, diffusers in float32: stored as float16, both must load alike."""
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"dtype": "float16"', '"dtype": "float32"'), encoding="utf-8")


def build_scheduler() -> DDIMScheduler:
    """Linear betas, v-prediction, trailing steps: sampling starts at the noisiest trained step."""
    return DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, steps_offset=1)


def build_autoencoder() -> AutoencoderKL:
    """64x64x3 to 8x8x8."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
    )


def build_denoiser() -> UNet2DConditionModel:
    """Self- and cross-attention at 8x8 and in the middle."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 112),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers, trained along with the denoiser."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def train_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary in CLIP's format from the captions and write it to `folder`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=special, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator([*captions, "abcdefghijklmnopqrstuvwxyz 0123456789 - ' ,"], trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learned["merges"]]
    clip = CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=TOKENS)
    clip.save_pretrained(folder)
    return clip


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [N, TOKENS], padded and cut as StableDiffusionPipeline does."""
    options = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, **options).input_ids


def shorten(captions: list[str], seed: int) -> list[str]:
    """Each caption with about half of its words, in their order, and never with none."""
    generator = random.Random(seed)
    result = []
    for caption in captions:
        words = caption.split()
        always = generator.randrange(len(words))
        kept = [word for index, word in enumerate(words) if index == always or generator.random() < 0.5]
        result.append(" ".join(kept))
    return result


def train_denoiser_(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    scheduler: DDIMScheduler,
    latents: Tensor,
    tokens: Tensor,
    schedule: Schedule,
    checkpoint: Path,
    seed: int,
) -> None:
    """Train `unet` and `text_encoder` in place.

    `latents` are [N, 8, 8, 8], `tokens` [versions, N, TOKENS] with the whole captions first.
    """
    unet.train().to(memory_format=torch.channels_last)
    text_encoder.train()
    empty = tokens.new_full((1, TOKENS), text_encoder.config.eos_token_id)
    empty[0, 0] = text_encoder.config.bos_token_id

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, 1, generator=generator) < CAPTION_DROPOUT
        version = torch.randint(len(tokens), (BATCH,), generator=generator)
        version *= torch.rand(BATCH, generator=generator) < SHORTENED_SHARE
        states = text_encoder(torch.where(dropped, empty, tokens[version, chosen]))[0]
        target = latents[chosen]
        noise = torch.randn(target.shape, generator=generator)
        steps = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
        output = unet(scheduler.add_noise(target, noise, steps), steps, states).sample
        return F.mse_loss(output, scheduler.get_velocity(target, noise, steps))

    train_(nn.ModuleList([unet, text_encoder]), loss, schedule, checkpoint, seed)
    unet.eval()
    text_encoder.eval()
