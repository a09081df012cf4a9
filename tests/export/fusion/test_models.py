"""Denoisers of diffusers: which layers are fused, and that each gets the codes of its norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffpress.export.runtime.fusion import compile_

NORMS = {
    "UNet2DConditionModel": {
        "layer norm": {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "ff.net.0.proj"},
        "group norm, silu": {"conv1", "conv2", "conv_out"},
        "group norm": {"proj_in"},
    },
    "PixArtTransformer2DModel": {
        "layer norm, modulated": {"attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj", ".proj_out"}
    },
    "DiTTransformer2DModel": {
        "layer norm, modulated": {"attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj", "proj_out_2"}
    },
    "FluxTransformer2DModel": {
        "layer norm, modulated": {
            *(f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")),
            *(f"transformer_blocks.0.attn.add_{name}_proj" for name in "qkv"),
            *(f"single_transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
            *(f"transformer_blocks.0.{name}.net.0.proj" for name in ("ff", "ff_context")),
            ".proj_out",
        }
    },
    "SD3Transformer2DModel": {
        "layer norm, modulated": {
            *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
            "ff.net.0.proj",
            "ff_context.net.0.proj",
            ".proj_out",
        }
    },
}
"""Ends of the names of the layers that a norm is fused with; two dots before a name are the denoiser itself."""
SILU = {
    "timestep_embedder.linear_2",
    "text_embedder.linear_2",
    "norm1.linear",
    "norm1_context.linear",
    "norm_out.linear",
}
REASONS = {
    "UNet2DConditionModel": {
        "scaled_dot_product_attention": {"to_out.0"},
        "an input of the graph": {"conv_in", "attn2.to_k", "attn2.to_v"},
        "silu": {"time_embedding.linear_2", "time_emb_proj"},
        "gelu": {"ff.net.2"},
        "add": {"attentions.0.proj_out", "attentions.1.proj_out"},
        "cat": {"conv_shortcut", "time_embedding.linear_1"},
    },
    "PixArtTransformer2DModel": {
        "scaled_dot_product_attention": {"to_out.0"},
        "an input of the graph": {"pos_embed.proj", "caption_projection.linear_1"},
        "another packed layer": {"attn2.to_k", "attn2.to_v"},
        "silu": {"timestep_embedder.linear_2", "adaln_single.linear"},
        "gelu": {"ff.net.2", "caption_projection.linear_2"},
        "add": {"attn2.to_q"},
        "cat": {"timestep_embedder.linear_1"},
    },
    "DiTTransformer2DModel": {
        "scaled_dot_product_attention": {"to_out.0"},
        "an input of the graph": {"pos_embed.proj"},
        "silu": {"timestep_embedder.linear_2", "norm1.linear", "proj_out_1"},
        "gelu": {"ff.net.2"},
        "cat": {"timestep_embedder.linear_1"},
    },
    "FluxTransformer2DModel": {
        "split_with_sizes": {"to_out.0", "to_add_out"},
        "an input of the graph": {"x_embedder", "context_embedder", "text_embedder.linear_1"},
        "silu": {
            "timestep_embedder.linear_2",
            "text_embedder.linear_2",
            "norm.linear",
            "norm1.linear",
            "norm1_context.linear",
            "norm_out.linear",
        },
        "gelu": {"ff.net.2", "ff_context.net.2"},
        "cat": {"timestep_embedder.linear_1", "single_transformer_blocks.0.proj_out"},
    },
    "SD3Transformer2DModel": {
        "indexing": {"to_out.0", "to_add_out"},
        "an input of the graph": {"pos_embed.proj", "context_embedder", "text_embedder.linear_1"},
        "silu": {
            "timestep_embedder.linear_2",
            "text_embedder.linear_2",
            "norm1.linear",
            "norm1_context.linear",
            "norm_out.linear",
        },
        "gelu": {"ff.net.2", "ff_context.net.2"},
        "cat": {"timestep_embedder.linear_1"},
    },
}
"""What the other layers read."""


SECOND = ("PixArtTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel")
"""Their norms are those of the other two, under which codes are the same."""
CODES = [pytest.param(kind, marks=pytest.mark.long) if kind in SECOND else kind for kind in NORMS]


@pytest.mark.parametrize("kind", CODES)
def test_which_layers_of_a_denoiser_are_fused(kind: str, packed) -> None:
    denoiser, call = packed(kind)
    fusions = compile_(denoiser, "eager", fullgraph=True)
    call(900.0)
    expected = NORMS[kind] | {f"its input comes from {source}": ends for source, ends in REASONS[kind].items()}
    assert set(fusions.counts()) == set(expected)
    for fusion in fusions:
        ends = [
            words for words, names in expected.items() if f"..{fusion.layer}".endswith(tuple(f".{n}" for n in names))
        ]
        assert ends == [fusion.norm or fusion.reason], fusion.layer


SMOOTHED = {"weight_bits": 4, "asymmetric": True, "smoothed": True}


# What the plain form has, the smoothed one with zero points has too.
@pytest.mark.parametrize(
    "form", [pytest.param({}, marks=pytest.mark.long), SMOOTHED], ids=["W8A8", "W4A8 smoothed, zero points"]
)
@pytest.mark.parametrize("kind", CODES)
def test_codes_are_those_of_the_norm(kind: str, form: dict[str, Any], packed, watched, check_codes) -> None:
    denoiser, call = packed(kind, **form)
    graphs = watched(denoiser)
    call(500.0)
    assert check_codes(graphs[0]) == sum(fusion.norm is not None for fusion in graphs[0].fusions) > 4


@pytest.mark.long
@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "FluxTransformer2DModel"])
def test_codes_in_half_precision_are_those_of_the_norm_in_float32(kind: str, packed, watched, check_codes) -> None:
    denoiser, call = packed(kind, torch.bfloat16, asymmetric=True, smoothed=True)
    graphs = watched(denoiser)
    call(500.0)
    assert check_codes(graphs[0]) == sum(fusion.norm is not None for fusion in graphs[0].fusions) > 4
