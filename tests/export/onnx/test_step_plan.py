"""Step plans in graphs: the images of torch with the plan, at any number of steps, over one file of weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch

from diffpress.calibration.sampling import denoiser_of
from diffpress.export.artifact import load_pipeline, write_pipeline
from diffpress.export.edits import Attach
from diffpress.export.engines.onnxruntime import ONNXRUNTIME
from diffpress.export.engines.openvino import OpenVino
from diffpress.export.errors import ArtifactError, UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import Manifest, write_manifest
from diffpress.export.onnx.check import check_graph
from diffpress.export.onnx.export import export_onnx
from diffpress.export.onnx.kinds import KINDS
from diffpress.export.onnx.part import Part
from diffpress.export.onnx.planned_calls import inheritance_of, planned_rows
from diffpress.export.onnx.selftest import FLOAT_LIMIT
from diffpress.export.onnx.write_plan import PlannedGraphs, write_planned
from diffpress.export.portable.manifest import EXPORT, read_export
from diffpress.export.portable.pipeline import PortablePipeline
from diffpress.export.portable.verify import verify_export
from diffpress.export.runtime import FeedbackPlan, StepPlan, Unit

STEPS, GUIDANCE = 6, 3.0
BLOCKS = [Unit(modules=(f"transformer_blocks.{n}",), adds_to=("hidden_states",), channels=(16,)) for n in (0, 1)]
PARTS_OF_UNET = [
    Unit(modules=("down_blocks.0.resnets.0",), adds_to=("input_tensor",), channels=(8,)),
    Unit(modules=("mid_block",), adds_to=(None,), channels=(8,)),
    # Its input goes through a layer before it is added.
    Unit(modules=("up_blocks.0.resnets.0",), adds_to=("input_tensor",), channels=(8,)),
]
CELLS = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0]], bool)
"""Four patterns; with other numbers of steps there are more."""


KINDS_OF_PLANS: dict[str, tuple[str, str, Sequence[Unit], dict[str, Any]]] = {
    "plain": ("one_block", "unet", PARTS_OF_UNET, {}),
    "label": ("tiny_class", "transformer", BLOCKS, {"guidance_scale": GUIDANCE}),
}
"""A source, its denoiser, what may be inherited, and how it is sampled."""


class Planned(NamedTuple):
    """A pipeline folder with a plan of second order."""

    kind: str
    original: PipelineFolder
    source: PipelineFolder


class Exported(NamedTuple):
    planned: Planned
    folder: Path


def timesteps(source: Path, steps: int = STEPS) -> list[float]:
    scheduler = load_pipeline(PipelineFolder(source, "source")).scheduler
    scheduler.set_timesteps(steps)
    return [float(value) for value in scheduler.timesteps]


def attached(component: str, units: Sequence[Unit], **settings: Any) -> tuple[Attach, dict[str, torch.Tensor]]:
    """A plan whose every number differs from every other, so that one taken for another is noticed."""
    plan = StepPlan.of(units, CELLS[:, : len(units)], **settings)
    generator = torch.Generator().manual_seed(0)
    damping = 0.5 + 0.5 * torch.rand(STEPS, len(units), plan.order, generator=generator)
    tensors = {"step_plan.damping": damping}
    if plan.corrected:
        spread = torch.tensor([0.5, 0.5]).view(1, 2, 1)
        noise = spread * torch.randn(len(plan.inheriting), 2, plan.channels, generator=generator)
        tensors["step_plan.correction"] = (torch.tensor([1.0, 0.0]).view(1, 2, 1) + noise).half()
    return Attach(component=component, module="step_plan", settings=plan), tensors


@pytest.fixture(scope="session", params=["plain", pytest.param("label", marks=pytest.mark.long)])
def planned(request: pytest.FixtureRequest, made_once: Callable[..., Path]) -> Planned:
    name, component, units, _ = KINDS_OF_PLANS[request.param]
    original = PipelineFolder(request.getfixturevalue(name), name)

    def make(folder: Path) -> None:
        edit, tensors = attached(component, units, order=2, corrected=True)
        write_pipeline(folder / "source", original, [edit], {component: tensors}, timesteps(original.path))

    folder = made_once(f"planned-{request.param}", make) / "source"
    return Planned(request.param, original, PipelineFolder(folder, request.param))


@pytest.fixture(scope="session")
def exported(planned: Planned, made_once: Callable[..., Path]) -> Exported:
    def make(folder: Path) -> None:
        export_onnx(planned.source, folder / "export", steps=STEPS, **KINDS_OF_PLANS[planned.kind][3])

    return Exported(planned, made_once(f"planned-{planned.kind}-export", make) / "export")


def torch_images(source: PipelineFolder, steps: int, guidance_scale: float | None = None) -> Any:
    pipeline = load_pipeline(source)
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"batch_size": 2}
    if guidance_scale is not None:
        arguments = {"class_labels": [3, 7], "guidance_scale": guidance_scale}
    generators = [torch.Generator().manual_seed(seed) for seed in (11, 12)]
    return pipeline(num_inference_steps=steps, generator=generators, output_type="np", **arguments).images


@pytest.mark.parametrize("steps", [STEPS, pytest.param(10, marks=pytest.mark.long)])
@pytest.mark.parametrize("guided", [True, pytest.param(False, marks=pytest.mark.long)])
def test_images_equal_those_of_torch_with_the_plan(exported: Exported, steps: int, guided: bool) -> None:
    kind, original, source = exported.planned
    scale = None if kind == "plain" else GUIDANCE if guided else 1.0
    plain, expected = (torch_images(own, steps, scale) for own in (original, source))
    pipeline = PortablePipeline(exported.folder, ONNXRUNTIME, threads=1)
    conditions = ["", ""] if kind == "plain" else ["3", "7"]
    found = pipeline.generate_batch(conditions, [11, 12], steps, scale)
    # Small beside what the plan does, else it would not show that it runs.
    np.testing.assert_allclose(found, expected, atol=min(FLOAT_LIMIT, np.abs(plain - expected).max() / 100))
    # A second run begins anew.
    np.testing.assert_array_equal(pipeline.generate_batch(conditions, [11, 12], steps, scale), found)


def test_openvino_draws_the_same(exported: Exported) -> None:
    kind = exported.planned.kind
    condition, scale = ("", None) if kind == "plain" else ("3", GUIDANCE)
    found, expected = (
        PortablePipeline(exported.folder, engine, threads=1).generate(condition, 11, STEPS, scale)
        for engine in (OpenVino(), ONNXRUNTIME)
    )
    np.testing.assert_allclose(found, expected, atol=FLOAT_LIMIT)


def test_weights_lie_in_one_file_and_are_there_once(exported: Exported) -> None:
    manifest = read_export(exported.folder)
    graphs = {name: graph for name, graph in manifest.components.items() if name.startswith("denoiser")}
    units = KINDS_OF_PLANS[exported.planned.kind][2]
    assert len(graphs) >= len({tuple(row) for row in CELLS[:, : len(units)]})
    assert {graph.data for graph in graphs.values()} == {"denoiser.onnx.data"}
    model = ir.load(exported.folder / "denoiser.onnx")
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    # Two tables of half precision for each unit: a row of channels for every step that inherits, and one more.
    tables = sum(2 * 2 * len(CELLS) * unit.channels[0] for unit in units)
    assert manifest.files["denoiser.onnx.data"].size_bytes <= weights + tables


def test_what_is_kept_is_named_with_its_bytes(exported: Exported) -> None:
    plan = read_export(exported.folder).step_plan
    assert plan is not None
    # Channels of 8 by 8, or 16 patches of channels.
    shape: tuple[int, ...] = (8, 8, 8) if exported.planned.kind == "plain" else (16, 16)
    assert {(own.shape, own.count, own.bytes) for own in plan.kept} == {
        (("batch", *shape), 3, 3 * 4 * math.prod(shape))
    }
    assert [own.name for own in plan.kept] == [
        f"feature.{unit}.0" for unit in range(len(KINDS_OF_PLANS[exported.planned.kind][2]))
    ]
    assert plan.bytes == len(plan.kept) * plan.kept[0].bytes
    first, second, third, *_ = (call.graph for call in plan.calls[STEPS])
    assert first == "denoiser"
    assert len({first, second, third}) == 3


def test_the_self_test_asks_every_graph_of_a_run(exported: Exported) -> None:
    manifest = verify_export(exported.folder, ONNXRUNTIME, threads=1)
    assert manifest.step_plan is not None
    asked = {call.graph for call in manifest.step_plan.calls[manifest.self_test.steps]}
    assert len(asked) == max(len({call.graph for call in calls}) for calls in manifest.step_plan.calls.values())


def packed_source(folder: Path, original: Path, pack_all: Any, storage: str) -> PipelineFolder:
    """A denoiser in integers with a plan that is fitted to it, features held in `storage`."""
    plain, known = PipelineFolder(original, "plain"), timesteps(original)
    edits, tensors = pack_all(load_pipeline(plain).unet, "unet", 8, 8, STEPS)
    plan, own = attached("unet", PARTS_OF_UNET, order=2, corrected=True, storage=storage)
    write_pipeline(folder / "source", plain, [*edits, plan], {"unet": {**tensors, **own}}, known)
    return PipelineFolder(folder / "source", "source")


@pytest.mark.long
@pytest.mark.parametrize(("storage", "dtype"), [("int8", "int8"), ("bfloat16", "float32")])
def test_packed_layers_and_held_features(
    one_block: Path, pack_all: Any, tmp_path: Path, storage: str, dtype: str
) -> None:
    source = packed_source(tmp_path, one_block, pack_all, storage)
    manifest = export_onnx(source, tmp_path / "export", steps=STEPS)
    assert manifest.step_plan is not None
    assert {tensor.dtype for tensor in manifest.step_plan.kept if "scale" not in tensor.name} == {dtype}
    expected = torch_images(source, STEPS)
    found = PortablePipeline(tmp_path / "export", ONNXRUNTIME, threads=1).generate_batch(["", ""], [11, 12], STEPS)
    error = float(np.sqrt(np.square(found - expected).mean()))
    assert error <= manifest.self_test.tolerance


class Written(NamedTuple):
    part: Part
    planned: PlannedGraphs
    folder: Path


@pytest.fixture(scope="module")
def written(one_block: Path, pack_all: Any, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The graphs of a denoiser alone, in integers, with features in integers."""
    source = packed_source(tmp_path_factory.mktemp("packed"), one_block, pack_all, "int8")
    pipeline, known = load_pipeline(source), timesteps(source.path)
    parts = KINDS[type(pipeline).__name__].parts(pipeline, tuple(known), None)
    part = next(own for own in parts if own.name == "denoiser")
    inheritance = inheritance_of(part.module)
    assert inheritance is not None
    folder = tmp_path_factory.mktemp("planned")
    rows = planned_rows(inheritance, known)
    return Written(part, write_planned(part, inheritance, rows, folder, ONNXRUNTIME.form), folder)


