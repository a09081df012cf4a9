"""How the tests of artifacts make one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from torch import Tensor, nn

from diffpress.export.apply import apply_edits_
from diffpress.export.artifact import write_pipeline
from diffpress.export.edits import Pack
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import Manifest, list_files, write_manifest
from diffpress.export.ties import ties

Packed = tuple[list[Pack], dict[str, Tensor]]


@pytest.fixture(scope="session")
def save_artifact() -> Callable[..., Path]:
    """A function: the artifact of a source with these edits, their tensors a component, and the steps they are made for."""

    def save(
        source: Path,
        out: Path,
        edits: Sequence[Pack],
        tensors: Mapping[str, Mapping[str, Tensor]],
        timesteps: list[float],
    ) -> Path:
        out.mkdir()
        write_pipeline(out, PipelineFolder(source, source.name), edits, tensors, timesteps)
        manifest = Manifest(
            fingerprint="",
            versions={},
            recipe={},
            source={},
            timesteps=timesteps,
            edits=list(edits),
            plan=[],
            metrics={},
            files=list_files(out),
        )
        write_manifest(out, manifest)
        return out

    return save


@pytest.fixture(scope="session")
def pack_weights(pack_all: Callable[..., Packed]) -> Callable[..., Packed]:
    """A function: the weights of a model in so many bits, a scale for every eight columns, inputs left as they are.

    It takes the model, its component name and the bits, and gives the edits and their tensors.
    """

    def pack(model: nn.Module, component: str, bits: int) -> Packed:
        edits, tensors = pack_all(model, component, bits, None, 0, 8)
        tied = {name.removesuffix(".weight") for name in ties(model)}
        kept = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in tied}
        return [edit for edit in edits if edit.module not in tied], kept

    return pack


@pytest.fixture(scope="session")
def edited() -> Callable[..., nn.Module]:
    """A function: a model with its edits and their tensors, applied in place without any of the loading code."""

    def edit(model: nn.Module, packed: Packed, timesteps: Sequence[float] = ()) -> nn.Module:
        tensors = model.state_dict() | packed[1]
        apply_edits_(model, packed[0], timesteps)
        model.load_state_dict({name: tensors[name] for name in model.state_dict()}, strict=True)
        return model

    return edit
