"""Units of the families of denoisers, small and random: which there are, and that cutting them out is masking them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffpress.calibration.cost import operation_formulas, parameter_count
from diffpress.calibration.sampling import Call, answer, replay
from diffpress.compress.changes import worn
from diffpress.compress.options import Obs
from diffpress.compress.overlay import overlaid
from diffpress.compress.prune.cutting import cut, masking, removable
from diffpress.compress.prune.finding import find_structures
from diffpress.compress.prune.structures import Structure
from diffpress.compress.prune.weighing import weigh

Inputs = dict[str, Tensor]
Expected = dict[str, tuple[str, int]]
"""By the names of structures: of which kind they are, and how many units they have."""
Family = tuple[nn.Module, Inputs, Expected]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


LATENTS, TOKENS, TEXT = noise(2, 4, 8, 8), noise(2, 16, 4), noise(2, 5, 16)
WHOLE, PART = torch.tensor([5, 5]), torch.tensor([0.5, 0.5])
"""A time step, as families tell it."""


def transformers(blocks: list[str], heads: int, neurons: int) -> Expected:
    """Blocks with attention to themselves and to text."""
    return {
        f"{block}.{name}": units
        for block in blocks
        for name, units in {
            "attn1": ("heads", heads),
            "attn2": ("heads", heads),
            "ff.net": ("neurons", neurons),
        }.items()
    }


def resnets(groups: int, names: list[str]) -> Expected:
    """Their channels go by groups of a norm."""
    return dict.fromkeys(names, ("channels", groups))


def stable_diffusion() -> Family:
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    wide = ["mid_block.attentions.0.transformer_blocks.0"]
    narrow = [f"{block}.transformer_blocks.0" for block in ("down_blocks.0.attentions.0", "up_blocks.1.attentions.0")]
    narrow.append("up_blocks.1.attentions.1.transformer_blocks.0")
    # What is upsampled is read by nobody else; what the last attention is added to by the output alone.
    ends: Expected = {"up_blocks.0": ("channels", 64), "up_blocks.1.attentions.1.proj_in": ("channels", 8)}
    units = transformers(wide, 4, 256) | transformers(narrow, 4, 128) | resnets(8, RESNETS) | ends
    return model, {"sample": LATENTS, "timestep": torch.tensor(5), "encoder_hidden_states": TEXT}, units


RESNETS = [
    "down_blocks.0.resnets.0",
    "down_blocks.1.resnets.0",
    *(f"{block}.resnets.{index}" for block in ("mid_block", "up_blocks.0", "up_blocks.1") for index in range(2)),
]


def stable_diffusion_xl() -> Family:
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        resnet_time_scale_shift="scale_shift",
    )
    attentions = ["down_blocks.1.attentions.0", "mid_block.attentions.0"]
    attentions += [f"up_blocks.0.attentions.{index}" for index in range(2)]
    blocks = [f"{attention}.transformer_blocks.{index}" for attention in attentions for index in range(2)]
    inputs = {
        "sample": LATENTS,
        "timestep": torch.tensor(5),
        "encoder_hidden_states": TEXT,
        "added_cond_kwargs/text_embeds": noise(2, 16),
        "added_cond_kwargs/time_ids": torch.ones(2, 6),
    }
    return model, inputs, transformers(blocks, 4, 256) | resnets(8, [*RESNETS, "conv_out"])


def pixels() -> Family:
    model = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    attentions = ["down_blocks.1.attentions.0", "mid_block.attentions.0"]
    attentions += [f"up_blocks.0.attentions.{index}" for index in range(2)]
    units = dict.fromkeys(attentions, ("heads", 4)) | resnets(4, [*RESNETS, "conv_out"])
    return model, {"sample": LATENTS, "timestep": torch.tensor(5)}, units


def dit() -> Family:
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    units: Expected = {}
    for block in range(2):
        units |= {
            f"transformer_blocks.{block}.attn1": ("heads", 2),
            f"transformer_blocks.{block}.ff.net": ("neurons", 64),
        }
    return model, {"hidden_states": LATENTS, "timestep": WHOLE, "class_labels": torch.tensor([1, 2])}, units


def pixart() -> Family:
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        caption_channels=16,
        use_additional_conditions=False,
    )
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {
        "hidden_states": LATENTS,
        "encoder_hidden_states": TEXT,
        "timestep": WHOLE,
        "encoder_attention_mask": mask,
    }
    return model, inputs, transformers(["transformer_blocks.0", "transformer_blocks.1"], 2, 64)


def stable_diffusion_3() -> Family:
    """The first block has a second attention, as those of SD3.5-medium; the last one answers nothing to text, of which it
    computes queries nevertheless.
    """
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_projection_dim=24,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    units: Expected = {"transformer_blocks.0.attn2": ("heads", 3)}
    for block in range(3):
        units |= {
            f"transformer_blocks.{block}.attn": ("heads", 3),
            f"transformer_blocks.{block}.ff.net": ("neurons", 96),
        }
    units |= {f"transformer_blocks.{block}.ff_context.net": ("neurons", 96) for block in range(2)}
    inputs = {"hidden_states": LATENTS, "encoder_hidden_states": TEXT, "pooled_projections": noise(2, 12)}
    return model, {**inputs, "timestep": WHOLE.float()}, units


def flux() -> Family:
    """Heads and neurons of a single block are read by one layer."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    units: Expected = {}
    for block in range(2):
        units[f"transformer_blocks.{block}.attn"] = ("heads", 2)
        units |= dict.fromkeys(
            (f"transformer_blocks.{block}.{ff}.net" for ff in ("ff", "ff_context")), ("neurons", 128)
        )
        units[f"single_transformer_blocks.{block}[0]"] = ("heads", 2)
        units[f"single_transformer_blocks.{block}[1]"] = ("neurons", 128)
    inputs = {
        "hidden_states": TOKENS,
        "encoder_hidden_states": TEXT,
        "pooled_projections": noise(2, 16),
        "timestep": PART,
        "guidance": 6 * PART,
        "img_ids": torch.arange(48.0).view(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return model, inputs, units


def flux_2() -> Family:
    """One layer writes queries, keys, values, and both halves of the neurons of a single block."""
    model = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
    )
    units: Expected = {"transformer_blocks.0.attn": ("heads", 2)}
    units |= dict.fromkeys((f"transformer_blocks.0.{ff}" for ff in ("ff", "ff_context")), ("neurons", 64))
    for block in range(2):
        units[f"single_transformer_blocks.{block}.attn[0]"] = ("heads", 2)
        units[f"single_transformer_blocks.{block}.attn[1]"] = ("neurons", 64)
    inputs = {
        "hidden_states": TOKENS,
        "encoder_hidden_states": TEXT,
        "timestep": PART,
        "guidance": 6 * PART,
        "img_ids": torch.arange(64.0).view(16, 4),
        "txt_ids": torch.zeros(5, 4),
    }
    return model, inputs, units


def sana(qk_norm: str | None = None) -> Family:
    """Neurons are channels of convolutions there, one of them depthwise."""
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        mlp_ratio=2.0,
        sample_size=8,
        patch_size=1,
        qk_norm=qk_norm,
    )
    blocks = ["transformer_blocks.0", "transformer_blocks.1"]
    units: Expected = {f"{block}.ff": ("channels", 32) for block in blocks}
    if qk_norm is None:
        units |= {f"{block}.{name}": ("heads", 2) for block in blocks for name in ("attn1", "attn2")}
    return model, {"hidden_states": LATENTS, "encoder_hidden_states": TEXT, "timestep": WHOLE}, units


