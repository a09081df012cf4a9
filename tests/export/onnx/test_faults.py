"""What the check of a graph refuses: every fault on a whole denoiser, in the file as it was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import DiTPipeline
from torch import nn

from diffpress.export.edits import QuantizeAttention
from diffpress.export.engines.engine import ZERO
from diffpress.export.engines.onnxruntime import ONNXRUNTIME
from diffpress.export.errors import ArtifactError
from diffpress.export.onnx.check import check_graph, check_pieces, opened_with_pieces
from diffpress.export.onnx.part import Input, Part
from diffpress.export.onnx.trace import Place
from diffpress.export.onnx.wrappers import LabelDenoiser
from diffpress.export.onnx.write import write_graph

TIMESTEPS = [999.0, 500.0, 1.0]
ATTENTION = [f"transformer_blocks.{block}.attn1" for block in (0, 1)]
FIRST_ZERO = 3
"""Code of 0 at the first step."""
LAYER = "transformer_blocks.1.ff.net.2"


class Written(NamedTuple):
    part: Part
    graph: Path
    places: list[Place]


@pytest.fixture(scope="module")
def written(tiny_class: Path, pack_all: Any, edited: Any, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A whole denoiser at W8A8 with zero points, all of its attention on integers."""
    model = DiTPipeline.from_pretrained(tiny_class, local_files_only=True).transformer.eval()
    edits, tensors = pack_all(model, "transformer", 8, 8, len(TIMESTEPS))
    packs: list[Any] = [edit.model_copy(update={"asymmetric": True}) for edit in edits]
    for place, edit in enumerate(packs):
        # Tables that are alike become one in a graph.
        tensors[f"{edit.module}.activation_scale"] *= 1 + place / 1000
        tensors[f"{edit.module}.zero_point"] = torch.tensor([FIRST_ZERO, place, -2.0])
    packs += [
        QuantizeAttention(component="transformer", module=name, integer_values=values)
        for name, values in zip(ATTENTION, (True, False), strict=True)
    ]
    module: nn.Module = LabelDenoiser(edited(model, (packs, tensors), TIMESTEPS)).eval()
    label = Input("class_labels", (), below=1000)
    inputs = (Input("sample", (4, 8, 8)), Input("timestep", (1,), choices=tuple(TIMESTEPS)), label)
    part, folder = Part("denoiser", module, inputs, "output"), tmp_path_factory.mktemp("faults")
    return Written(part, folder / "denoiser.onnx", write_graph(part, folder, ONNXRUNTIME.form))


def scaled(name: str, factor: float) -> Callable[[ir.Model], None]:
    """A stored tensor is so many times too large."""

    def change(model: ir.Model) -> None:
        stored = model.graph.initializers[name]
        stored.const_value = ir.tensor(stored.const_value.numpy() * np.float32(factor), name=name)

    return change


def saturated(place: int) -> Callable[[ir.Model], None]:
    """One product clamps its sums, as one does that adds in too few bits."""

    def change(model: ir.Model) -> None:
        node = [node for node in model.graph if node.op_type == "MatMulInteger"][place]
        bounds = [constant(model, f"bound{value}", value) for value in (-(2**11), 2**11)]
        clip = ir.node("Clip", [node.outputs[0], *bounds])
        clip.outputs[0].name = "clamped"
        node.outputs[0].replace_all_uses_with(clip.outputs[0])
        clip.replace_input_with(0, node.outputs[0])
        model.graph.insert_after(node, clip)

    return change


def zero_is(place: int, value: int) -> Callable[[ir.Model], None]:
    """One product takes another code for that of 0 in its first factor."""

    def change(model: ir.Model) -> None:
        node = [node for node in model.graph if node.op_type == "MatMulInteger"][place]
        node.replace_input_with(2, constant(model, "wrong_zero", value, np.uint8))

    return change


def constant(model: ir.Model, name: str, value: int, dtype: type[np.generic] = np.int32) -> ir.Value:
    tensor = ir.tensor(np.array(value, dtype), name=name)
    made = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(made)
    return made


def stand_still(model: ir.Model) -> None:
    """Every step has the scales of the first."""
    for name, stored in model.graph.initializers.items():
        if name.endswith("activation_scale"):
            scales = stored.const_value.numpy()
            stored.const_value = ir.tensor(np.full_like(scales, scales[0]), name=name)


MODULE = f"module.model.{LAYER}"
FAULTS = {
    "a weight scale off by 1 %": scaled(f"{MODULE}.weight_scale", 1.01),
    "an activation scale off by 1 %": scaled(f"{MODULE}.activation_scale", 1.01),
    "a zero point of inputs off by one": zero_is(5, ZERO + FIRST_ZERO + 1),
    "a zero point of queries off by one": zero_is(-3, ZERO - 1),
    "a clock that stands still": stand_still,
    "a saturated sum of a layer": saturated(0),
    "a saturated sum of scores": saturated(-3),
    "a bias off by 1 %": scaled(f"{MODULE}.bias", 1.01),
    "a float off by 1 %": scaled("module.model.pos_embed.pos_embed", 1.01),
}


def copied(written: Written, folder: Path, change: Callable[[ir.Model], None]) -> Path:
    model = ir.load(written.graph)
    change(model)
    ir.save(model, folder / "denoiser.onnx", external_data="denoiser.onnx.data")
    return folder / "denoiser.onnx"


def test_what_was_written_right_is_accepted(written: Written) -> None:
    agreement = check_graph(written.part, written.graph, written.places, ONNXRUNTIME)
    assert agreement.relative_error <= agreement.tolerance


@torch.no_grad()
@pytest.mark.parametrize("now", [750.0, 20.0])
def test_scales_between_steps_follow_torch(written: Written, now: float) -> None:
    inputs = written.part.example(2, torch.Generator().manual_seed(1)) | {"timestep": torch.tensor([now])}
    with opened_with_pieces(written.graph, written.places, ONNXRUNTIME) as session:
        check_pieces(written.part, session, written.places, inputs)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused(written: Written, tmp_path: Path, fault: str) -> None:
    graph = copied(written, tmp_path, FAULTS[fault])
    with pytest.raises(
        ArtifactError, match=r"differs from torch by .* where rounding explains|relative root mean square"
    ):
        check_graph(written.part, graph, written.places, ONNXRUNTIME)


def test_the_refusal_names_the_piece(written: Written, tmp_path: Path) -> None:
    graph = copied(written, tmp_path, FAULTS["an activation scale off by 1 %"])
    with pytest.raises(ArtifactError, match=f"{LAYER} differs"):
        check_graph(written.part, graph, written.places, ONNXRUNTIME)
