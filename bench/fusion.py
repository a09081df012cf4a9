"""How many packed layers of real denoisers take their codes from a norm, and why others do not: `python bench/fusion.py`.

Models of full size in W8A8 are captured by TorchDynamo on the meta device, without weights: no memory, a minute each.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

import diffpress

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from denoisers import DENOISERS, FORMATS, Denoiser, pack_
from machine import machine

SD15 = Denoiser(
    "UNet2DConditionModel",
    {"cross_attention_dim": 768, "attention_head_dim": 8},
    {"sample": (2, 4, 64, 64), "encoder_hidden_states": (2, 77, 768)},
    {},
)
DIT = Denoiser(
    "DiTTransformer2DModel",
    {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "sample_size": 32,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    },
    {"hidden_states": (2, 4, 32, 32)},
    {},
)
SD3 = Denoiser(
    "SD3Transformer2DModel",
    {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    },
    {"hidden_states": (2, 16, 128, 128), "encoder_hidden_states": (2, 333, 4096), "pooled_projections": (2, 2048)},
    {},
)
MODELS = {"SD1.5": SD15, "SDXL": DENOISERS["SDXL"], "PixArt": DENOISERS["PixArt"], "DiT-XL/2": DIT}
MODELS |= {"SD3": SD3, "FLUX": DENOISERS["FLUX"]}
OTHERS: dict[str, dict[str, Any]] = {
    "PixArtTransformer2DModel": {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    "DiTTransformer2DModel": {"class_labels": torch.empty(2, dtype=torch.int64, device="meta")},
}
"""What a class is called with beside tensors of floats."""


def packed(denoiser: Denoiser) -> tuple[nn.Module, dict[str, Any]]:
    """The model in W8A8, without weights, and what it is called with."""
    with torch.device("meta"):
        model = getattr(import_module("diffusers"), denoiser.kind)(**denoiser.options)
        model = model.bfloat16().eval().requires_grad_(False)
        pack_(model, FORMATS["W8A8"])
        inputs = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in denoiser.inputs.items()}
        conditions = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in denoiser.conditions.items()}
        timestep = torch.empty(len(next(iter(inputs.values()))))
    others = {"added_cond_kwargs": conditions} if conditions else OTHERS.get(denoiser.kind, {})
    return model.to("meta"), inputs | others | {"timestep": timestep, "return_dict": False}


@torch.no_grad()
def measure(name: str) -> dict[str, Any]:
    """A row: packed layers, how many are fused with a norm, and the counts of norms and reasons."""
    torch._dynamo.reset()
    model, inputs = packed(MODELS[name])
    fusions = diffpress.compile(model, lambda graph, _inputs: graph.forward, fullgraph=True)
    model(**inputs)
    found = list(fusions)
    fused = [fusion for fusion in found if fusion.norm is not None]
    return {"model": name, "layers": len(found), "fused": len(fused), "counts": fusions.counts()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [measure(name) for name in arguments.models]
    if arguments.json:
        print(json.dumps({"machine": machine(), "rows": rows}, indent=1))
        return
    for row in rows:
        print(f"{row['model']}: {row['fused']} of {row['layers']} layers are fused with a norm")
        print(*(f"  {count:4} {words}" for words, count in row["counts"].items()), sep="\n")


if __name__ == "__main__":
    main()