def sana_with_heads_normed_together() -> Family:
    return sana("rms_norm_across_heads")


def lumina_2() -> Family:
    """Four heads that share keys and values by two."""
    model = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=64,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(300, 64, 64),
        cap_feat_dim=16,
    )
    units: Expected = {}
    for block in ("noise_refiner.0", "layers.0"):
        units |= {f"{block}.attn": ("heads", 2), f"{block}.feed_forward": ("neurons", 256)}
    mask = torch.ones(2, 5, dtype=torch.bool)
    inputs = {"hidden_states": LATENTS, "encoder_hidden_states": TEXT, "timestep": PART, "encoder_attention_mask": mask}
    return model, inputs, units


def auraflow() -> Family:
    model = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    units: Expected = {"joint_transformer_blocks.0.ff_context": ("neurons", 256)}
    for block in ("joint_transformer_blocks.0", "single_transformer_blocks.0"):
        units |= {f"{block}.attn": ("heads", 2), f"{block}.ff": ("neurons", 256)}
    return model, {"hidden_states": LATENTS, "encoder_hidden_states": TEXT, "timestep": PART}, units


FAMILIES: list[Callable[[], Family]] = [
    stable_diffusion,
    stable_diffusion_xl,
    pixels,
    dit,
    pixart,
    stable_diffusion_3,
    flux,
    flux_2,
    sana,
    sana_with_heads_normed_together,
    lumina_2,
    auraflow,
]


