"""What an artifact or export says of itself, and whether it is true."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffpress.export.artifact import expansion_here, is_artifact, verify
from diffpress.export.bundle.manifest import BundleManifest
from diffpress.export.bundle.read import is_bundle, opened_bundle
from diffpress.export.digests import File
from diffpress.export.edits import step_plans
from diffpress.export.errors import ArtifactError, UserError
from diffpress.export.manifest import Manifest, read_manifest
from diffpress.export.portable.manifest import ExportManifest, is_export, read_export
from diffpress.export.runtime import Expansion, StepPlan
from diffpress.kernels.answering import machine_words

from .report.formatting import ranges
from .report.plan import explained
from .report.pruning import is_structure, removed_words
from .report.steps import KINDS
from .speed import expansion_data, expansion_words

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Its title, its header and its rows."""


def verify_folder(path: Path) -> str:
    """A sentence on what was checked. Raises ArtifactError at the first thing that is not as it was saved."""
    if is_bundle(path):
        with opened_bundle(path) as (bundle, folder):
            return _verified(path, folder, len(bundle.files))
    if is_export(path):
        return _verified(path, path, len(read_export(path).files))
    _require_artifact(path)
    manifest = verify(path)
    return f"{path} is sound: {len(manifest.files)} files match their digests, {len(manifest.edits)} edits apply"


def inspect_folder(path: Path) -> dict[str, Any]:
    """The manifest, with tables for people under `tables`."""
    if is_bundle(path):
        with opened_bundle(path) as (bundle, folder):
            return _bundle_data(path, bundle, read_export(folder))
    if is_export(path):
        export = read_export(path)
        files = _files(f"export {path}", export.files)
        return {**export.model_dump(mode="json"), "tables": [files, *_planned_calls(export)]}
    _require_artifact(path)
    manifest = read_manifest(path)
    # Nothing is known of what an older artifact's layers are given.
    here = expansion_here(path, manifest) if manifest.layers else None
    data = manifest.model_dump(mode="json") | {"here": _here(here) if here else None}
    return {**data, "tables": _tables(path, manifest, here)}


def _verified(path: Path, export: Path, files: int) -> str:
    from diffpress.export.engines.named import engine_named
    from diffpress.export.portable.verify import verify_export

    verify_export(export, engine_named("onnx", read_export(export).form))
    return f"{path} is sound: {files} files match their digests, the self test gives its image"


def _bundle_data(path: Path, bundle: BundleManifest, export: ExportManifest) -> dict[str, Any]:
    peak = bundle.peak_memory_bytes
    summary: list[tuple[str, ...]] = [
        ("target", bundle.target.value),
        ("pipeline", export.pipeline),
        ("memory", "not measured" if peak is None else f"{peak / 1e6:,.0f} MB, measured on {bundle.measured_on}"),
        *((name, version) for name, version in sorted(bundle.versions.items())),
    ]
    tables = [(f"bundle {path}", ("", "value"), summary), _files("files", bundle.files), *_planned_calls(export)]
    return {**bundle.model_dump(mode="json"), "export": export.model_dump(mode="json"), "tables": tables}


def _files(title: str, files: Mapping[str, File]) -> Table:
    rows = [(name, f"{file.size_bytes:,}", file.sha256[:16]) for name, file in sorted(files.items())]
    return title, ("file", "bytes", "sha256"), [*rows]


def _planned_calls(export: ExportManifest) -> list[Table]:
    """Which graph of the denoiser answers at which steps of a run as the export makes it unasked."""
    plan = export.step_plan
    if plan is None:
        return []
    graphs = [call.graph for call in plan.calls[export.steps]]
    asked = {name: ranges(step for step, own in enumerate(graphs, 1) if own == name) for name in dict.fromkeys(graphs)}
    rows: list[tuple[str, ...]] = [*asked.items()]
    title = f"step plan, {len(plan.kept)} tensors kept, {plan.bytes / 1e6:.1f} MB for an image"
    table: Table = (title, ("graph", f"at steps of {export.steps}"), rows)
    return [table]


def _here(expansion: Expansion) -> dict[str, Any]:
    """What becomes of the layers when the artifact is loaded on this machine."""
    times = {
        form.key(): {"packed_ms": own.packed_ms, "floats_ms": own.floats_ms} for form, own in expansion.times.items()
    }
    return {"machine": machine_words(), **expansion_data(expansion), "forms": dict(sorted(times.items()))}


def _bytes(manifest: Manifest, component: str) -> str:
    rows = [row for row in manifest.plan if row.component == component]
    return f"{sum(row.source_bytes for row in rows):,} -> {sum(row.bytes for row in rows):,}"


def _require_artifact(path: Path) -> None:
    if not path.is_dir():
        raise UserError(f"there is no folder {path}.")
    if not is_artifact(path):
        raise ArtifactError(f"{path} is neither an artifact nor an export nor a bundle of diffpress: make one first.")


def _tables(path: Path, manifest: Manifest, here: Expansion | None) -> list[Table]:
    rows = explained(manifest.plan, here) if here else manifest.plan
    formats = Counter(row.format for row in manifest.plan if not is_structure(row))
    removed = removed_words(manifest.plan)
    summary = [
        ("source", str(manifest.source["model"])),
        ("fingerprint", manifest.fingerprint[:16]),
        *([("units", removed)] if removed else []),
        ("formats", ", ".join(f"{count} x {name}" for name, count in formats.most_common())),
        *(
            (f"{component} bytes", _bytes(manifest, component))
            for component in {row.component: None for row in manifest.plan}
        ),
        *((key, f"{value:.4g}") for key, value in manifest.metrics.items() if isinstance(value, (int, float))),
        *([("loaded here", f"{expansion_words(here)} ({machine_words()})")] if here else []),
    ]
    plan: list[tuple[str, ...]] = [
        (row.module, "x".join(map(str, row.shape)), row.format, f"{row.bytes:,}", row.reason)
        for row in rows
        if not is_structure(row)
    ]
    units = [
        (row.module.rpartition(", ")[0], row.format, *map(str, row.shape), row.reason)
        for row in manifest.plan
        if is_structure(row)
    ]
    return [
        (f"artifact {path}", ("", "value"), [(key, value) for key, value in summary]),
        ("plan", ("module", "shape", "format", "bytes", "reason"), plan),
        *([("units", ("structure", "units", "kept", "of", "which"), units)] if units else []),
        *(_step_plan(plan) for plan in step_plans(manifest.edits)),
    ]


def _step_plan(plan: StepPlan) -> Table:
    """A row for each pattern: how many units do what, and at which steps."""
    rows = [
        (
            *(str(pattern.count(kind)) for kind in KINDS),
            ranges(step for step, own in enumerate(plan.steps, 1) if own == index),
        )
        for index, pattern in enumerate(plan.patterns)
    ]
    return plan.words(), (*(f"units {words}" for words in KINDS.values()), "at steps"), rows
