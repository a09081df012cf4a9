"""Compiling: one graph for all steps, blocks one by one, and what is told of layers that no graph holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from diffpress.export.edits import Pack
from diffpress.export.runtime import StepClock, pack_layer
from diffpress.export.runtime.fusion import Fusion, compile_
from diffpress.kernels.library import CHOICE

UNET = "UNet2DConditionModel"


class CountingBackend:
    """Runs graphs as they are, and counts those with layers on codes."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += any(str(node.target).startswith("diffpress.integer") for node in module.graph.nodes)
        return module.forward


class TwoLayers(nn.Module):
    """A norm and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.second(self.first(self.norm(x)))


def test_one_graph_serves_all_steps_with_the_scales_of_each(packed, watched, check_codes) -> None:
    denoiser, call = packed("DiTTransformer2DModel", asymmetric=True)
    graphs = watched(denoiser)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    steps = [900.0, 500.0, 100.0, 300.0]
    for step in steps:
        call(step)
    # The clock's own, and the denoiser's.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2
    table = denoiser.transformer_blocks[0].attn1.to_q.activation_scale
    expected = [table[0], table[1], table[2], (table[1] + table[2]) / 2]
    for graph, scale in zip(graphs, expected, strict=True):
        assert check_codes(graph) == 5
        fused = next(node for node in graph.rewritten.nodes if str(node.target) == "diffpress.norm_modulate_quantize")
        assert graph.values[fused.args[5].name].item() == pytest.approx(scale.item(), rel=2.0**-22)


def test_more_pictures_take_a_graph_that_serves_any_number(pack_tiny) -> None:
    model, backend = TwoLayers().eval(), CountingBackend()
    pack_tiny(model)
    fusions = compile_(model, backend)
    for batch in (2, 3, 4, 5):
        x = torch.randn(batch, 7, 16)
        model(x, timestep=torch.tensor([500.0]))
    assert backend.graphs == 2
    assert list(fusions) == [
        Fusion("first", "layer norm", None),
        Fusion("second", None, "its input comes from another packed layer"),
    ]


@pytest.mark.long
def test_blocks_one_by_one(packed) -> None:
    denoiser, call = packed(UNET)
    backend = CountingBackend()
    whole = {fusion.layer: fusion for fusion in _compiled(packed, UNET)}
    fusions = compile_(denoiser, backend, regional=True, dynamic=False, fullgraph=True)
    call(900.0)
    graphs = backend.graphs
    for step in (500.0, 100.0):
        call(step)
    assert backend.graphs == graphs
    # Four transformer blocks run one graph, and five resnets those of the way down, the middle and the way up.
    assert graphs == 4
    found = {fusion.layer: fusion for fusion in fusions}
    blocks = [name for name in whole if "transformer_blocks" in name or ".resnets." in name]
    assert {name: found[name].norm for name in blocks} == {name: whole[name].norm for name in blocks}
    assert {found[name].reason for name in found.keys() - set(blocks)} == {"outside the blocks that are compiled"}


def _compiled(packed: Callable[..., Any], kind: str) -> list[Fusion]:
    denoiser, call = packed(kind)
    fusions = compile_(denoiser, "eager", fullgraph=True)
    call(900.0)
    torch._dynamo.reset()
    return list(fusions)


def test_what_is_told_before_the_first_call_and_of_embeddings(packed) -> None:
    denoiser, _ = packed("DiTTransformer2DModel")
    embedding = Pack(component="denoiser", module="e", weight_bits=8, activation_bits=None, group_size=4)
    denoiser.labels = pack_layer(nn.Embedding(3, 4), embedding, None)
    fusions = compile_(denoiser)
    reasons = Counter(fusion.reason for fusion in fusions)
    assert reasons == fusions.counts()
    assert reasons.pop("an embedding has no input to quantise") == 1
    assert list(reasons) == ["not compiled yet: graphs are made by the first call"]
    assert "labels: not fused, an embedding has no input to quantise" in str(fusions).splitlines()


def test_a_layer_called_twice_is_fused_where_both_calls_are(pack_tiny) -> None:
    class Twice(TwoLayers):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.first(self.norm(x)) + self.first(x)

    model = Twice().eval()
    pack_tiny(model)
    fusions = compile_(model, "eager")
    model(torch.randn(2, 7, 16), timestep=torch.tensor([500.0]))
    assert next(iter(fusions)) == Fusion("first", None, "its input comes from an input of the graph")


def test_a_norm_in_another_graph_is_out_of_reach(pack_tiny) -> None:
    class Broken(TwoLayers):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            x = self.norm(x)
            torch._dynamo.graph_break()
            return self.first(x)

    model = Broken().eval()
    pack_tiny(model)
    fusions = compile_(model, "eager")
    model(torch.randn(2, 7, 16), timestep=torch.tensor([500.0]))
    assert next(iter(fusions)) == Fusion("first", None, "its input comes from an input of the graph")


def test_references_may_be_asked_for(packed, watched, check_codes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE, "reference")
    denoiser, call = packed("DiTTransformer2DModel", smoothed=True)
    graphs = watched(denoiser)
    call(100.0)
    assert check_codes(graphs[0]) == 5


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compilers_take_the_rewritten_graph(backend: str, pack_tiny) -> None:
    model = TwoLayers().eval()
    clock: StepClock = pack_tiny(model, smoothed=True, asymmetric=True)
    clock.set(100.0)
    x = next(x for x in map(_random, range(100)) if _has_no_ties(model, clock, x))
    expected = model(x, timestep=torch.tensor([100.0]))
    fusions = compile_(model, backend, fullgraph=True)
    # Where no value lies between two codes, the sums are of the same integers.
    assert torch.equal(model(x, timestep=torch.tensor([100.0])), expected)
    assert next(iter(fusions)).norm == "layer norm"


def _random(seed: int) -> Tensor:
    return torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(seed))


def _has_no_ties(model: TwoLayers, clock: StepClock, x: Tensor) -> bool:
    """Whether codes are further from being rounded elsewhere than float32 may miss their values.

    A norm over n numbers is wrong by n units of the largest input in units of its spread, in its mean and in its spread.
    """
    layer, spread = model.first, x.double().var(-1, correction=0).sqrt().min()
    value = nn.functional.layer_norm(x.double(), (16,)) * layer.smoothing / clock.select(layer.activation_scale)
    error = (16 + 32) * 2.0**-24 * (1 + x.abs().max() / spread) * value.abs().max()
    return bool(((value - value.floor() - 0.5).abs() > error).all())
