"""What stands between a norm and a layer: what is seen through, and what is refused with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from torch import Tensor, nn

CHANNELS, TOKENS = 12, 5
Forward = Callable[["Block", Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Norms and layers that a forward of one line puts together; it is called as a denoiser is."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.line = forward
        self.layer_norm = nn.LayerNorm(CHANNELS)
        self.bare_norm = nn.LayerNorm(CHANNELS, elementwise_affine=False)
        self.wide_norm = nn.LayerNorm([TOKENS, CHANNELS])
        self.float_norm = FP32LayerNorm(CHANNELS)
        self.rms_norm = RMSNorm(CHANNELS, 1e-6)
        self.torch_rms_norm = nn.RMSNorm(CHANNELS, 1e-6)
        self.open_rms_norm = nn.RMSNorm(CHANNELS)
        self.group_norm = nn.GroupNorm(3, CHANNELS)
        self.bare_group_norm = nn.GroupNorm(3, CHANNELS, affine=False)
        self.dropout = nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.rand(CHANNELS) + 0.5)
        for name in ("layer_norm", "float_norm", "rms_norm", "torch_rms_norm", "group_norm", "wide_norm"):
            for parameter in getattr(self, name).parameters():
                nn.init.normal_(parameter)
        self.linear = nn.Linear(CHANNELS, 6)
        self.other = nn.Linear(CHANNELS, 6)
        self.conv = nn.Conv2d(CHANNELS, 4, 3, padding=1)
        self.embed = nn.Linear(CHANNELS, 2 * CHANNELS)

    def forward(self, x: Tensor, timestep: Tensor, given: Tensor) -> Any:
        return self.line(self, x, given)


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, TOKENS, CHANNELS) * 2 + 1


def images() -> Tensor:
    return torch.randn(2, CHANNELS, 6, 4) * 2 + 1


def modulated(block: Block, x: Tensor, given: Tensor) -> Tensor:
    shift, scale = given.chunk(2, 1)
    return block.linear(block.bare_norm(x) * (1 + scale[:, None]) + shift[:, None])


def modulated_after(block: Block, x: Tensor, given: Tensor) -> Tensor:
    """The axis added after the one; a gain of every channel before and after."""
    shift, scale = given.chunk(2, 1)
    value = block.gain * block.layer_norm(x) * (1 + scale)[:, None, :] + shift.unsqueeze(1)
    return block.linear(value * block.gain)


def in_tokens(block: Block, x: Tensor, _given: Tensor) -> Tensor:
    """As in diffusers' Transformer2DModel with a linear projection."""
    return block.linear(block.group_norm(x).permute(0, 2, 3, 1).reshape(2, 24, CHANNELS))


def in_attention(block: Block, x: Tensor, _given: Tensor) -> Tensor:
    """As in diffusers' Attention with a group norm."""
    value = x.view(2, CHANNELS, 24).transpose(1, 2)
    return block.linear(block.group_norm(value.transpose(1, 2)).transpose(1, 2))


FUSED: dict[str, tuple[Forward, Callable[[], Tensor], str]] = {
    "layer norm": (lambda b, x, _: b.linear(b.layer_norm(x)), tokens, "layer norm"),
    "casts": (lambda b, x, _: b.linear(b.float_norm(x.double()).to(x.dtype)), tokens, "layer norm"),
    "modulation": (modulated, tokens, "layer norm, modulated"),
    "modulation of one": (modulated, lambda: tokens(1), "layer norm, modulated"),
    "modulation, gains": (modulated_after, tokens, "layer norm, modulated"),
    "scale alone": (lambda b, x, g: b.linear(b.bare_norm(x) * g[:, None, :CHANNELS]), tokens, "layer norm, modulated"),
    "one for all": (lambda b, x, g: b.linear(b.bare_norm(x) + g[:1, None, :CHANNELS]), tokens, "layer norm, modulated"),
    "gain and term": (lambda b, x, _: b.linear(b.layer_norm(x) * b.gain + b.gain), tokens, "layer norm"),
    "RMS norm of torch": (lambda b, x, _: b.linear(b.torch_rms_norm(x)), tokens, "rms norm"),
    "RMS norm of diffusers": (lambda b, x, _: b.linear(b.rms_norm(x)), tokens, "rms norm"),
    "windows": (lambda b, x, _: b.linear(b.layer_norm(x).view(2 * TOKENS, 1, CHANNELS)), tokens, "layer norm"),
    "group norm, tokens": (in_tokens, images, "group norm"),
    "group norm of tokens": (in_attention, images, "group norm"),
    "group norm": (lambda b, x, _: b.conv(b.group_norm(x)), images, "group norm"),
    "SiLU": (lambda b, x, _: b.conv(b.dropout(F.silu(b.group_norm(x))) / 1.0), images, "group norm, silu"),
}
"""The line of a block, its input, and what its norm is called."""
SMOOTHED = {"smoothed": True, "asymmetric": True}
# What the plain form has, the smoothed one with zero points has too.
FORMS = [
    pytest.param({}, id="plain", marks=pytest.mark.long),
    pytest.param(SMOOTHED, id="smoothed, zero points"),
]


