"""How the tests of artifacts make one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffpress.export.apply import apply_edits_
from diffpress.export.artifact import load_pipeline, write_pipeline
from diffpress.export.edits import Attach, Pack, Resize
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import Manifest, list_files, write_manifest
from diffpress.export.runtime import StepPlan, Unit
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


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn"
KEPT = ((0, 2), (4, 4))
"""Columns of the first, third and fourth of four heads of two."""


@pytest.fixture(scope="session")
def everything(
    tiny_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
    pack_all: Callable[..., Packed],
    pack_weights: Callable[..., Packed],
    save_artifact: Callable[..., Path],
) -> Path:
    """An artifact of four steps with all that an edit may be: heads that are gone, packed layers everywhere, a step plan."""
    pipeline = load_pipeline(PipelineFolder(tiny_text, "text"))
    pipeline.scheduler.set_timesteps(4)
    timesteps = pipeline.scheduler.timesteps.tolist()
    resizes = [edit for name in (f"{ATTENTION}1", f"{ATTENTION}2") for edit in without_a_head(name)]
    apply_edits_(pipeline.unet, resizes, timesteps)
    parts = {
        "unet": pack_all(pipeline.unet, "unet", 8, 8, len(timesteps)),
        "text_encoder": pack_weights(pipeline.text_encoder, "text_encoder", 4),
        "vae": pack_weights(pipeline.vae, "vae", 8),
    }
    tensors = {component: part[1] for component, part in parts.items()}
    units = [Unit(modules=(f"{ATTENTION}{index}",), adds_to=(None,), channels=(8,)) for index in (1, 2)]
    cells = np.array([[True, True], [False, True], [True, False], [False, True]])
    plan = StepPlan.of(units, cells, order=1, corrected=True)
    tensors["unet"] |= {
        "step_plan.damping": torch.full((4, 2, 1), 0.5),
        "step_plan.correction": torch.linspace(0.5, 1.5, 3 * 2 * 16).view(3, 2, 16).half(),
    }
    packs = [edit for part in parts.values() for edit in part[0]]
    edits = [*resizes, *packs, Attach(component="unet", module="step_plan", settings=plan)]
    return save_artifact(tiny_text, tmp_path_factory.mktemp("everything") / "artifact", edits, tensors, timesteps)


def without_a_head(attention: str) -> list[Resize]:
    """The edits of an attention of four heads that lose the second."""
    where = {"component": "unet"}
    return [
        *[Resize(module=f"{attention}.to_{name}", outputs=KEPT, **where) for name in "qkv"],
        Resize(module=f"{attention}.to_out.0", inputs=KEPT, **where),
        Resize(module=attention, attributes={"heads": 3, "inner_dim": 6}, **where),
    ]
