"""What people call on a compressed pipeline, each with the PSNR of its picture against the untouched artifact's.

`python bench/deployment.py ARTIFACT --prompt TEXT --json`, of an artifact whose denoiser is a UNet with a text encoder.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor, nn

import diffpress
from diffpress.export.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine

CPU, HALVES = torch.device("cpu"), torch.bfloat16
SAME = "the same"
"""What is said of pictures without any difference."""
SIZE, RANK = 0.05, 4
"""Of the LoRA, which is drawn at random."""

Call = Callable[[Any], Any]


def parts(pipeline: Any) -> list[Any]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def halve(pipeline: Any) -> None:
    for part in parts(pipeline):
        part.half()


def sequential(pipeline: Any) -> None:
    """The hooks of `enable_sequential_cpu_offload`, which itself does not work on a CPU, with any pipeline."""
    for part in parts(pipeline):
        weights = {name: tensor.clone() for name, tensor in part.state_dict().items()}
        add_hook_to_module(part, AlignDevicesHook(CPU, io_same_device=True), append=True)
        attach_align_device_hook(part, CPU, offload=True, weights_map=weights)


def grouped(pipeline: Any, kind: str, disk: bool = False) -> None:
    pipeline.enable_group_offload(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=kind,
        num_blocks_per_group=1,
        offload_to_disk_path=mkdtemp() if disk else None,
    )


def saved(pipeline: Any) -> Any:
    folder = mkdtemp()
    pipeline.save_pretrained(folder)
    return DiffusionPipeline.from_pretrained(folder)


def with_token(pipeline: Any) -> None:
    width = pipeline.text_encoder.config.hidden_size
    pipeline.load_textual_inversion({"<new>": torch.ones(1, width)}, token="<new>")


def silent_image_prompt(pipeline: Any) -> Any:
    """Loaded, and heard with a scale of zero."""
    unet, width = pipeline.unet, pipeline.unet.config.cross_attention_dim
    blocks = unet.config.block_out_channels
    sizes = {"down": blocks, "up": blocks[::-1], "mid": blocks[-1:]}
    adapter = {}
    for index, name in enumerate(name for name in unet.attn_processors if name.endswith("attn2.processor")):
        kind, place = name.split("_")[0], name.split(".")[1]
        rows = sizes[kind][int(place) if place.isdigit() and kind != "mid" else 0]
        adapter |= {f"{2 * index + 1}.to_{own}_ip.weight": torch.ones(rows, width) for own in "kv"}
    projection = {"proj.weight": torch.ones(4 * width, 16), "proj.bias": torch.zeros(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    weights = {"image_proj": projection, "ip_adapter": adapter}
    pipeline.load_ip_adapter(weights, subfolder=None, weight_name=None, image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(0.0)
    return lambda prompt, **options: pipeline(prompt, ip_adapter_image_embeds=[torch.ones(2, 1, 16)], **options)


CALLS: dict[str, Call] = {
    "`from_pipe`": StableDiffusionPipeline.from_pipe,
    "`AutoPipelineForText2Image.from_pipe`": AutoPipelineForText2Image.from_pipe,
    "`to(torch.bfloat16)`": lambda own: own.to(HALVES),
    "`half()` on every part": halve,
    "`to(bfloat16)` and back to `float32`": lambda own: own.to(HALVES).to(torch.float32),
    "`enable_model_cpu_offload`": lambda own: own.enable_model_cpu_offload(device="cpu"),
    "`enable_sequential_cpu_offload`": sequential,
    "`enable_group_offload`, blocks": lambda own: grouped(own, "block_level"),
    "`enable_group_offload`, leaves": lambda own: grouped(own, "leaf_level"),
    "`enable_group_offload`, blocks to disk": lambda own: grouped(own, "block_level", True),
    "`enable_group_offload`, leaves to disk": lambda own: grouped(own, "leaf_level", True),
    "`unet.enable_layerwise_casting`, float8": lambda own: own.unet.enable_layerwise_casting(
        torch.float8_e4m3fn, torch.float32
    ),
    "`fuse_qkv_projections`": lambda own: own.fuse_qkv_projections(),
    "`load_textual_inversion`": with_token,
    "`load_ip_adapter`, at scale 0": silent_image_prompt,
    "`save_pretrained`, loaded again": saved,
    "`copy.deepcopy`": copy.deepcopy,
    "`pickle`": lambda own: pickle.loads(pickle.dumps(own)),
}


def drawn_lora(pipeline: Any) -> dict[str, Tensor]:
    """For the attention of the original."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, layer in pipeline.unet.named_modules():
        if isinstance(layer, nn.Linear) and ".to_" in name:
            found[f"unet.{name}.lora_A.weight"] = SIZE * torch.randn(RANK, layer.in_features, generator=generator)
            found[f"unet.{name}.lora_B.weight"] = SIZE * torch.randn(layer.out_features, RANK, generator=generator)
    return found


