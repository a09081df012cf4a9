"""LoRA on a compressed pipeline: it acts, on what is left of the layers, and comes off without a trace."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("peft")

from diffpress.export.artifact import load, load_pipeline
from diffpress.export.edits import Factorize, Pack
from diffpress.export.errors import ModelFileError, UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.load.calls import answer_calls_
from diffpress.export.load.config import EditsConfig
from diffpress.export.runtime import PackedLayer, layers_of
from diffpress.export.runtime.merging import packed_anew
from diffpress.kernels import dequantize_groups, pack_codes, quantize, unpack_codes

RANK, ALPHA = 2, 1.0
LAYERS = ("attn2.to_q", "attn2.to_k", "attn1.to_out.0", "ff.net.0.proj", "resnets.0.conv1", "proj_in")
TEXT_LAYERS = ("q_proj", "out_proj", "fc1")
KEPT = [0, 1, 4, 5, 6, 7]
"""Rows or columns of attention that the artifact has left."""


def image(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pipeline("red apple", num_inference_steps=4, generator=generator, output_type="pt").images


@pytest.fixture(scope="module")
def source(tiny_text: Path) -> Any:
    return load_pipeline(PipelineFolder(tiny_text, "text"))


def drawn(source: Any, seed: int = 0, size: float = 0.2) -> dict[str, Tensor]:
    """A LoRA for denoiser and text encoder of the original, in peft's form."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for part, names in (("unet", LAYERS), ("text_encoder", TEXT_LAYERS)):
        for name, layer in getattr(source, part).named_modules():
            if name.endswith(names):
                down = (RANK, *layer.weight.shape[1:])
                up = (len(layer.weight), RANK, *[1] * (layer.weight.ndim - 2))
                found[f"{part}.{name}.lora_A.weight"] = size * torch.randn(down, generator=generator)
                found[f"{part}.{name}.lora_B.weight"] = size * torch.randn(up, generator=generator)
    return found


@pytest.fixture(scope="module")
def adapter(source: Any) -> dict[str, Tensor]:
    return drawn(source)


@pytest.fixture(scope="module")
def loaded(everything: Path) -> Any:
    return load(everything, prefer="memory")


@pytest.fixture
def pipeline(loaded: Any) -> Any:
    return copy.deepcopy(loaded)


@pytest.fixture(scope="module")
def expected(loaded: Any, adapter: dict[str, Tensor]) -> Tensor:
    """The picture of the artifact with the adapter beside its layers, without peft."""
    pipeline = copy.deepcopy(loaded)
    for name, down in adapter.items():
        if "lora_A" in name:
            part, _dot, path = name.removesuffix(".lora_A.weight").partition(".")
            up = adapter[name.replace("lora_A", "lora_B")]
            if path.startswith("down_blocks.0") and ".attn" in path:
                up = up if path.endswith("to_out.0") else up[KEPT]
                down = down[:, KEPT] if path.endswith("to_out.0") else down
            layer = getattr(pipeline, part).get_submodule(path)
            layer.register_forward_hook(partial(beside, down, up))
    return image(pipeline)


def beside(down: Tensor, up: Tensor, layer: Any, given: tuple[Tensor], output: Tensor) -> Tensor:
    if down.ndim == 2:
        return output + F.linear(F.linear(given[0], down), up)
    return output + F.conv2d(F.conv2d(given[0], down, None, layer.stride, layer.padding), up)


