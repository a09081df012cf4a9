"""Modulation collapse, over families: what it finds, that it errs by no more than it says, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from torch import Tensor, nn

from diffpress.calibration.sampling import denoiser_of
from diffpress.compress.changes import Changes, worn
from diffpress.compress.options import Modulation
from diffpress.compress.plan import plan_rows
from diffpress.compress.prune.modulation.method import check, run
from diffpress.compress.prune.modulation.times import times_of
from diffpress.compress.stage import Subject
from diffpress.compress.stage_folder import StageFolder
from diffpress.export.artifact import write_pipeline
from diffpress.export.edits import Factorize
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.folder import PipelineFolder

TOLERANCE = 1e-6
MODULATIONS = {
    "PixArt-Sigma": ["adaln_single.linear"],
    "Qwen-Image": [
        *(f"transformer_blocks.{block}.{part}_mod.1" for block in (0, 1) for part in ("img", "txt")),
        "norm_out.linear",
    ],
    "Lumina 2": ["noise_refiner.0.norm1.linear", "layers.0.norm1.linear", "norm_out.linear_1"],
}
"""What must be found of each family; its time embedder may be found as well."""
FULL = {"PixArt-Sigma": 1000.0, "Qwen-Image": 1.0, "Lumina 2": 1.0}
"""The last time step that each denoiser is told; the other end is 0."""
every_family = pytest.mark.parametrize("name", MODULATIONS)


def options(**other: Any) -> Modulation:
    return Modulation(method="modulation", **other)


@pytest.fixture(scope="module")
def collapsed(
    family: Callable[[str], Path], subject_of: Callable[[Path], Subject], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Subject, Changes]]:
    """A function: the subject of that family, and what became of it."""
    made: dict[str, tuple[Subject, Changes]] = {}

    def get(name: str) -> tuple[Subject, Changes]:
        if name not in made:
            subject = subject_of(family(name))
            folder = StageFolder(tmp_path_factory.mktemp("stage"))
            made[name] = subject, run(subject, options(), folder, lambda *_: None)
        return made[name]

    return get


@torch.no_grad()
def embedded(model: nn.Module, name: str, time: float) -> Tensor:
    """What the modulations of a family are fed, by its own modules and not by what the method remembers of them."""
    now, sample = torch.full((1,), time), torch.zeros(1, 1)
    if name == "PixArt-Sigma":
        emb = model.adaln_single.emb(now, resolution=None, aspect_ratio=None, batch_size=1, hidden_dtype=torch.float32)
    elif name == "Qwen-Image":
        emb = model.time_text_embed(now, sample)
    else:
        emb = model.time_caption_embed(sample, now, torch.zeros(1, 1, 16))[0]
    return F.silu(emb)


@every_family
def test_it_errs_by_no_more_than_the_tolerance(name: str, collapsed: Callable[[str], tuple[Subject, Changes]]) -> None:
    """At every training step, and at a third and a half of the way to the next, the embedder being changed too."""
    subject, changes = collapsed(name)
    assert set(MODULATIONS[name]) <= {edit.module for edit in changes.edits}
    model = subject.model.requires_grad_(False)
    times = [FULL[name] * (step + part) / 1000 for step in range(0, 1000, 7) for part in (0, 1 / 3, 1 / 2)]
    inputs = torch.cat([embedded(model, name, time) for time in [*times, FULL[name]]])
    with worn(model, changes, []):
        fed = torch.cat([embedded(model, name, time) for time in [*times, FULL[name]]])
        found = {module: model.get_submodule(module)(fed) for module in MODULATIONS[name]}
    for module, answers in found.items():
        layer = model.get_submodule(module)
        expected = F.linear(inputs.double(), layer.weight.double(), layer.bias.double())
        errors = (answers.double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert float(errors.max()) <= TOLERANCE


@every_family
def test_the_artifact_loads_anywhere_and_answers_as_what_was_worn(
    name: str, collapsed: Callable[[str], tuple[Subject, Changes]], family: Callable[[str], Path], tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    subject, changes = collapsed(name)
    source = PipelineFolder(family(name), name)
    write_pipeline(tmp_path / "out", source, changes.edits, {subject.component: changes.tensors}, [])
    rows = plan_rows(subject.component, subject.forms, changes)
    loaded = PipelineFolder(tmp_path / "out", "out")
    assert sum(row.bytes for row in rows) == loaded.component_bytes(subject.component)
    assert all(row.bytes < row.source_bytes for row in rows if row.format.startswith("rank"))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"prompt": "red apple", "num_inference_steps": 2, "output_type": "latent"}

    def latents(own: Any) -> Tensor:
        return own(**arguments, generator=torch.Generator().manual_seed(0)).images

    before, after = latents(subject.pipeline), latents(pipeline)
    with worn(subject.model, changes, []):
        assert torch.equal(latents(subject.pipeline), after)
    assert not torch.equal(before, after)
    # A relative error of TOLERANCE in every modulation, of two steps of two layers or so.
    torch.testing.assert_close(after, before, rtol=0, atol=100 * TOLERANCE * float(before.abs().max()))


def test_in_half_precision_the_factors_stay_exact_and_the_pipeline_half(
    collapsed: Callable[[str], tuple[Subject, Changes]], family: Callable[[str], Path], tmp_path: Path
) -> None:
    """Though the first tensors of the model are float32 now."""
    from diffusers import DiffusionPipeline

    subject, changes = collapsed("Qwen-Image")
    source = PipelineFolder(family("Qwen-Image"), "Qwen-Image")
    write_pipeline(tmp_path / "out", source, changes.edits, {subject.component: changes.tensors}, [])
    model = denoiser_of(DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.bfloat16))
    assert model.dtype == torch.bfloat16
    (layer,) = {edit.module for edit in changes.edits} & {"transformer_blocks.0.img_mod.1"}
    held = model.get_submodule(layer).state_dict()
    assert all(torch.equal(tensor, changes.tensors[f"{layer}.{name}"]) for name, tensor in held.items())
    assert model.get_submodule(layer)(torch.zeros(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_is_stored_is_as_narrow_as_the_tolerance_allows(
    collapsed: Callable[[str], tuple[Subject, Changes]], tmp_path: Path
) -> None:
    subject, exact = collapsed("Lumina 2")
    changes = run(subject, options(tolerance=1e-2), StageFolder(tmp_path), lambda *_: None)
    assert {tensor.dtype for tensor in changes.tensors.values()} == {torch.float16}
    assert {tensor.dtype for tensor in exact.tensors.values()} == {torch.float32}


@pytest.mark.long
def test_a_rank_that_was_asked_for_is_taken_where_it_keeps_the_tolerance(
    family: Callable[[str], Path], subject_of: Callable[[Path], Subject], tmp_path: Path
) -> None:
    subject = subject_of(family("Lumina 2"))
    changes = run(subject, options(rank=7), StageFolder(tmp_path), lambda *_: None)
    assert changes.edits
    assert {edit.rank for edit in changes.edits if isinstance(edit, Factorize)} == {7}
    with pytest.raises(UnsupportedModelError, match=r"errs by [\d.e-]+ at rank 1, and \d others like it"):
        check(subject, options(rank=1))


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        pytest.param("PixArt-Alpha", "aspect ratio and resolution", marks=pytest.mark.long),
        ("SD3", "pooled text"),
        ("FLUX.1", "guidance and pooled text"),
    ],
)
def test_what_is_mixed_in_is_named(
    name: str, reads: str, family: Callable[[str], Path], subject_of: Callable[[Path], Subject]
) -> None:
    subject = subject_of(family(name))
    with pytest.raises(UnsupportedModelError, match=rf"linear reads {reads} beside the time step"):
        check(subject, options())


def test_classes_are_named_too(tiny_class: Path, subject_of: Callable[[Path], Subject]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"linear reads class labels beside the time step, and 2 others"):
        check(subject_of(tiny_class), options())


def test_layers_of_a_mixed_embedding_are_left_with_the_reason(
    tiny_class: Path, subject_of: Callable[[Path], Subject], tmp_path: Path
) -> None:
    changes = run(subject_of(tiny_class), options(tolerance=1), StageFolder(tmp_path), lambda *_: None)
    edited = {edit.module for edit in changes.edits}
    assert edited
    assert all(".timestep_embedder." in module for module in edited)
    assert changes.notes["transformer_blocks.0.norm1.linear"].reason == "reads class labels beside the time step"


def test_a_unet_without_classes_is_told_nothing_but_the_time_step(
    tmp_path: Path, subject_of: Callable[[Path], Subject]
) -> None:
    """Its curve is fast where its time embedder is: as many directions are needed as its inputs have."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError, match=r"errs by [\d.e-]+ at rank \d+, the most that would be smaller, and"
    ):
        check(subject_of(tmp_path), options())


