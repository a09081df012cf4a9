"""What the CPU benchmark compares really is the packed model."""

from __future__ import annotations

import copy
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffpress.export.runtime import PackedLayer, attention_overrides

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def cpu():
    """The module, which is none of ours to install."""
    path = sys.path.copy()
    sys.path.insert(0, str(BENCH))
    yield import_module("cpu")
    sys.path[:] = path


def small() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def test_every_layer_is_packed_and_answers_nearly_the_same(cpu) -> None:
    plain, inputs = small(), cpu.random_inputs((1, 4, 8, 8), (1, 5, 12), 961.0)
    packed = cpu.packed_(copy.deepcopy(plain))
    left = [name for name, layer in packed.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    assert not left
    assert sum(isinstance(layer, PackedLayer) for layer in packed.modules()) > 20
    truth = cpu.call(plain, inputs)
    # Inputs beyond four are clipped: visibly, but it is the same model.
    error = (cpu.call(packed, inputs) - truth).square().mean() / truth.square().mean()
    assert 0 < error < 0.1


@pytest.mark.parametrize("products", ["scores", "all"])
def test_attention_in_integers_answers_nearly_the_same(cpu, products: str) -> None:
    plain, inputs = small(), cpu.random_inputs((1, 4, 8, 8), (1, 5, 12), 961.0)
    layers = cpu.call(cpu.packed_(copy.deepcopy(plain)), inputs)
    packed = cpu.packed_(copy.deepcopy(plain), cpu.Row("", 8, 8, products))
    assert [forward.attend.integer_values for forward in attention_overrides(packed)] == 8 * [products == "all"]
    error = (cpu.call(packed, inputs) - layers).square().mean() / layers.square().mean()
    assert 0 < error < 0.01


def test_weights_alone_answer_nearly_the_same(cpu) -> None:
    plain, inputs = small(), cpu.random_inputs((1, 4, 8, 8), (1, 5, 12), 961.0)
    packed = cpu.packed_(copy.deepcopy(plain), cpu.ROWS[-1])
    assert {layer.edit.words() for layer in packed.modules() if isinstance(layer, PackedLayer)} > {"W4 g32"}
    truth = cpu.call(plain, inputs)
    error = (cpu.call(packed, inputs) - truth).square().mean() / truth.square().mean()
    assert 0 < error < 0.1


def test_every_format_is_a_row_of_every_tier(cpu) -> None:
    rows = list(cpu.measure("zoo:emoji", cpu.ROWS[:1], 1, 1))
    assert [(row["row"], row["tier"]) for row in rows] == [
        (name, tier) for tier in cpu.tiers() for name in ("float32", "bfloat16", "W8A8")
    ]
    assert rows[0]["over_float32"] == 1
    assert rows[2]["bytes"] < rows[0]["bytes"]
    inputs = cpu.first_inputs(cpu.load_pipeline(cpu.resolve("zoo:emoji")))
    # Guidance asks for two answers to each image.
    assert {name: len(value.shape) and len(value) for name, value in inputs.items()} == {
        "sample": 2,
        "timestep": 0,
        "encoder_hidden_states": 2,
    }


@pytest.mark.long
def test_a_peer_that_fails_is_a_row_with_its_error(cpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Path:
        raise RuntimeError("no such wheel")

    monkeypatch.setattr(cpu, "python_for", refuse)
    expected = {"model": cpu.STABLE_DIFFUSION, "row": "torchao", "threads": 1, "error": "no such wheel"}
    assert cpu.peer_row("torchao", 1, tmp_path) == expected
    monkeypatch.setattr(cpu, "python_for", lambda *_: Path(sys.executable))
    row = cpu.peer_row("nobody", 1, tmp_path)
    assert "ModuleNotFoundError" in row["error"]


def test_only_the_time_step_keeps_its_dtype(cpu) -> None:
    inputs = cpu.half(cpu.random_inputs((1, 4, 8, 8), (1, 5, 12), 961.0))
    assert {name: value.dtype for name, value in inputs.items()} == {
        "sample": torch.bfloat16,
        "timestep": torch.float32,
        "encoder_hidden_states": torch.bfloat16,
    }