def in_peft(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(adapter)


def in_diffusers(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"lora_A": "lora.down", "lora_B": "lora.up"}
    renamed = {name: re.sub("lora_[AB]", lambda found: names[found[0]], name) for name in adapter}
    text = {name: new.replace(".lora.", ".lora_linear_layer.") for name, new in renamed.items() if "text" in name}
    return {(renamed | text)[name]: own for name, own in adapter.items()}


def in_kohya(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in adapter.items():
        part, _dot, path = re.sub(r"\.lora_.*", "", name).partition(".")
        short = "unet" if part == "unet" else "te"
        path = path if part == "unet" else f"text_model.{path}"
        key = f"lora_{short}_{path.replace('.', '_')}"
        found[f"{key}.lora_{'down' if 'lora_A' in name else 'up'}.weight"] = tensor
        found[f"{key}.alpha"] = torch.tensor(float(RANK))
    return found


FORMS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "peft": in_peft,
    "diffusers": in_diffusers,
    "kohya": in_kohya,
}


@pytest.mark.parametrize("form", FORMS)
def test_it_adds_its_branch_to_what_is_left_of_every_layer(
    form: str, pipeline: Any, adapter: dict[str, Tensor], expected: Tensor, tmp_path: Path
) -> None:
    save_file(FORMS[form](adapter), tmp_path / "lora.safetensors")
    before = image(pipeline)
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    assert torch.equal(image(pipeline), expected)
    assert not torch.equal(expected, before)
    pipeline.unload_lora_weights()
    assert torch.equal(image(pipeline), before)


def test_several_have_weights(pipeline: Any, adapter: dict[str, Tensor], expected: Tensor, source: Any) -> None:
    before = image(pipeline)
    pipeline.load_lora_weights(dict(adapter), adapter_name="one")
    pipeline.load_lora_weights(drawn(source, seed=1), adapter_name="two")
    pipeline.set_adapters(["one", "two"], [1.0, 0.0])
    assert torch.equal(image(pipeline), expected)
    layer, x = pipeline.unet.get_submodule(layer_of(adapter)), torch.randn(3, 8)
    answers = []
    for weights in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 2.0]):
        pipeline.set_adapters(["one", "two"], weights)
        answers.append(layer(x))
    none, one, two, both = answers
    # Sums of float32 of a few terms that are around one.
    assert torch.allclose(both, none + 0.5 * (one - none) + 2 * (two - none), atol=2**-18)
    pipeline.disable_lora()
    assert torch.equal(image(pipeline), before)


def layer_of(adapter: dict[str, Tensor]) -> str:
    return next(name for name in adapter if "attn2.to_q.lora_A" in name).removeprefix("unet.").split(".lora_A")[0]


def test_merged_it_is_rounded_and_unmerged_bit_for_bit(
    pipeline: Any, adapter: dict[str, Tensor], expected: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="diffpress")
    pipeline.load_lora_weights(dict(adapter), adapter_name="one")
    stored = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    path = layer_of(adapter)
    packed = pipeline.unet.get_submodule(path).base_layer
    before = packed._float_weight()
    pipeline.fuse_lora()
    assert "packed layers of UNet2DConditionModel; rounding changes" in caplog.text
    assert f"unet.{path}: one merged into W8A8; rounding changes it by" in caplog.text
    added = adapter[f"unet.{path}.lora_B.weight"][KEPT] @ adapter[f"unet.{path}.lora_A.weight"]
    # Rounding takes half a step at most, 127 to a row's largest weight; clipping is chosen only where it errs less.
    step = (before + added).abs().amax(1, keepdim=True) / 127
    error = packed._float_weight() - before - added
    assert error.square().sum() <= (step / 2).square().expand_as(error).sum()
    merged = image(pipeline)
    assert not torch.equal(merged, expected)
    again = copy.deepcopy(pipeline)
    again.unload_lora_weights()
    again.save_pretrained(tmp_path)
    assert torch.equal(image(DiffusionPipeline.from_pretrained(tmp_path)), merged)
    pipeline.unfuse_lora()
    assert all(torch.equal(own, stored[name]) for name, own in pipeline.unet.state_dict().items())
    assert torch.equal(image(pipeline), expected)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("group_size", [None, 8])
def test_nothing_added_changes_nothing_and_rounding_errs_no_more_than_it_must(
    bits: int, group_size: int | None
) -> None:
    form = {"activation_bits": 8} if group_size is None else {"activation_bits": None, "group_size": group_size}
    edit = Pack.model_validate({"component": "", "module": "", "weight_bits": bits, **form})
    size, high = group_size or 20, 2 ** (bits - 1) - 1
    values = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    scale = torch.stack([group.abs().amax(1) / high for group in values.split(size, 1)], 1)
    wide = scale.repeat_interleave(size, 1)[:, :20]
    codes = quantize(values, wide, bits)
    known = dequantize_groups(codes, scale, size)
    held = scale[:, 0] if group_size is None else scale
    weight, found = packed_anew(known, edit, held)
    assert torch.equal(weight, pack_codes(codes, bits))
    assert torch.equal(found, held)
    weight, found = packed_anew(values, edit, 2 * held)
    error = dequantize_groups(unpack_codes(weight, 20, bits), found.view(6, -1), size) - values
    # Rows may be clipped only where that errs less than rounding by the largest magnitude.
    assert error.square().sum() <= (known - values).square().sum() * (1 + 1e-6)