@torch.no_grad()
def draw_(model: nn.Module) -> None:
    """Random weights and no zeros among them, which keep the sizes of what they are given."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            around = float(name == "weight" and parameter.ndim == 1)
            parameter.copy_(around + size * torch.randn(parameter.shape))


def roundings(model: nn.Module) -> float:
    """By which an output may differ where every layer adds in another order, relative to the largest number.

    A sum of K rounds by a random walk of sqrt(K) steps; each layer adds its own to what it is given.
    """
    layers = [module.weight[0].numel() for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return torch.finfo(torch.float32).eps * sum(columns**0.5 for columns in layers)


# Its blocks are those of stable_diffusion, with linear projections around them.
SECOND = (stable_diffusion_xl,)
every_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=family.__name__, marks=[pytest.mark.long] if family in SECOND else [])
        for family in FAMILIES
    ],
)


def called(family: Callable[[], Family]) -> tuple[Any, Call, list[Structure], Expected]:
    """Of the small model: a subject, one call, and the units that were found; the ones that there are."""
    torch.manual_seed(0)
    model, inputs, expected = family()
    draw_(model.eval())
    with torch.no_grad():
        call = Call(inputs, answer(model, inputs, torch.float32), 0)
    structures, _ = find_structures(model, call)
    return SimpleNamespace(model=model, component="denoiser", forms={}), call, structures, expected


@every_family
@torch.no_grad()
def test_units_are_found_and_cutting_them_out_is_masking_them(family: Callable[[], Family]) -> None:
    with torch.enable_grad():
        subject, call, structures, expected = called(family)
    model = subject.model
    assert {own.name: (own.kind, own.count) for own in structures} == expected
    assert removable(subject, structures, call) == (structures, {})
    removed = {own.name: sorted(torch.randperm(own.count)[: max(1, own.count // 3)].tolist()) for own in structures}
    with overlaid(model, masking(model, structures, removed)):
        masked = replay(model, call)
    with worn(model, cut(subject, structures, removed), []):
        pruned = replay(model, call)
    allowed = roundings(model) * call.output.abs().max()
    assert (pruned - masked).abs().max() <= allowed
    # That units go is seen at all.
    assert (masked - call.output).abs().max() > 100 * allowed
    assert torch.equal(replay(model, call), call.output)


@every_family
def test_what_a_unit_weighs_is_what_is_gone_without_it(family: Callable[[], Family]) -> None:
    """To the last parameter and multiplication."""
    subject, call, structures, _ = called(family)
    parameters, macs = (
        weigh(subject.model, structures, call, Obs(method="obs", share_of=of)) for of in ("parameters", "macs")
    )
    before = _cost(subject.model, call)
    assert (parameters.total, macs.total) == before
    for own in structures:
        gone = own.count // 2
        with worn(subject.model, cut(subject, structures, {own.name: range(gone)}), []):
            after = _cost(subject.model, call)
        assert (gone * parameters.units[own.name], gone * macs.units[own.name]) == (
            before[0] - after[0],
            before[1] - after[1],
        )


@torch.no_grad()
def _cost(model: nn.Module, call: Call) -> tuple[int, int]:
    """Parameters, and multiplications of one call."""
    with FlopCounterMode(display=False, custom_mapping=operation_formulas()) as counter:
        replay(model, call)
    return parameter_count(model), counter.get_total_flops() // 2
