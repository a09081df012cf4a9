"""Which parts of a denoiser can be inherited, whatever its family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from diffpress.calibration.sampling import replay
from diffpress.compress.options import Level
from diffpress.compress.overlay import overlaid
from diffpress.compress.steps.units import affordable, find_units
from diffpress.export.runtime import Inheritance, StepClock, StepPlan

LEVELS: tuple[Level, ...] = ("branch", "block", "stack", "whole")


def found(recorded: Callable[[str], Any], name: str, level: Level) -> Any:
    own = recorded(name)
    calls = list(own.trajectories.calls(own.trajectories.shards[:1]))
    return find_units(
        own.denoiser, [lambda: replay(own.denoiser, calls[0]), lambda: replay(own.denoiser, calls[1])], 2, level
    )


@pytest.mark.parametrize("level", LEVELS)
def test_a_transformer_is_one_stack_or_its_blocks_or_their_branches(
    recorded: Callable[[str], Any], level: Level
) -> None:
    units, costs = found(recorded, "tiny_class", level)
    blocks = [f"transformer_blocks.{block}" for block in range(2)]
    expected = {
        "whole": [("",)],
        "stack": [tuple(blocks)],
        "block": [(block,) for block in blocks],
        "branch": [(f"{block}.{part}",) for block in blocks for part in ("attn1", "ff")],
    }[level]
    assert [unit.modules for unit in units] == expected
    # The branches are given back alone, the blocks on top of what they are given.
    if level != "whole":
        assert {unit.adds_to for unit in units} == {(None,) if level == "branch" else ("hidden_states",)}
    assert 0 < costs.rest < costs.total or (level == "whole" and costs.rest == 0)


def test_a_unet_is_its_layers_with_their_shortcuts_and_its_resamplers_whole(recorded: Callable[[str], Any]) -> None:
    units, costs = found(recorded, "tiny_text", "stack")
    read = {unit.modules[0]: unit.adds_to for unit in units}
    assert read["down_blocks.0.resnets.0"] == ("input_tensor",)
    assert read["down_blocks.0.attentions.0"] == ("hidden_states",)
    assert read["down_blocks.0.downsamplers.0"] == (None,)
    assert read["up_blocks.0.upsamplers.0"] == (None,)
    assert len(read) == 14, "all layers, and nothing within them"
    assert costs.rest / costs.total < 0.35


class Family(nn.Module):
    """A model of nobody's, with blocks of two streams that are given by position and by name."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            return image + self.mix(image + text.mean(1, keepdim=True)), text + 0.1 * self.other(text)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, image: Tensor, timestep: Tensor) -> Tensor:
        text = torch.ones(len(image), 4, 8) * timestep[:, None, None]
        for index, block in enumerate(self.layers):
            image, text = block(image, text) if index else block(image, text=text)
        return image


def test_a_family_of_tomorrow_is_found_by_its_structure() -> None:
    torch.manual_seed(0)
    model = Family()
    sample = torch.randn(2, 6, 8)
    calls = [lambda t=t: model(sample * t, torch.full((2,), t)) for t in (0.5, 0.4)]
    (unit,), _ = find_units(model, calls, 2, "stack")
    assert unit.modules == ("layers.0", "layers.1", "layers.2")
    assert unit.adds_to == ("image", "text")
    assert unit.gives == (True, True)


@pytest.mark.parametrize(("family", "stacks"), [("sd3", [3, 1]), ("flux", [2, 2])])
@torch.no_grad()
def test_joint_and_single_blocks_of_published_families_inherit(family: str, stacks: list[int]) -> None:
    """SD3's last block gives back one stream of two, FLUX's single blocks have attention and feed-forward in one."""
    torch.manual_seed(0)
    model, inputs = PUBLISHED[family]()
    calls = [lambda t=t: model(**inputs(t), return_dict=False)[0] for t in (0.9, 0.8)]
    units, _ = find_units(model, calls, 1, "stack")
    assert [len(unit.modules) for unit in units] == stacks
    cells = np.array([[True] * len(units), [False] * len(units)])
    clock = StepClock([0.9, 0.8])
    part = Inheritance(StepPlan.of(units, cells, order=0), clock)
    computed: list[nn.Module] = []
    with overlaid(model, part.wraps(model), clock):
        attentions = [module for module in model.modules() if hasattr(module, "processor")]
        handles = [module.register_forward_hook(lambda module, *_: computed.append(module)) for module in attentions]
        first, second = (call() for call in calls)
        for handle in handles:
            handle.remove()
    assert computed == attentions, "in the first step only"
    assert torch.equal(first, calls[0]())
    assert torch.isfinite(second).all()
    assert not torch.equal(second, calls[1]())


def _sd3() -> tuple[nn.Module, Callable[[float], dict[str, Any]]]:
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )
    fixed = {"encoder_hidden_states": torch.randn(1, 5, 16), "pooled_projections": torch.randn(1, 16)}
    sample = torch.randn(1, 4, 8, 8)
    return model.eval(), lambda t: {"hidden_states": sample, "timestep": torch.tensor([t]), **fixed}


def _flux() -> tuple[nn.Module, Callable[[float], dict[str, Any]]]:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    fixed = {
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "pooled_projections": torch.randn(1, 16),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    sample = torch.randn(1, 16, 4)
    return model.eval(), lambda t: {"hidden_states": sample, "timestep": torch.tensor([t]), **fixed}


PUBLISHED = {"sd3": _sd3, "flux": _flux}


def test_where_memory_is_short_units_that_save_most_for_their_bytes_are_kept(recorded: Callable[[str], Any]) -> None:
    units, costs = found(recorded, "tiny_text", "block")
    most = sum(costs.feature_bytes) // 2
    kept, own = affordable(units, costs, most)
    assert 0 < sum(own.feature_bytes) <= most
    assert own.total == costs.total
    worth = {unit: saved / held for unit, saved, held in zip(units, costs.units, costs.feature_bytes, strict=True)}
    left = [unit for unit in units if unit not in kept]
    smallest = min(held for unit, held in zip(units, costs.feature_bytes, strict=True) if unit in left)
    assert max(worth.values()) == max(worth[unit] for unit in kept)
    assert smallest > most - sum(own.feature_bytes) or min(worth[unit] for unit in kept) >= max(
        worth[unit] for unit in left
    )
    assert affordable(units, costs, 0)[0] == []
