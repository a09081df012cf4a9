"""Tiny denoisers of five kinds with every layer packed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from diffpress.export.edits import Pack
from diffpress.export.runtime import PackedLayer, StepClock, attach_clock_, pack_layer, why_not_packable
from diffpress.export.runtime.fusion import Fusion, fuse_
from diffpress.kernels import code_range, pack_codes, quantize

STEPS = [900.0, 500.0, 100.0]
UNET = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 1,
    "sample_size": 8,
    "patch_size": 2,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "use_additional_conditions": False,
    "norm_num_groups": 4,
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "activation_fn": "gelu-approximate",
}
FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 4, 8),
}
SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 8,
    "out_channels": 4,
    "pos_embed_max_size": 8,
}
PICTURE, TEXT, POOLED = (2, 4, 8, 8), (2, 5, 12), (2, 8)
DENOISERS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "UNet2DConditionModel": (UNET, {"sample": PICTURE, "encoder_hidden_states": (2, 5, 16)}),
    "PixArtTransformer2DModel": (PIXART, {"hidden_states": PICTURE, "encoder_hidden_states": TEXT}),
    "DiTTransformer2DModel": (DIT, {"hidden_states": PICTURE}),
    "FluxTransformer2DModel": (
        FLUX,
        {
            "hidden_states": (2, 16, 4),
            "encoder_hidden_states": TEXT,
            "pooled_projections": POOLED,
            "img_ids": (16, 3),
            "txt_ids": (5, 3),
        },
    ),
    "SD3Transformer2DModel": (
        SD3,
        {"hidden_states": PICTURE, "encoder_hidden_states": TEXT, "pooled_projections": POOLED},
    ),
}
"""Options, and the shapes of random inputs."""
OTHERS = {
    "PixArtTransformer2DModel": {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    "DiTTransformer2DModel": {"class_labels": torch.tensor([1, 2])},
}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def packed() -> Callable[..., tuple[nn.Module, Callable[[float], Tensor]]]:
    """A function: the tiny denoiser of that class with every layer packed, and its call at a time step."""

    def make(kind: str, dtype: torch.dtype = torch.float32, **form: Any) -> tuple[nn.Module, Callable[[float], Tensor]]:
        torch.manual_seed(0)
        options, shapes = DENOISERS[kind]
        denoiser = getattr(diffusers, kind)(**options).eval().to(dtype)
        inputs = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()} | OTHERS.get(kind, {})
        pack_(denoiser, **form)
        return denoiser, lambda step: denoiser(**inputs, timestep=torch.tensor([step] * 2), return_dict=False)[0]

    return make


@pytest.fixture
def pack_tiny() -> Callable[..., StepClock]:
    """A function: packs every layer of a module, in W8A8 unless it is told otherwise, and gives it a clock."""
    return pack_


def pack_(denoiser: nn.Module, **form: Any) -> StepClock:
    """Each layer has another table of scales."""
    clock = StepClock(STEPS)
    options = {"component": "denoiser", "weight_bits": 8, "activation_bits": 8} | form
    for name, layer in list(denoiser.named_modules()):
        if why_not_packable(layer) is None and not isinstance(layer, nn.Embedding):
            packed = pack_layer(layer, Pack.model_validate({"module": name} | options), clock)
            _fill_(packed, layer)
            denoiser.set_submodule(name, packed)
    attach_clock_(denoiser, clock)
    return clock


def _fill_(packed: PackedLayer, layer: nn.Module) -> None:
    weight = layer.weight.float().flatten(1)
    scale = weight.abs().amax(1).clamp(min=1e-8) / code_range(packed.edit.weight_bits)[1]
    if packed.weight.dtype == torch.float8_e4m3fn:
        packed.weight.copy_(weight.to(torch.float8_e4m3fn))
    else:
        codes = quantize(weight, scale[:, None], packed.edit.weight_bits)
        packed.weight.copy_(pack_codes(codes, packed.edit.weight_bits))
        packed.weight_scale.copy_(scale if packed.edit.group_size is None else scale[:, None])
    if packed.bias is not None:
        packed.bias.copy_(layer.bias)
    if packed.activation_scale is not None:
        packed.activation_scale.copy_(torch.linspace(6, 2, len(STEPS)).mul(1 + 0.2 * torch.rand(())) / 127)
    if packed.zero_point is not None:
        packed.zero_point.copy_(torch.tensor([-3.0, 2.0, 5.0]))
    if packed.smoothing is not None:
        packed.smoothing.uniform_(0.5, 2)


class Watched(NamedTuple):
    """A graph as it was captured and as it is rewritten, what became of its layers, and what its nodes gave."""

    captured: Graph
    rewritten: Graph
    fusions: list[Fusion]
    values: dict[str, Any]


@pytest.fixture
def watched() -> Callable[[nn.Module], list[Watched]]:
    """A function: compiles a model, and gives a list that each graph with packed layers joins when it runs."""

    def watch(model: nn.Module) -> list[Watched]:
        found: list[Watched] = []

        def backend(module: GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
            captured = copy.deepcopy(module.graph)
            fusions = fuse_(module, lambda weight: weight.name)
            interpreter = Interpreter(module, garbage_collect_values=False)

            def run(*inputs: Any) -> Any:
                output = interpreter.run(*inputs)
                values = {node.name: value for node, value in interpreter.env.items()}
                found.append(Watched(captured, module.graph, fusions, values))
                return output

            return run if fusions else module.forward

        model.compile(backend=backend, fullgraph=True)
        return found

    return watch


@pytest.fixture
def check_codes() -> Callable[[Watched], int]:
    """A function: holds the codes of every fused layer to float64; returns how many layers there are.

    What comes before a layer is taken as it ran, so that a code that moves by one is not blamed on those after it.
    """

    def check(graph: Watched) -> int:
        on_codes = {node.args[1].name: node for node in graph.rewritten.nodes if str(node.target) in ON_CODES}
        layers = [
            node for node in graph.captured.nodes if node.args[1:] and getattr(node.args[1], "name", "") in on_codes
        ]
        for layer in layers:
            _check_layer(layer, on_codes[layer.args[1].name], graph.values)
        return len(layers)

    return check


ON_CODES = ("diffpress.integer_linear", "diffpress.integer_conv2d")


def _check_layer(layer: Node, on_codes: Node, values: dict[str, Any]) -> None:
    """Codes lie within half a code of the truth, and by how much float32 may miss it; equal codes give equal outputs."""
    is_conv = str(layer.target).endswith("conv2d")
    given = values[on_codes.args[0].name]
    given = given.permute(0, 3, 1, 2) if is_conv else given
    truth, single = Evaluation(values, torch.float64), Evaluation(values, None)
    scale, zero = values[layer.args[3].name].double(), 0 if layer.args[4] is None else values[layer.args[4].name]
    expected = (truth(layer.args[0]) / scale + zero).clamp(-128, 127)
    fused = on_codes.args[0]
    while not str(fused.target).endswith("_quantize"):
        fused = fused.args[0]
    largest = max(value.abs().max() for value in (truth(layer.args[0]), *truth.made.values()))
    allowed = 0.5 + _rounding(fused, values, largest) / scale
    assert allowed < 0.75
    assert ((given - expected).abs() <= allowed).all()
    if single(layer.args[0]).dtype == torch.float32:
        own = quantize(
            single(layer.args[0]), scale.float(), layer.args[-1], zero if layer.args[4] is not None else None
        )
        assert ((own - expected).abs() <= allowed).all()
        if torch.equal(own, given):
            output = values[on_codes.name]
            assert torch.equal(single(layer), output.permute(0, 3, 1, 2) if is_conv else output)


class Evaluation:
    """What the nodes of the captured graph give, from what those gave that are still in the rewritten one."""

    def __init__(self, values: dict[str, Any], dtype: torch.dtype | None) -> None:
        self.values, self.dtype = values, dtype
        self.made: dict[Node, Any] = {}

    def __call__(self, node: Node) -> Any:
        if node.name in self.values:
            value = self.values[node.name]
            wide = self.dtype is not None and isinstance(value, Tensor) and value.is_floating_point()
            return value.to(self.dtype) if wide else value
        if node not in self.made:
            arguments, options = map_arg((node.args, node.kwargs), self)
            if self.dtype is not None and node.target in ("to", "float"):
                self.made[node] = arguments[0]
            elif node.op == "call_method":
                self.made[node] = getattr(arguments[0], node.target)(*arguments[1:], **options)
            else:
                self.made[node] = node.target(*arguments, **options)
        return self.made[node]


def _rounding(fused: Node, values: dict[str, Any], largest: Tensor) -> Tensor:
    """By how much float32 may miss what is quantised.

    A norm over n numbers is wrong by n units of the largest input in units of its spread, in its mean and in its spread;
    what follows it takes 32 roundings at most of numbers no larger than the `largest` on the way.
    """
    x = values[fused.args[0].name].double()
    if "group" in str(fused.target):
        x = x.reshape(len(x), fused.args[6], -1)
    centred = x if "rms" in fused.args else x - x.mean(-1, keepdim=True)
    spread = centred.square().mean(-1).sqrt().min()
    return (x.shape[-1] + 32) * 2.0**-24 * (1 + x.abs().max() / spread) * largest
