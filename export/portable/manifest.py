"""`export.json`: what an export folder holds, how to sample with it, and what its self test must give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..digests import File, compare_files, inside, read_manifest_file
from ..engines.engine import Form
from ..errors import ArtifactError

EXPORT = "export.json"
SCHEMA = 5
"""5 says which kernels multiplied, has weights in four bits, and may have engines. 4 may have schedules with updates, which
draw noise or clip; 3 may have a step plan. 2 says in which form products of codes are written and why, and has a graph that
tries an engine; all of 1 is as it was."""
UNPLANNED, PLANNED, UPDATED = 2, 3, 4
"""What exports without integers are written as: without and with a step plan, and where a schedule has updates."""
ANEW = "export anew"
FORECAST, CORRECTION = "forecast", "correction"
"""Inputs of graphs: what past features weigh [units, kept], and which row of the tables corrects what they give."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Port(_Data):
    """One input or output of a graph."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    """A number where the size is fixed; `batch` may be anything from 1 on."""


class Kernels(_Data):
    """What multiplied in one run of a graph, read back from the engine's own trace when the export was written."""

    integer: int
    """How many matrix products and convolutions ran in integers."""
    floating: int
    by_operator: dict[str, int]
    """Of these, what the engine made of them."""


class BuiltEngine(_Data):
    """An engine built of a graph for certain GPUs."""

    component: str
    file: str
    builder: str
    targets: tuple[str, ...]
    layers: dict[str, int]
    """How many computing layers have inputs, or weights, of which type, as the builder reported."""

    @property
    def low_bits_share(self) -> float:
        """Share of computing layers in 8 bits and fewer."""
        low = sum(count for name, count in self.layers.items() if name in ("FP8", "Int4", "Int8"))
        return low / max(sum(self.layers.values()), 1)


class Checked(_Data):
    """What an export was checked in."""

    engine: str
    version: str
    settings: dict[str, str]
    """Those that decide what runs in integers."""


class Graph(_Data):
    """One ONNX file with its weights beside it, and how closely it followed torch when it was written."""

    file: str
    data: str
    format: Literal["float32", "int8"]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    max_abs_error: float
    relative_error: float
    """Root mean square of the difference over that of torch's output."""
    tolerance: float
    """What `relative_error` had to stay under."""
    kernels: Kernels | None = None
    """Of a graph that multiplies integers."""


class Tokens(_Data):
    """The condition is a prompt."""

    file: str
    length: int
    pad_token: str


class Labels(_Data):
    """The condition is a class: its number, or a name."""

    count: int
    null: int
    """The class that stands for none, used for guidance."""
    names: dict[str, int]


class Operation(_Data):
    """What a scheduler computes once: noise, or a weighted sum of what there is, which may be clipped."""

    weights: tuple[tuple[int, float], ...] | None = None
    """Of terms, by their numbers; None draws standard normal noise of the sample's shape instead, each image's from its own
    generator, which goes on from its first noise."""
    low: float | None = None
    high: float | None = None
    """Limits that the sum is clipped to, where there are some."""


class SchedulerTable(_Data):
    """A whole sampling run of a scheduler, as numbers.

    Either `coefficients` hold it or `updates`. For these terms are numbered as they appear: 0 is the first sample; each call
    of the denoiser adds its (guided) output, then each operation of its update adds what it gives; the last is the next
    sample.
    """

    init_noise_sigma: float
    """Factor on the noise before the first call."""
    timesteps: tuple[float, ...]
    """Per call of the denoiser, what it is told."""
    input_scale: tuple[float, ...]
    """Per call, the factor on the sample that the denoiser sees."""
    coefficients: tuple[tuple[float, ...], ...]
    """Per call, the next sample as weights of the first sample and of all outputs so far; empty where there are updates."""
    updates: tuple[tuple[Operation, ...], ...] | None = None
    """Per call, where the scheduler draws noise or clips: what it computes after it."""


class Kept(_Data):
    """A tensor that graphs of the denoiser give, and others are given at later calls of a run."""

    name: str
    """Of the output; `NAME.past1` is the input that takes the latest, `NAME.past2` the one before it."""
    dtype: Literal["float32", "int8"]
    shape: tuple[int | str, ...]
    """As of a port."""
    count: int = Field(ge=1)
    """How many are kept, the latest ones."""
    bytes: int
    """Of all that is kept for one image; guidance takes two."""


class PlannedCall(_Data):
    """One call of the denoiser."""

    graph: str
    """The component that answers it."""
    forecast: tuple[tuple[float, ...], ...]
    """The input of that name, where the graph has one: what past features weigh [units, kept]. Empty where all is computed."""
    correction: int
    """The same: which row of the tables in the graph corrects forecasts."""


class StepPlanTables(_Data):
    """What is computed at which call, and what is kept for later ones.

    A call's graph is asked with the denoiser's inputs and those of `forecast`, `correction` and past tensors that it has.
    What it gives behind its output is kept. Where fewer of a tensor have been given yet, the oldest stands for those before.
    """

    kept: tuple[Kept, ...]
    bytes: int
    """Of all that is kept for one image."""
    calls: dict[int, tuple[PlannedCall, ...]]
    """Per number of steps, as the schedules."""


class SelfTest(_Data):
    """One image that torch made of the source pipeline."""

    condition: str
    seed: int
    steps: int
    guidance_scale: float | None
    image: str
    """numpy file, float32 [H, W, C] in 0..1."""
    rms_error: float
    """Measured when the export was written."""
    tolerance: float
    """Root mean square difference that is still right."""


