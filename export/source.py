"""The tensors of a pipeline's component under the names that they have in its model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import ModelFileError
from .folder import PipelineFolder
from .load.libraries import empty_model, library_of

ADAPTER = re.compile(r"(^|\.)(base_layer|lora_[AB]|lora_(up|down)|lora_embedding_[AB])(\.|$)")
"""What peft and diffusers call the parts of a layer that an adapter is still hung upon."""


class Form(NamedTuple):
    """How a tensor is stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def forms_of(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
    """How each of them is stored."""
    return {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def source_tensors(folder: PipelineFolder, component: str) -> dict[str, Tensor]:
    """All tensors that the model of `component` holds, in the dtypes they are stored in; read as they are asked for.

    Files may name them as older models did. What the model has no place for is left out, as when it is loaded. Raises
    ModelFileError where one is absent or of another shape, or where a LoRA is not merged, and UnsupportedModelError where
    the component is no model of a library we know.
    """
    library, model = library_of(folder, component), empty_model(folder, component)
    stored = dict(folder.tensors(component))
    _refuse_adapters(folder, component, stored)
    tensors, held = library.renamed(model, stored), library.held(model)
    where = f"{folder.name}: {component}"
    for name, expected in held.items():
        if name not in tensors:
            if _may_be_absent(model, name):
                continue
            raise ModelFileError(f"{where} has no {name}, which its model needs. Copy or download it again.")
        if tensors[name].shape != expected.shape:
            raise ModelFileError(
                f"{where} holds {name} as {list(tensors[name].shape)}, but by its config.json it is "
                f"{list(expected.shape)}. Put back the file that belongs to the other."
            )
    return {name: tensors[name] for name in sorted(held.keys() & tensors.keys())}


def _refuse_adapters(folder: PipelineFolder, component: str, stored: Mapping[str, Tensor]) -> None:
    for name in stored:
        if ADAPTER.search(name):
            raise ModelFileError(
                f"{folder.name}: {component} has a LoRA that is not merged ({name}). Merge it with `fuse_lora()` and "
                "`unload_lora_weights()`, save the pipeline, and give that folder."
            )


def _may_be_absent(model: nn.Module, name: str) -> bool:
    """Whether the model itself says that files may lack it."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)