def lora_rows(
    pipeline: Any, adapter: dict[str, Tensor], before: Tensor, draw: Callable[[Any], Tensor]
) -> dict[str, str]:
    """Against the untouched artifact, and once the LoRA acts against the live one."""
    pipeline.load_lora_weights(dict(adapter), adapter_name="one")
    live = draw(pipeline)
    rows = {"`load_lora_weights`": f"{words(live, before)} (it acts)"}
    pipeline.fuse_lora()
    rows["`fuse_lora`, against the live LoRA"] = words(draw(pipeline), live)
    pipeline.unfuse_lora()
    rows["`unfuse_lora`, against the live LoRA"] = words(draw(pipeline), live)
    pipeline.unload_lora_weights()
    rows["`unload_lora_weights`"] = words(draw(pipeline), before)
    return rows


def words(found: Tensor, known: Tensor) -> str:
    """PSNR of pictures in 0..1."""
    error = float((found.float() - known.float()).square().mean())
    return SAME if error == 0 else f"{-10 * math.log10(error):.1f} dB"


def answered(call: Call, pipeline: Any, before: Tensor, draw: Callable[[Any], Tensor]) -> str:
    """The PSNR, or the sentence that it is refused by."""
    try:
        return words(draw(call(pipeline) or pipeline), before)
    except UserError as error:
        return f"refused: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--prompt", default="slice of pizza")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    manifest = json.loads((arguments.artifact / "diffpress.json").read_text(encoding="utf-8"))
    sampling = manifest["recipe"]["sampling"]

    def draw(pipeline: Any) -> Tensor:
        getattr(pipeline, "set_progress_bar_config", lambda **_: None)(disable=True)
        options = {"num_inference_steps": sampling["steps"], "guidance_scale": sampling.get("guidance_scale") or 7.5}
        return pipeline(
            arguments.prompt, generator=torch.Generator().manual_seed(0), output_type="pt", **options
        ).images.float()

    rows: dict[str, dict[str, str]] = {}
    for column, load in LOADS.items():
        before = draw(load(arguments.artifact))
        for name, call in CALLS.items():
            rows.setdefault(name, {})[column] = answered(call, load(arguments.artifact), before, draw)
        source = DiffusionPipeline.from_pretrained(diffpress_source(manifest))
        for name, own in lora_rows(load(arguments.artifact), drawn_lora(source), before, draw).items():
            rows.setdefault(name, {})[column] = own
    result = {"machine": machine(), "artifact": described(manifest), "rows": rows}
    if arguments.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        print(table(result))


LOADS: dict[str, Callable[[Path], Any]] = {
    "diffpress.load": diffpress.load,
    "prefer=memory": lambda path: diffpress.load(path, prefer="memory"),
    "from_pretrained": DiffusionPipeline.from_pretrained,
}
"""How an artifact is loaded."""


def diffpress_source(manifest: dict[str, Any]) -> Path:
    """The folder that the artifact was made of."""
    from diffpress.models import resolve

    return resolve(manifest["source"]["model"]).path


def described(manifest: dict[str, Any]) -> str:
    """What it was made of, and how."""
    recipe = manifest["recipe"]
    stages = [f"{name}: {recipe[name]['method']}" for name in ("prune", "quantize", "steps") if recipe.get(name)]
    return f"{manifest['source']['model']}, {', '.join(stages)}"


def table(result: dict[str, Any]) -> str:
    """In Markdown."""
    lines = [f"| {' | '.join(['call', *(f'`{name}`' for name in LOADS)])} |", f"|{'---|' * (1 + len(LOADS))}"]
    lines += [f"| {name} | {' | '.join(own[column] for column in LOADS)} |" for name, own in result["rows"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