class ExportManifest(_Data):
    """Everything an export says of itself."""

    schema_version: int = UNPLANNED
    pipeline: str
    """Class name of the source pipeline."""
    opset: int
    format: Literal["float32", "int8"]
    """`int8` where any graph multiplies integers."""
    form: Form = "uint8 x int8"
    """How the two sides of products of codes are written, where there are some."""
    form_reason: str = "written by schema 1, which knew no other"
    worst_case: str | None = None
    """The graph that shows whether an engine computes this form exactly; its weights lie beside it."""
    checked: Checked | None = None
    """Where there are integers."""
    largest_error: float
    """Of all graphs' outputs against torch's, absolute."""
    versions: dict[str, str]
    components: dict[str, Graph]
    left_out: tuple[str, ...]
    """Models of the source that are not exported, such as a safety checker."""
    latent_shape: tuple[int, int, int]
    """Channels, height and width of the noise."""
    scaling_factor: float
    """Latents are divided by it before they are decoded."""
    tokens: Tokens | None
    labels: Labels | None
    first_half: Literal["conditional", "unconditional"] | None
    """Which half of a guided batch comes first; None where there is no guidance."""
    steps: int
    guidance_scale: float | None
    """Used where the caller names none; guidance is off at 1 and below."""
    schedules: dict[int, SchedulerTable]
    """Per number of steps."""
    step_plan: StepPlanTables | None = None
    """Where some steps inherit from others."""
    engines: tuple[BuiltEngine, ...] = ()
    """Built ahead of time."""
    self_test: SelfTest
    files: dict[str, File]


def write_export(folder: Path, manifest: ExportManifest) -> None:
    """Write `export.json`, keys sorted."""
    data = manifest.model_dump(mode="json")
    # What an older diffpress does not know is left out where there is nothing to say.
    for name in ("step_plan", "checked", "engines"):
        if not data[name]:
            del data[name]
    for table in data["schedules"].values():
        if table["updates"] is None:
            del table["updates"]
    for graph in data["components"].values():
        if graph["kernels"] is None:
            del graph["kernels"]
    text = json.dumps(data, sort_keys=True, indent=1)
    (folder / EXPORT).write_text(text + "\n", encoding="utf-8")


def is_export(path: Path) -> bool:
    """Whether a folder carries an export's manifest."""
    return (path / EXPORT).is_file()


def read_export(folder: Path) -> ExportManifest:
    """Read `export.json`. Raises ArtifactError where it is missing, damaged, too new, or points out of its folder."""
    path = folder / EXPORT
    if not path.is_file():
        raise ArtifactError(f"{folder} is no ONNX export of diffpress: it has no {EXPORT}.")
    inside(folder, EXPORT)
    manifest = read_manifest_file(path, ExportManifest, SCHEMA, ANEW)
    _check_names(folder, manifest)
    _check_updates(folder, manifest)
    if manifest.step_plan is not None:
        _check_plan(folder, manifest, manifest.step_plan)
    return manifest


def _check_names(folder: Path, manifest: ExportManifest) -> None:
    tokens = None if manifest.tokens is None else manifest.tokens.file
    named = {name for name in (manifest.self_test.image, manifest.worst_case, tokens) if name is not None}
    for graph in manifest.components.values():
        named |= {graph.file, graph.data}
    named |= {engine.file for engine in manifest.engines}
    for name in sorted(named | manifest.files.keys()):
        inside(folder, name)
    unlisted = sorted(named - manifest.files.keys())
    if unlisted:
        raise ArtifactError(f"{folder}: {EXPORT} uses {unlisted[0]} but lists no digest of it. Export again.")


def _check_updates(folder: Path, manifest: ExportManifest) -> None:
    """Every call has an update that ends in a sample, and takes up only terms that there are."""
    for steps, table in manifest.schedules.items():
        known = 0
        sound = table.updates is None or len(table.updates) == len(table.timesteps)
        for update in table.updates or ():
            known += 1
            sound = sound and bool(update) and update[-1].weights is not None
            for own in update:
                sound = sound and all(0 <= term <= known for term, _ in own.weights or ())
                known += 1
        if not sound:
            raise ArtifactError(f"{folder}: the updates of {steps} steps in {EXPORT} do not fit. Export again.")


def _check_plan(folder: Path, manifest: ExportManifest, plan: StepPlanTables) -> None:
    """Every call has a graph whose inputs there is something for, and runs begin with one that takes up nothing."""
    known = {f"{own.name}.past{count}" for own in plan.kept for count in range(1, own.count + 1)}
    first = {port.name for port in manifest.components["denoiser"].inputs}
    for steps, table in manifest.schedules.items():
        calls = plan.calls.get(steps, ())
        graphs = {call.graph for call in calls} & manifest.components.keys()
        more = {port.name for name in graphs for port in manifest.components[name].inputs} - first
        sound = len(calls) == len(table.timesteps) and graphs == {call.graph for call in calls}
        if not sound or calls[0].graph != "denoiser" or more - known - {FORECAST, CORRECTION}:
            raise ArtifactError(f"{folder}: the step plan in {EXPORT} does not fit {steps} steps. Export again.")


def check_files(folder: Path, manifest: ExportManifest) -> list[str]:
    """Compare every file with its digest; gives what lies beside them. Raises ArtifactError naming the first that differs or is
    missing.
    """
    return compare_files(folder, manifest.files, (EXPORT,), ANEW)