def test_what_fits_nothing_is_named_and_nothing_is_loaded(pipeline: Any, adapter: dict[str, Tensor]) -> None:
    before = image(pipeline)
    strange = {"unet.no.such.lora_A.weight": torch.ones(2, 8), "unet.no.such.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(ModelFileError, match=r"2 of its \d+ tensors fit no layer.*unet\.no\.such\.lora_A\.weight"):
        pipeline.load_lora_weights(adapter | strange)
    strange = {name.replace("unet.", "another."): own for name, own in strange.items()}
    with pytest.raises(ModelFileError, match=r"another\.no\.such"):
        pipeline.load_lora_weights(adapter | strange)
    strange = {f"text_encoder.encoder.layers.0.mlp.fc2.lora.{side}.weight": torch.ones(2, 2) for side in ("up", "down")}
    with pytest.raises(ModelFileError, match=r"2 tensors of the LoRA have names that CLIPTextModel does not read"):
        pipeline.load_lora_weights(adapter | strange)
    pipeline.unload_lora_weights()
    nothing = {name: torch.zeros_like(own) if "lora_B" in name else own for name, own in adapter.items()}
    with pytest.raises(ModelFileError, match=r"changes the answer of none of its \d+ layers"):
        pipeline.load_lora_weights(nothing)
    assert torch.equal(image(pipeline), before)


def test_copies_and_casts_keep_it(pipeline: Any, adapter: dict[str, Tensor], expected: Tensor) -> None:
    pipeline.load_lora_weights(dict(adapter))
    for own in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        assert torch.equal(image(own), expected)
    pipeline.to(torch.bfloat16)
    assert all(layer.weight_scale.dtype == torch.float32 for _, layer in layers_of(pipeline))
    assert image(pipeline).isfinite().all()


def test_what_needs_weights_of_floats_is_refused(pipeline: Any, adapter: dict[str, Tensor]) -> None:
    path = layer_of(adapter)
    own = {name: tensor for name, tensor in adapter.items() if path in name}
    with pytest.raises(UnsupportedModelError, match=r"as DoRA does.*original pipeline"):
        pipeline.load_lora_weights(own | {f"unet.{path}.lora_magnitude_vector": torch.ones(8)})


@pytest.mark.long
def test_expanded_layers_and_compiled_pipelines_take_it(
    everything: Path, adapter: dict[str, Tensor], floats_win: None
) -> None:
    pipeline = load(everything, prefer="memory")
    for _, layer in layers_of(pipeline):
        if hasattr(layer, "in_features") or hasattr(layer, "in_channels"):
            layer.expand_(torch.float32)
    before = image(pipeline)
    pipeline.load_lora_weights(dict(adapter))
    live = image(pipeline)
    assert not torch.equal(live, before)
    pipeline.fuse_lora()
    merged = image(pipeline)
    assert (merged - live).abs().mean() < (live - before).abs().mean()
    pipeline.unfuse_lora()
    assert torch.equal(image(pipeline), live)
    pipeline.unet.get_submodule(layer_of(adapter).removesuffix(".attn2.to_q")).compile(backend="eager")
    assert torch.equal(image(pipeline), live)


def test_a_layer_of_low_rank_takes_it_and_keeps_it_beside(source: Any) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    model = copy.deepcopy(source.unet)
    edit = Factorize(component="unet", module=path, rank=2)
    edit.apply_(model, None)
    nn.init.normal_(model.get_submodule(path).down.weight)
    model.register_to_config(quantization_config=EditsConfig.of([edit], []))
    answer_calls_(model)
    layer, x = model.get_submodule(path), torch.randn(3, 32)
    before, down, up = layer(x), torch.randn(2, 32), torch.randn(8, 2)
    model.load_lora_adapter({f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}, prefix=None)
    assert torch.equal(model.get_submodule(path)(x), before + F.linear(F.linear(x, down), up))
    with pytest.raises(UnsupportedModelError, match="acts without `fuse_lora`"):
        model.fuse_lora()


def test_other_models_are_adapted_as_ever(source: Any, adapter: dict[str, Tensor]) -> None:
    pipeline = copy.deepcopy(source)
    pipeline.load_lora_weights(dict(adapter))
    layer = pipeline.unet.get_submodule(layer_of(adapter))
    assert type(layer).__module__.startswith("peft.")
    assert not any(isinstance(module, PackedLayer) for module in pipeline.unet.modules())
