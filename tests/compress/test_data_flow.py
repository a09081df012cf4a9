"""First and last layers, told by data flow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DModel,
)
from torch import Tensor, nn

from diffpress.calibration.sampling import Call, answer
from diffpress.compress.data_flow import edge_layers

TIMESTEP = torch.tensor([5.0])
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def pixart() -> tuple[nn.Module, dict[str, Tensor]]:
    model = PixArtTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    )
    inputs = {"hidden_states": random(1, 4, 8, 8), "encoder_hidden_states": random(1, 5, 12), "timestep": TIMESTEP}
    return model, inputs


def flux() -> tuple[nn.Module, dict[str, Tensor]]:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        **HEADS,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[2, 2, 4],
    )
    inputs = {
        "hidden_states": random(1, 16, 4),
        "encoder_hidden_states": random(1, 6, 32),
        "pooled_projections": random(1, 32),
        "timestep": TIMESTEP,
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }
    return model, inputs


def sd3() -> tuple[nn.Module, dict[str, Tensor]]:
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        **HEADS,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    inputs = {
        "hidden_states": random(1, 4, 8, 8),
        "encoder_hidden_states": random(1, 6, 32),
        "pooled_projections": random(1, 64),
        "timestep": TIMESTEP,
    }
    return model, inputs


def auraflow() -> tuple[nn.Module, dict[str, Tensor]]:
    model = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        **HEADS,
        caption_projection_dim=16,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )
    inputs = {"hidden_states": random(1, 4, 8, 8), "encoder_hidden_states": random(1, 6, 32), "timestep": TIMESTEP}
    return model, inputs


def unet() -> tuple[nn.Module, dict[str, Tensor]]:
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return model, {"sample": random(1, 1, 8, 8), "timestep": TIMESTEP}


def dit() -> tuple[nn.Module, dict[str, Tensor]]:
    model = DiTTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return model, {"hidden_states": random(1, 4, 8, 8), "timestep": TIMESTEP.long(), "class_labels": torch.tensor([1])}


def edges(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, str]:
    with torch.no_grad():
        output = answer(model.eval(), inputs, torch.float32)
    return edge_layers(model, Call(inputs, output, 0))


@pytest.mark.parametrize(
    ("make", "first", "last"),
    [
        (pixart, "pos_embed.proj", "proj_out"),
        (flux, "x_embedder", "proj_out"),
        (sd3, "pos_embed.proj", "proj_out"),
        (auraflow, "pos_embed.proj", "proj_out"),
        (unet, "conv_in", "conv_out"),
        (dit, "pos_embed.proj", "proj_out_2"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_edges_are_those_that_read_the_sample_and_write_the_result(make: Any, first: str, last: str) -> None:
    model, inputs = make()
    assert edges(model, inputs) == {first: "first", last: "last"}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


class Residual(nn.Module):
    """Its sample is scaled by what a layer makes of the time step, added to what a layer makes of it, and so on."""

    def __init__(self) -> None:
        super().__init__()
        # Registered the wrong way round.
        self.out, self.also_out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.middle, self.entry, self.also_entry, self.time = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        x = sample * self.time(timestep.expand(4)).tanh()
        x = self.entry(x) + self.also_entry(sample) + sample
        x += self.middle(x)
        return (self.out(x) + 0.5 * self.also_out(x).relu_() + sample,)


def test_there_may_be_several_and_what_reads_other_layers_too_is_none() -> None:
    found = edges(Residual(), {"sample": random(2, 4), "timestep": TIMESTEP})
    assert found == {"entry": "first", "also_entry": "first", "out": "last", "also_out": "last"}


def test_without_the_sample_among_the_inputs_there_are_none() -> None:
    model, inputs = unet()
    assert edge_layers(model, Call({"other": inputs["sample"]}, inputs["sample"], 0)) == {}
