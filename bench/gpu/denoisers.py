"""One call of whole denoisers with random weights: `python bench/gpu/denoisers.py DIR`, a part of `gpu.sh`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from inputs import Source
from rows import Row, main

Inputs = Mapping[str, tuple[int, ...]]


class Denoiser(NamedTuple):
    """A class of diffusers, its configuration, and the inputs of one call."""

    kind: str
    options: Mapping[str, Any]
    inputs: Inputs
    """Shapes of random inputs."""
    conditions: Inputs
    """Shapes of what is given as `added_cond_kwargs`."""


class Format(NamedTuple):
    """Bits of weights and of inputs, and columns that share a scale."""

    weight_bits: int
    activation_bits: int | None
    group_size: int | None = None


SDXL = Denoiser(
    "UNet2DConditionModel",
    {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    {"sample": (2, 4, 128, 128), "encoder_hidden_states": (2, 77, 2048), "timestep": (2,)},
    {"text_embeds": (2, 1280), "time_ids": (2, 6)},
)
PIXART = Denoiser(
    "PixArtTransformer2DModel",
    {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "sample_size": 128,
        "interpolation_scale": 2,
        "use_additional_conditions": False,
    },
    {"hidden_states": (2, 4, 128, 128), "encoder_hidden_states": (2, 300, 4096), "timestep": (2,)},
    {},
)
FLUX = Denoiser(
    "FluxTransformer2DModel",
    {},
    {
        "hidden_states": (1, 4096, 64),
        "encoder_hidden_states": (1, 512, 4096),
        "pooled_projections": (1, 768),
        "timestep": (1,),
        "img_ids": (4096, 3),
        "txt_ids": (512, 3),
    },
    {},
)
DENOISERS = {"SDXL": SDXL, "PixArt": PIXART, "FLUX": FLUX}
STEPS = torch.linspace(999, 0, 25).tolist()
"""Time steps that activations have a scale for."""
PLAIN = "bf16"
FORMATS = {PLAIN: None, "W8A8": Format(8, 8), "W4A8": Format(4, 8), "w4": Format(4, None, 64)}


@torch.no_grad()
def prepared(denoiser: Denoiser, form: Format | None, source: Source) -> tuple[nn.Module, dict[str, Any]]:
    """The model, packed in a format unless that is None, and what it is called with; all of it random."""
    with torch.device("meta"):
        model = getattr(import_module("diffusers"), denoiser.kind)(**denoiser.options)
        model = model.to(source.dtype).eval().requires_grad_(False)
        if form is not None:
            pack_(model, form)
    model = model.to_empty(device=source.device)
    fill_(model, source)
    inputs = {name: source.normal(*shape) for name, shape in denoiser.inputs.items()}
    conditions: dict[str, Any] = {name: source.normal(*shape) for name, shape in denoiser.conditions.items()}
    # PixArt asks for these even where it has no use for them.
    conditions = conditions or {"resolution": None, "aspect_ratio": None}
    return model, inputs if denoiser.kind.startswith("Flux") else {**inputs, "added_cond_kwargs": conditions}


def pack_(model: nn.Module, form: Format) -> int:
    """Put packed layers in the place of every Linear and Conv2d that can be packed; returns how many."""
    runtime, pack = import_module("diffpress.export.runtime"), import_module("diffpress.export.edits").Pack
    clock = None if form.activation_bits is None else runtime.StepClock(STEPS)
    if clock is not None:
        runtime.attach_clock_(model, clock)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    packable = [(name, layer) for name, layer in layers if runtime.why_not_packable(layer) is None]
    for name, layer in packable:
        edit = pack(component="denoiser", module=name, **form._asdict())
        model.set_submodule(name, runtime.pack_layer(layer, edit, clock))
    return len(packable)


def fill_(model: nn.Module, source: Source) -> None:
    """Random codes, with scales that keep outputs as large as inputs, and small random parameters."""
    packed = import_module("diffpress.export.runtime").PackedLayer
    for module in model.modules():
        if isinstance(module, packed):
            _fill_packed_(module, source)
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02, generator=source.generator)
            else:
                tensor.zero_()


def _fill_packed_(layer: nn.Module, source: Source) -> None:
    # A byte holds any codes there are; those of 8 bits are int8 already.
    length = layer.weight.shape
    layer.weight.copy_(source.codes(*length).view(layer.weight.dtype))
    layer.weight_scale.fill_(2 / 2**layer.edit.weight_bits / layer.columns**0.5)
    if layer.bias is not None:
        layer.bias.zero_()
    if layer.activation_scale is not None:
        layer.activation_scale.fill_(4 / 2 ** (layer.edit.activation_bits - 1))


def compile_(model: nn.Module, form: Format | None, backend: str = "inductor") -> Iterable[Any]:
    """The blocks that repeat are compiled once: whole models of this size take minutes. Returns what of norms is fused."""
    fusion = import_module("diffpress.export.runtime.fusion")
    if form is not None:
        return fusion.compile_(model, backend, regional=True, dynamic=False)
    fusion.compile_regions_(fusion.regions_of(model).values(), backend, dynamic=False)
    return ()


def median_ms(call: Callable[[], Any]) -> float:
    """Of half a second of calls, after those that compile."""
    call()
    return do_bench(call, warmup=100, rep=500, return_mode="median")


def prepare(name: str, word: str, seed: int) -> tuple[nn.Module, Callable[[], Any]]:
    """The model on the GPU with its clocks, and one call of it."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model, inputs = prepared(DENOISERS[name], FORMATS[word], Source(seed, "cuda", torch.bfloat16))
    return model, partial(model, **inputs, return_dict=False)