@pytest.fixture
def run(pack_tiny, watched) -> Callable[..., tuple[Any, Any, Block]]:
    """A function: the graph of a packed block, run at the second step, its output, and the block."""

    def call(line: Forward, x: Tensor, **form: Any) -> tuple[Any, Any, Block]:
        torch.manual_seed(1)
        block = Block(line).eval()
        pack_tiny(block, **form)
        graphs = watched(block)
        output = block(x, timestep=torch.tensor([500.0]), given=torch.randn(len(x), 2 * CHANNELS))
        return graphs[0], output, block

    return call


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("line", "make", "norm"), FUSED.values(), ids=FUSED)
def test_what_is_seen_through(line: Forward, make: Callable[[], Tensor], norm: str, form, run, check_codes) -> None:
    graph, _, _ = run(line, make(), **form)
    assert [fusion.norm for fusion in graph.fusions] == [norm]
    assert check_codes(graph) == 1
    left = {node.name for node in graph.rewritten.nodes} & {"layer_norm", "group_norm", "rms_norm", "rsqrt"}
    assert not left


def in_place(block: Block, x: Tensor, _given: Tensor) -> Tensor:
    x = x + 1
    value = block.layer_norm(x)
    x += 1
    return block.linear(value) + x.sum()


def silu_in_place(block: Block, x: Tensor, _given: Tensor) -> Tensor:
    return block.conv(F.silu(block.group_norm(x), inplace=True))


def positions(block: Block, x: Tensor, given: Tensor) -> Tensor:
    """A factor for every token, whose number is that of the images as well."""
    return block.linear(block.layer_norm(x) * (1 + given[:, :CHANNELS])[None])


