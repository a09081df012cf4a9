"""Attention on integers as a graph."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.export.artifact import write_pipeline
from diffpress.export.edits import QuantizeAttention
from diffpress.export.engines.onnxruntime import ONNXRUNTIME
from diffpress.export.errors import ArtifactError
from diffpress.export.folder import PipelineFolder
from diffpress.export.onnx.check import check_graph
from diffpress.export.onnx.export import export_onnx
from diffpress.export.onnx.part import Input, Part
from diffpress.export.onnx.write import write_graph
from diffpress.export.runtime import Int8Attention, attention_overrides, quantize_attention_

HEADS, QUERIES, KEYS, COLUMNS = 3, 10, 7, 12


class Attention(nn.Module):
    """Heads of queries over heads of keys that share an offset."""

    processor = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key + 3, value)


@pytest.fixture(params=[False, True], ids=["scores", "all"])
def part(request: pytest.FixtureRequest) -> Part:
    module = Attention().eval()
    quantize_attention_(module, request.param)
    sizes = {"query": QUERIES, "key": KEYS, "value": KEYS}
    inputs = tuple(Input(name, (HEADS, tokens, COLUMNS)) for name, tokens in sizes.items())
    return Part("attention", module, inputs, "output")


def test_attention_on_integers_equals_torch(part: Part, tmp_path: Path) -> None:
    """Products are exact: the check allows what the mean, softmax and a float sum over keys differ by, and no code more."""
    places = write_graph(part, tmp_path, ONNXRUNTIME.form)
    graph = tmp_path / "attention.onnx"
    check_graph(part, graph, places, ONNXRUNTIME, batches=(1, 3, 3))
    (own,) = attention_overrides(part.module)
    assert isinstance(own.attend, Int8Attention)
    products = [node.op_type for node in ir.load(graph).graph if node.op_type in ("MatMul", "MatMulInteger")]
    assert products == ["MatMulInteger", "MatMulInteger" if own.attend.integer_values else "MatMul"]
    own.attend = Int8Attention(not own.attend.integer_values)
    with pytest.raises(ArtifactError, match="differs from torch"):
        check_graph(part, graph, places, ONNXRUNTIME)


def test_zeros_stay_zeros(part: Part, tmp_path: Path) -> None:
    """Scales of rows and channels of zeros are 1, as in torch."""
    write_graph(part, tmp_path, ONNXRUNTIME.form)
    inputs = {name: torch.zeros_like(value).numpy() for name, value in part.example(2, torch.Generator()).items()}
    answers = ONNXRUNTIME.open(tmp_path / "attention.onnx", threads=1).run(inputs)
    assert (answers["output"] == 0).all()


@pytest.mark.long
def test_a_pipeline_with_attention_on_integers_is_exported(sources: dict[str, PipelineFolder], tmp_path: Path) -> None:
    """Its layers stay in float, so the graph is one of integers by its attention alone; it is checked against torch."""
    edit = QuantizeAttention(component="transformer", module="transformer_blocks.0.attn1", integer_values=True)
    write_pipeline(tmp_path / "source", sources["label"], [edit], {"transformer": {}}, [])
    source = PipelineFolder(tmp_path / "source", "attentive")
    manifest = export_onnx(source, tmp_path / "export", steps=4, guidance_scale=3.0)
    assert {name: graph.format for name, graph in manifest.components.items()} == {
        "denoiser": "int8",
        "decoder": "float32",
    }
    products = [node.op_type for node in ir.load(tmp_path / "export" / "denoiser.onnx").graph]
    assert (products.count("Softmax"), products.count("MatMulInteger")) == (0, 2)
