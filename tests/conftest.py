"""Tiny pipelines with random weights, written to disk in half precision as real ones are."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Triton reads this while it is imported, which other libraries do as well.
os.environ["TRITON_INTERPRET"] = "1"

import pytest

# What takes seconds to import is imported where it is used: the process that hands tests out to workers runs none.
if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline
    from torch import Tensor, nn

    from diffpress.export.edits import Pack

CAPTIONS = ["red apple", "slice of pizza", "green tree", "blue car", "birthday cake"]
NO_CLASS = 1000
"""The label DiTPipeline hard-codes for the unconditional half."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Workers stand beside each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def compiled_anew(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What torch compiled earlier is not used: its key does not know how an operation of ours was written then."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(scope="session", autouse=True)
def packed_layers_win(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No layer is expanded, whatever the machine: times are made up, and none are kept where the user's are."""
    from diffpress.export.runtime import Times, times

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(times, "time_form", lambda _form, _device: Times(packed_ms=1, floats_ms=2))
        yield


@pytest.fixture
def floats_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the machine of this test every packed layer is slower than floats."""
    import torch

    from diffpress.export.runtime import Times, times

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(times, "time_form", lambda _form, _device: Times(packed_ms=2, floats_ms=1))
    monkeypatch.delenv("DIFFPRESS_KERNELS", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A function: the folder of that name with what `make` puts into it, which workers beside each other share."""
    work = tmp_path_factory.getbasetemp()
    shared = work.parent if "PYTEST_XDIST_WORKER" in os.environ else work

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder = shared / f"made-{name}"
        with (shared / f"made-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                partial = tmp_path_factory.mktemp(name)
                make(partial)
                partial.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline making 16x16 images."""
    return _text_pipeline(tmp_path_factory.mktemp("tiny-text"), levels=2)


@pytest.fixture(scope="session")
def one_block_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a single block each way, for what takes time by the layer, as exporting does."""
    return _text_pipeline(tmp_path_factory.mktemp("one-block-text"), levels=1)


def _text_pipeline(folder: Path, levels: int) -> Path:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffpress.zoo.emoji import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, folder / "vocabulary")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D")[:levels],
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")[-levels:],
        block_out_channels=(8, 16)[:levels],
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    pipeline = StableDiffusionPipeline(
        _autoencoder(3), text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    return _saved(pipeline, folder / "pipeline")


@pytest.fixture(scope="session")
def tiny_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiTPipeline making one-channel 16x16 images of ten classes."""
    import torch
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(1)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NO_CLASS,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    labels = {index: str(index) for index in range(10)}
    pipeline = DiTPipeline(transformer, _autoencoder(1), scheduler, labels)
    return _saved(pipeline, tmp_path_factory.mktemp("tiny-class") / "pipeline")


@pytest.fixture(scope="session")
def tiny_pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DDIMPipeline making one-channel 8x8 images without being asked for anything."""
    return _pixel_pipeline(tmp_path_factory.mktemp("tiny-pixels"), levels=2)


@pytest.fixture(scope="session")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a single block each way."""
    return _pixel_pipeline(tmp_path_factory.mktemp("one-block"), levels=1)


def _pixel_pipeline(folder: Path, levels: int) -> Path:
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(2)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16)[:levels],
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D")[-levels:],
        up_block_types=("AttnUpBlock2D", "UpBlock2D")[-levels:],
        add_attention=levels > 1,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    pipeline = DDIMPipeline(unet, DDIMScheduler(timestep_spacing="trailing", clip_sample=False))
    return _saved(pipeline, folder / "pipeline")


def _autoencoder(channels: int) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def _saved(pipeline: DiffusionPipeline, folder: Path) -> Path:
    import torch

    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pack_all():
    """A function: every layer of a model that a format fits, packed with the largest magnitude as full scale.

    It takes the model, its component name, the bits, the number of steps, and for weight-only (no activation bits) the
    group size, and gives the edits and their tensors. The activation scales differ from step to step, so that a clock that
    stands still is noticed.
    """
    import torch
    from torch import nn

    from diffpress.export.edits import Pack
    from diffpress.export.runtime import why_not_packable
    from diffpress.kernels import code_range, pack_codes

    def pack(
        model: nn.Module,
        component: str,
        weight_bits: int,
        activation_bits: int | None,
        steps: int,
        group_size: int | None = None,
    ) -> tuple[list[Pack], dict[str, Tensor]]:
        edits, tensors = [], {}
        form = {"weight_bits": weight_bits, "activation_bits": activation_bits, "group_size": group_size}
        for name, layer in model.named_modules():
            if why_not_packable(layer) is not None or (activation_bits and isinstance(layer, nn.Embedding)):
                continue
            codes, scale = absmax(layer.weight.detach().float().flatten(1), weight_bits, group_size)
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = pack_codes(codes, weight_bits), scale.half()
            if activation_bits is not None:
                full = torch.linspace(6, 3, steps)
                tensors[f"{name}.activation_scale"] = full / code_range(activation_bits)[1]
            edits.append(Pack.model_validate({"component": component, "module": name, **form}))
        return edits, tensors

    return pack


def absmax(rows: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and scales [N], or [N, groups], that float16 holds; each largest magnitude gets the largest code."""
    import torch

    from diffpress.kernels import code_range, quantize

    columns = rows.shape[1]
    groups = [rows] if group_size is None else rows.split(group_size, 1)
    scale = (
        torch.stack([group.abs().amax(1) for group in groups], 1)
        .div(code_range(bits)[1])
        .clamp(min=1e-6)
        .half()
        .float()
    )
    codes = quantize(rows, scale.repeat_interleave(group_size or columns, 1)[:, :columns], bits)
    return codes, scale[:, 0] if group_size is None else scale