class Asked:
    """A scheduler that has asked for some time steps."""

    def __init__(self, timesteps: list[float]) -> None:
        self.timesteps = torch.tensor(timesteps)
        self.config = FlowMatchEulerDiscreteScheduler().config


@pytest.mark.parametrize(
    ("asked", "told", "ends"),
    [
        ([999, 500, 0], [999, 500, 0], (0, 1000)),
        ([1000.0, 500.0], [1.0, 0.5], (0, 1)),
        ([1000.0, 500.0], [0.0, 0.5], (1, 0)),
        ([900.0, 600.0, 600.0, 300.0], [900.0, 600.0, 300.0], (0, 1000)),
    ],
)
def test_all_time_steps_that_the_denoiser_may_be_told(
    asked: list[float], told: list[float], ends: tuple[float, float]
) -> None:
    times = times_of(Asked(asked), told)
    whole, between = times.all(), times.between(0)
    assert (len(whole), len(between)) == (1001, 1000)
    assert (float(whole[0]), float(whole[-1])) == pytest.approx(ends, abs=1e-9)
    low, high = torch.minimum(whole[:-1], whole[1:]), torch.maximum(whole[:-1], whole[1:])
    assert bool(((low <= between) & (between <= high)).all())


@pytest.mark.parametrize(
    ("asked", "told"),
    [([900.0, 500.0], [900.0]), ([2000.0, 500.0], [2.0, 0.5]), ([900.0, 500.0, 100.0], [3.0, 2.7, 1.0])],
)
def test_time_steps_that_are_not_the_schedulers_are_refused(asked: list[float], told: list[float]) -> None:
    with pytest.raises(UnsupportedModelError, match="Leave prune out"):
        times_of(Asked(asked), told)