REFUSED: dict[str, tuple[Forward, Callable[[], Tensor], str]] = {
    "input": (lambda b, x, _: b.linear(x), tokens, "its input comes from an input of the graph"),
    "gelu": (lambda b, x, _: b.linear(F.gelu(b.layer_norm(x))), tokens, "its input comes from gelu"),
    "gate": (lambda b, x, _: b.linear(x * F.gelu(b.layer_norm(x))), tokens, "its input comes from gelu"),
    "residual": (lambda b, x, _: b.linear(b.layer_norm(x) + x), tokens, "its input comes from add"),
    "doubled": (lambda b, x, _: b.linear(b.layer_norm(x) * 2), tokens, "its input comes from mul"),
    "SiLU": (lambda b, x, _: b.linear(F.silu(b.layer_norm(x))), tokens, "silu follows its layer norm"),
    "two axes": (lambda b, x, _: b.linear(b.wide_norm(x)), tokens, "its layer norm is over 2 axes"),
    "eps": (lambda b, x, _: b.linear(b.open_rms_norm(x)), tokens, "its rms norm leaves eps to torch"),
    "bare": (lambda b, x, _: b.conv(b.bare_group_norm(x)), images, "its group norm has no weight or no bias"),
    "rows": (
        lambda b, x, _: b.linear(b.layer_norm(x[:, 0])),
        tokens,
        r"x must be floating point \[B, T, C\], got torch.float32 \[2, 12\]",
    ),
    "tokens": (lambda b, x, _: b.linear(b.layer_norm(x) * x[:1]), tokens, "mul follows its layer norm"),
    "tokens, as many as images": (positions, lambda: tokens(TOKENS), "mul follows its layer norm"),
    "twice": (
        lambda b, x, g: b.linear((b.layer_norm(x) + g[:, None, :CHANNELS]) * (1 + g[:, None, :CHANNELS])),
        tokens,
        "mul follows its layer norm",
    ),
    "group norm, modulated": (
        lambda b, x, g: b.conv(b.group_norm(x) * (1 + g[:, :CHANNELS, None, None])),
        images,
        "mul follows its group norm",
    ),
    "channels last": (
        lambda b, x, _: b.conv(b.layer_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        images,
        "a layer norm is over the last axis, and not over the channels of a convolution",
    ),
    "turned": (
        lambda b, x, _: b.conv(b.group_norm(x).transpose(2, 3)),
        images,
        "transpose comes between its norm and it",
    ),
    "in place": (in_place, tokens, "a tensor is changed in place between its norm and it"),
    "SiLU in place": (silu_in_place, images, "its input comes from silu"),
}


@pytest.mark.parametrize(("line", "make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_why_and_is_left_as_it_is(line: Forward, make, reason: str, run) -> None:
    graph, _, _ = run(line, make())
    (fusion,) = graph.fusions
    assert fusion.norm is None
    assert re.fullmatch(reason, fusion.reason)
    assert [node.name for node in graph.rewritten.nodes] == [node.name for node in graph.captured.nodes]


FORMATS = {
    "weight-only: its input stays in float": {"activation_bits": None, "group_size": 4},
    "float8: fused operations give integers": {"float8": True},
}


@pytest.mark.parametrize(("reason", "form"), FORMATS.items(), ids=["weight-only", "float8"])
def test_formats_without_integer_inputs_say_so(reason: str, form: dict[str, Any], run) -> None:
    graph, _, _ = run(lambda b, x, _: b.linear(b.layer_norm(x)), tokens(), **form)
    assert [fusion.reason for fusion in graph.fusions] == [reason]


def two_layers(block: Block, x: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    shift, scale = given.chunk(2, 1)
    value = block.bare_norm(x) * (1 + scale[:, None]) + shift[:, None]
    return block.linear(value), block.other(value)


def count(graph: Any, name: str) -> int:
    return sum(str(node.target) == f"diffpress.{name}" for node in graph.rewritten.nodes)


def test_layers_with_tables_of_their_own_get_codes_of_their_own(run, check_codes) -> None:
    graph, _, _ = run(two_layers, tokens(), smoothed=True, asymmetric=True)
    assert count(graph, "norm_modulate_quantize") == 2
    assert check_codes(graph) == 2


def test_layers_that_share_their_tables_share_their_codes(pack_tiny, watched, check_codes) -> None:
    block = Block(two_layers).eval()
    pack_tiny(block, smoothed=True, asymmetric=True)
    for name in ("activation_scale", "zero_point", "smoothing"):
        setattr(block.other, name, getattr(block.linear, name))
    graphs = watched(block)
    block(tokens(), timestep=torch.tensor([500.0]), given=torch.randn(2, 2 * CHANNELS))
    assert count(graphs[0], "norm_modulate_quantize") == 1
    assert check_codes(graphs[0]) == 2


def test_a_norm_with_another_reader_stays_for_it(run, check_codes) -> None:
    def line(block: Block, x: Tensor, _given: Tensor) -> tuple[Tensor, Tensor]:
        value = block.layer_norm(x)
        return block.linear(value), value

    graph, (_, value), block = run(line, x := tokens())
    assert check_codes(graph) == 1
    assert torch.equal(value, block.layer_norm(x))


def test_the_chain_before_a_fused_layer_is_gone(run) -> None:
    graph, _, _ = run(modulated, tokens())
    words = {getattr(node.target, "__name__", node.target) for node in graph.rewritten.nodes}
    assert not words & {"add", "layer_norm"}
