"""What people call on a pipeline: on a compressed one each gives the same picture, or is refused in one sentence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor, nn

from diffpress.export.artifact import load, load_pipeline
from diffpress.export.edits import Resize
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.runtime import PackedEmbedding, PackedLayer

CPU, FLOAT8, HALVES = torch.device("cpu"), torch.float8_e4m3fn, torch.bfloat16


def image(pipeline: Any, prompt: str = "red apple", **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pipeline(prompt, num_inference_steps=4, generator=generator, output_type="pt", **options).images


def parts(pipeline: Any) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def sequential(pipeline: Any, buffers: bool) -> None:
    """`enable_sequential_cpu_offload` itself does not work on a CPU, with any pipeline; these are its hooks."""
    for part in parts(pipeline):
        weights = {name: tensor.clone() for name, tensor in part.state_dict().items()}
        add_hook_to_module(part, AlignDevicesHook(CPU, io_same_device=True), append=True)
        attach_align_device_hook(part, CPU, offload=True, weights_map=weights, offload_buffers=buffers)


def grouped(pipeline: Any, kind: str, folder: Path | None = None) -> None:
    pipeline.enable_group_offload(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=kind,
        num_blocks_per_group=1,
        offload_to_disk_path=None if folder is None else str(folder),
    )


def saved(pipeline: Any, folder: Path) -> Any:
    pipeline.save_pretrained(folder)
    return DiffusionPipeline.from_pretrained(folder)


def add_token(pipeline: Any) -> None:
    pipeline.load_textual_inversion({"<new>": torch.ones(1, 16)}, token="<new>")


CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "from_pipe": lambda own, _: StableDiffusionPipeline.from_pipe(own),
    "AutoPipelineForText2Image": lambda own, _: AutoPipelineForText2Image.from_pipe(own),
    "to cpu": lambda own, _: own.to("cpu"),
    "model cpu offload": lambda own, _: own.enable_model_cpu_offload(device="cpu"),
    "sequential cpu offload": lambda own, _: sequential(own, False),
    "sequential cpu offload with buffers": lambda own, _: sequential(own, True),
    "group offload of leaves": lambda own, _: grouped(own, "leaf_level"),
    "group offload of blocks": lambda own, _: grouped(own, "block_level"),
    "group offload of leaves to disk": lambda own, folder: grouped(own, "leaf_level", folder),
    "group offload of blocks to disk": lambda own, folder: grouped(own, "block_level", folder),
    "layerwise casting": lambda own, _: own.unet.enable_layerwise_casting(FLOAT8, torch.float32),
    "textual inversion": lambda own, _: add_token(own),
    "save_pretrained": saved,
    "deepcopy": lambda own, _: copy.deepcopy(own),
    "pickle": lambda own, _: pickle.loads(pickle.dumps(own)),
}
"""What gives the picture that was given before, bit for bit: all layers of the denoiser are packed, so no cast reaches one."""


QUICK = {
    "from_pipe",
    "model cpu offload",
    "sequential cpu offload with buffers",
    "group offload of leaves to disk",
    "pickle",
}
"""Of each kind one that is tried every time."""


@pytest.fixture(scope="module")
def loaded(everything: Path) -> Any:
    return load(everything, prefer="memory")


@pytest.fixture(scope="module")
def expected(loaded: Any) -> Tensor:
    return image(loaded)


@pytest.fixture
def pipeline(loaded: Any) -> Any:
    return copy.deepcopy(loaded)


@pytest.mark.parametrize("call", [own if own in QUICK else pytest.param(own, marks=pytest.mark.long) for own in CALLS])
def test_the_picture_stays(call: str, pipeline: Any, expected: Tensor, tmp_path: Path) -> None:
    assert torch.equal(image(CALLS[call](pipeline, tmp_path) or pipeline), expected)


@pytest.mark.long
@pytest.mark.parametrize("call", CALLS)
def test_the_picture_stays_where_diffusers_alone_loaded_it(
    call: str, everything: Path, expected: Tensor, tmp_path: Path
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(everything)
    assert torch.equal(image(CALLS[call](pipeline, tmp_path) or pipeline), expected)


CASTS: dict[str, Callable[[Any], Any]] = {
    "to": lambda own: own.to(HALVES),
    "from_pipe": lambda own: StableDiffusionPipeline.from_pipe(own, torch_dtype=HALVES),
    "bfloat16": lambda own: [part.to(dtype=HALVES) for part in parts(own)] and None,
    "there and back and there": lambda own: own.to(HALVES).to(torch.float32).to(HALVES),
}


@pytest.mark.parametrize("cast", CASTS)
def test_cast_it_is_what_is_loaded_in_that_dtype(cast: str, pipeline: Any, in_halves: Tensor) -> None:
    assert torch.equal(image(CASTS[cast](pipeline) or pipeline), in_halves)


@pytest.fixture(scope="module")
def in_halves(everything: Path) -> Tensor:
    return image(load(everything, HALVES, "memory"))


@pytest.mark.parametrize("cast", ["half", "float", "double", "meta"])
def test_no_cast_changes_what_is_exact(cast: str, pipeline: Any) -> None:
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    for part in parts(pipeline):
        part.to("meta") if cast == "meta" else getattr(part, cast)()
    dtypes = {"half": torch.float16, "float": torch.float32, "double": torch.double}
    packed = {name for name, layer in pipeline.unet.named_modules() if isinstance(layer, PackedLayer)} | {"step_plan"}
    for name, after in pipeline.unet.state_dict().items():
        path, _dot, last = name.rpartition(".")
        if path in packed and last != "bias":
            assert after.dtype == before[name].dtype, name
            assert after.is_meta or torch.equal(after, before[name]), name
        elif cast != "meta":
            assert after.dtype == dtypes[cast], name


def test_image_to_image_runs_on_the_same_parts(pipeline: Any) -> None:
    other = AutoPipelineForImage2Image.from_pipe(pipeline)
    assert other.unet is pipeline.unet
    assert image(other, image=torch.rand(1, 3, 16, 16), strength=0.5).isfinite().all()


def test_projections_of_packed_attention_are_not_fused(pipeline: Any, expected: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match=r"scales of its own\. Call diffpress\.compile"):
        pipeline.fuse_qkv_projections()
    assert torch.equal(image(pipeline), expected)


def test_a_new_token_is_read(pipeline: Any, expected: Tensor, tmp_path: Path) -> None:
    assert isinstance(pipeline.text_encoder.embeddings.token_embedding, PackedEmbedding)
    add_token(pipeline)
    drawn = image(pipeline, "red <new>")
    assert not torch.equal(drawn, expected)
    assert torch.equal(image(saved(pipeline, tmp_path), "red <new>"), drawn)


def test_weights_are_counted_as_those_they_stand_for(loaded: Any, tiny_text: Path) -> None:
    source = load_pipeline(PipelineFolder(tiny_text, "text"))
    edits = [edit for edit in loaded.unet.config.quantization_config.edits if isinstance(edit, Resize)]
    # Rows and columns of two of eight, of weights without a bias on that side.
    gone = sum(prod(source.unet.get_submodule(edit.module).weight.shape) // 4 for edit in edits if not edit.attributes)
    assert loaded.unet.num_parameters() == source.unet.num_parameters() - gone
    for name, options in (("vae", {}), ("text_encoder", {}), ("text_encoder", {"exclude_embeddings": True})):
        own, original = getattr(loaded, name), getattr(source, name)
        if not options:
            assert own.num_parameters() == original.num_parameters()
        assert own.num_parameters(**options) <= own.num_parameters()


def image_prompt(unet: Any) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter of the first Stable Diffusion, for embeddings of 16 numbers."""
    generator = torch.Generator().manual_seed(3)
    sizes = {"down": 8, "mid": 16, "up": 8}
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    adapter = {
        f"{2 * index + 1}.to_{kind}_ip.weight": torch.randn(sizes[name.split("_")[0]], 16, generator=generator)
        for index, name in enumerate(names)
        for kind in "kv"
    }
    projection = {
        "proj.weight": torch.randn(4 * 16, 16, generator=generator),
        "proj.bias": torch.zeros(4 * 16),
        "norm.weight": torch.ones(16),
        "norm.bias": torch.zeros(16),
    }
    return {"image_proj": projection, "ip_adapter": adapter}


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_image_prompts_are_heard_by_the_heads_that_are_left(scale: float, pipeline: Any, expected: Tensor) -> None:
    adapter = image_prompt(pipeline.unet)
    pipeline.load_ip_adapter(adapter, subfolder=None, weight_name=None, image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(scale)
    found = image(pipeline, ip_adapter_image_embeds=[torch.ones(2, 1, 16)])
    assert torch.equal(found, expected) == (scale == 0)
    processor = pipeline.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2").processor
    assert isinstance(processor, IPAdapterAttnProcessor2_0)
    whole = adapter["ip_adapter"]["1.to_k_ip.weight"]
    assert torch.equal(processor.to_k_ip[0].weight, torch.cat([whole[:2], whole[4:]]))
