"""A peer's W8A8 denoiser of random weights beside the float one, call by call: `python bench/peers/one_call.py PEER ...`."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from diffpress.calibration.cost import latencies_ms, median_ratio

sys.path.insert(0, str(Path(__file__).parent))


Inputs = dict[str, Tensor]


def random_denoiser(text_width: int) -> nn.Module:
    """A UNet of Stable Diffusion 1.5's size."""
    return _random(UNet2DConditionModel(cross_attention_dim=text_width))


def random_transformer(text_width: int) -> nn.Module:
    """A transformer of PixArt's size."""
    return _random(
        PixArtTransformer2DModel(
            num_layers=28,
            sample_size=64,
            caption_channels=text_width,
            cross_attention_dim=1152,
            use_additional_conditions=False,
        )
    )


def _random(model: nn.Module) -> nn.Module:
    """With normal weights of the width that diffusers gives to even ones: trained ones are nearer to them."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter.data, std=float(parameter.data.std()))
    return model.eval().requires_grad_(False)


def random_inputs(latent: Sequence[int], text: Sequence[int], timestep: float) -> Inputs:
    """What one call of it is fed."""
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(list(latent), generator=generator),
        "timestep": torch.tensor([timestep]),
        "encoder_hidden_states": torch.randn(list(text), generator=generator),
    }


@torch.no_grad()
def call(denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """One call."""
    return denoiser(**inputs, return_dict=False)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer")
    parser.add_argument("--latent", type=int, nargs=4, required=True)
    parser.add_argument("--text", type=int, nargs=3, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peer = import_module(f"by_{arguments.peer}")
    plain, inputs = random_denoiser(arguments.text[-1]), random_inputs(arguments.latent, arguments.text, 961.0)
    with TemporaryDirectory() as work:
        found = peer.quantize(copy.deepcopy(plain), "W8A8", lambda: [inputs], Path(work))
        if found.compiled:
            found.denoiser.compile()
        own, float32 = latencies_ms(
            [partial(call, found.denoiser, inputs), partial(call, plain, inputs)], arguments.repeats
        )
    print(json.dumps({"milliseconds": min(own), "over_float32": median_ratio(own, float32)}))


if __name__ == "__main__":
    main()
