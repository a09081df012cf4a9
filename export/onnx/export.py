"""A pipeline folder to an export folder."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..artifact import is_artifact, open_pipeline
from ..engines.engine import REASONS, Engine
from ..engines.onnxruntime import ONNXRUNTIME
from ..engines.worst_case import require_exact
from ..errors import UnsupportedModelError
from ..folder import PipelineFolder
from ..manifest import list_files, read_manifest
from ..outputs import check_output, check_space
from ..portable.manifest import (
    EXPORT,
    PLANNED,
    SCHEMA,
    UNPLANNED,
    UPDATED,
    Checked,
    ExportManifest,
    Graph,
    Kernels,
    Port,
    SchedulerTable,
    StepPlanTables,
    write_export,
)
from ..portable.tables import STANDARD_STEPS, build_tables
from ..publishing import publish, staging
from ..runtime import Inheritance
from .check import Agreement, check_graph, larger
from .kinds import Kind, defaults, kind_of, latent_shape
from .part import Part, multiplies_codes
from .passes import widen_weights_
from .planned_calls import inheritance_of, plan_tables, planned_rows
from .selftest import run_self_test, write_self_test
from .trace import OPSET
from .worst_case import write_worst_case
from .write import write_graph
from .write_plan import write_planned

PACKAGES = ("diffpress", "diffusers", "onnx", "onnxruntime", "onnxscript", "torch", "transformers")
TEST_STEPS = 4
"""Steps of the self test: few, and enough to see the scheduler's table at work."""


class CheckedGraph(NamedTuple):
    """A graph that was written, and how it agreed."""

    part: Part
    agreement: Agreement
    data: str
    """The file of its weights."""


def ignore(done: int, total: int) -> None:
    """The progress callback of those who want none."""


def as_it_is(folder: Path, manifest: ExportManifest) -> ExportManifest:
    """What is done to an export where nothing comes on top."""
    return manifest


def export_onnx(
    source: PipelineFolder,
    out: Path,
    *,
    engine: Engine = ONNXRUNTIME,
    steps: int | None = None,
    guidance_scale: float | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] = ignore,
    finish: Callable[[Path, ExportManifest], ExportManifest] = as_it_is,
) -> ExportManifest:
    """Write the whole pipeline at `source` as ONNX to `out`, checked against torch in `engine`; returns `export.json`.

    `finish` adds files to the folder before it is put into its place, and returns the manifest that names them.

    `steps` and `guidance_scale` become the export's defaults, else the pipeline's own are. Raises
    UnsupportedModelError, ArtifactError or OutputError, and then leaves `out` as it was.
    """
    kind = kind_of(str(source.index["_class_name"]))
    out = check_output(out, [source.path], force)
    _check_edits(source)
    pipeline = open_pipeline(source)
    kind.check(pipeline)
    components = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    check_space(out, 4 * sum(tensor.numel() for part in components for tensor in part.state_dict().values()))
    with staging(out) as staged:
        manifest = finish(staged, _write(kind, pipeline, staged, engine, steps, guidance_scale, progress))
        manifest = manifest.model_copy(update={"files": list_files(staged, (EXPORT,))})
        write_export(staged, manifest)
        publish(staged, out)
    return manifest


def _check_edits(source: PipelineFolder) -> None:
    for edit in read_manifest(source.path).edits if is_artifact(source.path) else ():
        reason = edit.why_not_exported()
        if reason is not None:
            raise UnsupportedModelError(
                f"{source.name} has a {edit.words()}, which cannot be exported yet: {reason}. Compress without it to export."
            )


def _write(
    kind: Kind,
    pipeline: Any,
    folder: Path,
    engine: Engine,
    steps: int | None,
    guidance_scale: float | None,
    progress: Callable[[int, int], None],
) -> ExportManifest:
    own_steps, own_guidance = defaults(pipeline)
    steps = own_steps if steps is None else steps
    schedules = build_tables(pipeline.scheduler, steps, (TEST_STEPS, *STANDARD_STEPS), kind.scales_input, kind.seeded)
    asked_guidance = own_guidance if guidance_scale is None else guidance_scale
    parts = kind.parts(pipeline, schedules[steps].timesteps, asked_guidance)
    integers = any(multiplies_codes(part) for part in parts)
    worst_case = _try_engine(folder, engine) if integers else None
    # The last of the steps is comparing an image with torch's.
    total, plan = len(parts) + 1, None
    checked: list[CheckedGraph] = []
    for done, part in enumerate(parts):
        progress(done, total)
        inheritance = inheritance_of(part.module)
        if inheritance is None:
            checked.append(_write_part(part, folder, engine))
        else:
            own, plan = _write_planned(part, inheritance, schedules, folder, engine)
            checked += own
    graphs = {own.part.name: _describe(own, folder, engine) for own in checked}
    progress(len(parts), total)
    denoiser = pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
    guided = kind.first_half is not None or kind.fixes_guidance
    guidance = asked_guidance if guided else None
    manifest = ExportManifest(
        schema_version=SCHEMA if integers else _schema(schedules, plan),
        pipeline=type(pipeline).__name__,
        opset=OPSET,
        format="int8" if integers else "float32",
        form=engine.form,
        form_reason=REASONS[engine.form],
        worst_case=worst_case,
        checked=Checked(engine=engine.name, version=engine.version(), settings=engine.settings) if integers else None,
        largest_error=max(graph.max_abs_error for graph in graphs.values()),
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        components=graphs,
        left_out=_left_out(pipeline, parts),
        latent_shape=latent_shape(denoiser),
        scaling_factor=pipeline.vae.config.scaling_factor if hasattr(pipeline, "vae") else 1.0,
        tokens=kind.tokens(pipeline, folder),
        labels=kind.labels(pipeline),
        first_half=kind.first_half,
        steps=steps,
        guidance_scale=guidance,
        schedules=schedules,
        step_plan=plan,
        self_test=write_self_test(
            kind, pipeline, _rounding(checked), folder, _telling_steps(schedules, plan), guidance
        ),
        files=list_files(folder, (EXPORT,)),
    )
    manifest = run_self_test(manifest, folder, engine)
    progress(total, total)
    return manifest