def measure_calls(name: str, word: str, seed: int, plain: dict[str, float], rehearse: bool) -> dict[str, Any]:
    """One row: milliseconds as it is called, and as a CUDA graph, with the peak memory of each.

    `speedup` is over 16 bits as a graph, which came first. Rehearsed, it only compiles kernels.
    """
    if find_spec("diffusers") is None:
        return {"skipped": "diffusers is not installed here"}
    model, call = prepare(name, word, seed)
    expected = call()[0]
    if rehearse:
        return {}
    called = {"called_ms": median_ms(call), "peak_bytes": torch.cuda.max_memory_allocated()}
    import_module("diffpress").record_graphs(model)
    differs = ((call()[0] - expected).norm() / expected.norm()).item()
    took = median_ms(call)
    if word == PLAIN:
        plain[name] = took
    found = {**called, "graph_ms": took, "graph_peak_bytes": torch.cuda.max_memory_allocated(), "differs": differs}
    return {**found, "speedup": plain[name] / took} if name in plain else found


def measure_compiled(name: str, word: str, seed: int, rehearse: bool) -> dict[str, Any]:
    """One row: milliseconds with its blocks compiled, and how many packed layers' norms are fused."""
    if find_spec("diffusers") is None:
        return {"skipped": "diffusers is not installed here"}
    model, call = prepare(name, word, seed)
    fusions = compile_(model, FORMATS[word])
    call()
    if rehearse:
        return {}
    compiled = {"compiled_ms": median_ms(call), "fused_layers": sum(fusion.norm is not None for fusion in fusions)}
    import_module("diffpress").record_graphs(model)
    return {**compiled, "compiled_graph_ms": median_ms(call)}


def rows(seed: int, rehearse: bool = False) -> Iterator[Row]:
    """Two formats of every model before the others, what takes minutes to compile last: the time may not suffice for all."""
    plain: dict[str, float] = {}
    words = list(FORMATS)
    for name, word in (*product(DENOISERS, words[:2]), *product(DENOISERS, words[2:])):
        yield Row({"model": name, "form": word}, partial(measure_calls, name, word, seed, plain, rehearse))
    for name, word in product(DENOISERS, words[:2]):
        yield Row({"model": name, "form": f"{word}, compiled"}, partial(measure_compiled, name, word, seed, rehearse))


def passed(row: dict[str, Any]) -> bool:
    """A graph computes what was called: only products in 16 bits may be added in another order."""
    return "error" not in row and row.get("differs", 0) <= torch.finfo(torch.bfloat16).eps


if __name__ == "__main__":
    raise SystemExit(main(__doc__, "denoisers.json", rows, passed, partial(rows, rehearse=True)))