def test_every_graph_follows_torch(written: Written) -> None:
    for name, own in written.planned.graphs.items():
        agreement = check_graph(own.part, written.folder / f"{name}.onnx", own.places, ONNXRUNTIME)
        assert agreement.relative_error <= agreement.tolerance


@pytest.mark.parametrize("table", ["feature.0.0.table0", "feature.1.0.table1"])
def test_a_forecast_off_by_one_percent_is_refused(written: Written, tmp_path: Path, table: str) -> None:
    # The pattern that inherits everything.
    name = next(own for pattern, own in written.planned.names.items() if not any(pattern))
    model = ir.load(written.folder / f"{name}.onnx")
    stored = model.graph.initializers[table]
    stored.const_value = ir.tensor(stored.const_value.numpy() * np.float16(1.01), name=table)
    ir.save(model, tmp_path / f"{name}.onnx", external_data="denoiser.onnx.data")
    own = written.planned.graphs[name]
    with pytest.raises(ArtifactError, match=r"differs from torch by .* rounding explains"):
        check_graph(own.part, tmp_path / f"{name}.onnx", own.places, ONNXRUNTIME)


@pytest.mark.parametrize("steps", [1, 3, 5, STEPS, 7, 12, 25])
def test_calls_do_what_torch_finds_out_call_by_call(
    planned: Planned, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(planned.source)
    pipeline.set_progress_bar_config(disable=True)
    inheritance = inheritance_of(denoiser_of(pipeline))
    assert inheritance is not None
    frames: list[Any] = []
    end = inheritance.end
    monkeypatch.setattr(inheritance, "end", lambda run: (frames.append(inheritance.frame), end(run)))
    arguments: dict[str, Any] = {} if planned.kind == "plain" else {"class_labels": [3], "guidance_scale": GUIDANCE}
    pipeline(num_inference_steps=steps, **arguments)
    rows = planned_rows(inheritance, pipeline.scheduler.timesteps.tolist())
    assert [row.computes for row in rows] == [frame.computes for frame in frames]
    for row, frame in zip(rows, frames, strict=True):
        assert {unit: np.float32(own).tolist() for unit, own in row.weights.items()} == {
            unit: torch.stack(list(own)).tolist() for unit, own in frame.weights.items()
        }
        assert (row.correction is not None and len(row.weights) > 0) == (frame.corrections is not None)


@pytest.mark.parametrize(
    "change",
    [
        {"calls": {}},
        {"kept": []},
        {"calls": {str(STEPS): [{"graph": "denoiser_1", "forecast": [], "correction": 0}] * STEPS}},
        {"calls": {str(STEPS): [{"graph": "elsewhere", "forecast": [], "correction": 0}] * STEPS}},
    ],
)
def test_a_plan_that_does_not_fit_is_refused(exported: Exported, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(exported.folder, tmp_path / "export"))
    data = json.loads((folder / EXPORT).read_text())
    data["step_plan"] |= change
    (folder / EXPORT).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"step plan in export\.json does not fit \d+ steps"):
        PortablePipeline(folder, ONNXRUNTIME, threads=1)


def test_feedback_is_refused_before_anything_is_read(one_block: Path, tmp_path: Path) -> None:
    settings = FeedbackPlan(blocks="blocks", first=0, last=1, copied=1, carries=("hidden_states",), steps="#@")
    edit = Attach(component="transformer", module="feedback", settings=settings)
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(one_block / "model_index.json", source)
    fields: dict[str, Any] = {key: {} for key in ("versions", "recipe", "source", "metrics", "files")}
    write_manifest(source, Manifest(fingerprint="", timesteps=[2.0, 1.0], edits=[edit], plan=[], **fields))
    with pytest.raises(UnsupportedModelError, match=r"graphs have no inner loop.* Compress without it"):
        export_onnx(PipelineFolder(source, "looped"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