def _schema(schedules: dict[int, SchedulerTable], plan: StepPlanTables | None) -> int:
    """The earliest whose readers understand all of it."""
    if any(table.updates is not None for table in schedules.values()):
        return UPDATED
    return UNPLANNED if plan is None else PLANNED


def _try_engine(folder: Path, engine: Engine) -> str:
    """The graph of worst cases in the export, by which it is tried wherever it goes; first of all, here."""
    file = write_worst_case(folder, engine.form)
    require_exact(engine, folder / file)
    return file


def _left_out(pipeline: Any, parts: list[Part]) -> tuple[str, ...]:
    """Models of the pipeline that no part is made of."""
    models = {name: model for name, model in pipeline.components.items() if isinstance(model, torch.nn.Module)}
    used = {id(module) for part in parts for module in part.module.modules()}
    return tuple(sorted(name for name, model in models.items() if id(model) not in used))


def _write_part(part: Part, folder: Path, engine: Engine) -> CheckedGraph:
    """One graph on disk, checked against torch."""
    widen_weights_(part.module)
    places = write_graph(part, folder, engine.form)
    return CheckedGraph(part, check_graph(part, folder / f"{part.name}.onnx", places, engine), f"{part.name}.onnx.data")


def _write_planned(
    part: Part, inheritance: Inheritance, schedules: dict[int, SchedulerTable], folder: Path, engine: Engine
) -> tuple[list[CheckedGraph], StepPlanTables]:
    """The graphs of a denoiser with a step plan, checked against torch, and what runs of them do at which call."""
    widen_weights_(part.module)
    rows = {steps: planned_rows(inheritance, table.timesteps) for steps, table in schedules.items()}
    planned = write_planned(part, inheritance, chain(*rows.values()), folder, engine.form)
    checked = [
        CheckedGraph(
            own.part, check_graph(own.part, folder / f"{name}.onnx", own.places, engine), f"{part.name}.onnx.data"
        )
        for name, own in planned.graphs.items()
    ]
    return checked, plan_tables(planned, rows, inheritance.plan)


def _rounding(checked: Sequence[CheckedGraph]) -> list[tuple[nn.Module, dict[str, float]]]:
    """How far engines were off in what pieces are given, the worst of all graphs over the same weights."""
    found: dict[str, tuple[nn.Module, dict[str, float]]] = {}
    for own in checked:
        module, worst = found.get(own.data, (own.part.module, {}))
        found[own.data] = (module, larger(worst, own.agreement.rounding))
    return list(found.values())


def _telling_steps(schedules: dict[int, SchedulerTable], plan: StepPlanTables | None) -> int:
    """The fewest steps whose run asks as many graphs as any."""
    if plan is None:
        return min(schedules)
    return min(schedules, key=lambda steps: (-len({call.graph for call in plan.calls[steps]}), steps))


def _describe(checked: CheckedGraph, folder: Path, engine: Engine) -> Graph:
    """What the manifest says of a graph."""
    part, agreement = checked.part, checked.agreement
    example = part.example(1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = part.answer(example)
    return Graph(
        file=f"{part.name}.onnx",
        data=checked.data,
        format="int8" if multiplies_codes(part) else "float32",
        inputs=tuple(item.port() for item in part.inputs),
        outputs=tuple(_output_port(name, value) for name, value in outputs.items()),
        max_abs_error=agreement.max_abs_error,
        relative_error=agreement.relative_error,
        tolerance=agreement.tolerance,
        kernels=_kernels(part, example, folder, engine) if multiplies_codes(part) else None,
    )


def _kernels(part: Part, example: Mapping[str, Tensor], folder: Path, engine: Engine) -> Kernels:
    arrays = {name: value.numpy() for name, value in example.items()}
    return Kernels(**engine.kernels(folder / f"{part.name}.onnx", arrays, torch.get_num_threads())._asdict())


def _output_port(name: str, value: Tensor) -> Port:
    shape = ("batch", *value.shape[1:]) if value.ndim else ()
    return Port(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=shape)
