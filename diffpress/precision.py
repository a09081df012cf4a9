"""Which precision a pipeline is loaded in: the one place that decides."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import psutil
import torch
from safetensors import safe_open

from diffpress.compress.options import Qalora
from diffpress.export.folder import PipelineFolder

from .recipe import Recipe

STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""What a file calls the floats that a model may be loaded in."""
PARTS_OF_MEMORY = 3
"""Weights in float32 may take one of them; the rest is for what is computed and recorded with them, and for other programs."""


def working_dtype(folder: PipelineFolder, device: str = "cpu") -> torch.dtype:
    """As stored where the device computes well in that; on a CPU float32 where the weights fit into a third of its memory.

    A CPU is slow in half precision, where it has it at all. What most of the weights are stored in holds for the whole
    pipeline, whose parts must fit together. What else is running has no say: images would be others when it ends.
    """
    sizes = _numbers(folder)
    stored = max(sizes, key=lambda dtype: sizes[dtype] * dtype.itemsize, default=torch.float32)
    if stored not in (torch.float16, torch.bfloat16):
        return torch.float32
    if torch.device(device).type == "cpu":
        needed = sizes.total() * torch.float32.itemsize
        return torch.float32 if PARTS_OF_MEMORY * needed <= psutil.virtual_memory().total else stored
    if stored is torch.bfloat16 and torch.device(device).type == "cuda" and not torch.cuda.is_bf16_supported(False):
        return torch.float32
    return stored


def recipe_dtype(folder: PipelineFolder, recipe: Recipe, device: str = "cpu") -> torch.dtype:
    """The same for a `compress`: what learns needs gradients, which vanish in float16 (its smallest number is 6e-8)."""
    dtype = working_dtype(folder, device)
    return torch.float32 if dtype is torch.float16 and isinstance(recipe.quantize, Qalora) else dtype


def settle_dtype(folder: Path, dtype: torch.dtype) -> torch.dtype:
    """The precision that work in `folder` began in, else `dtype`: it may go on on another machine."""
    path = folder / "dtype"
    if not path.is_file():
        path.write_text(str(dtype).removeprefix("torch."), encoding="utf-8")
    settled: torch.dtype = getattr(torch, path.read_text(encoding="utf-8"))
    return settled


def _numbers(folder: PipelineFolder) -> Counter[torch.dtype]:
    """How many floats of the pipeline are stored in each precision; only the headers of its files are read."""
    counts: Counter[torch.dtype] = Counter()
    for component in folder.components:
        for file in folder.weight_files(component):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    if part.get_dtype() in STORED:
                        counts[STORED[part.get_dtype()]] += torch.Size(part.get_shape()).numel()
    return counts
