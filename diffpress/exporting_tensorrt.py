"""What an export for TensorRT has beside its graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from diffpress.calibration.trajectory import Progress
from diffpress.export.engines.tensorrt_rtx import build_engine, check_targets, version
from diffpress.export.errors import UserError
from diffpress.export.onnx.trtexec import SCRIPT, write_script
from diffpress.export.portable.manifest import SCHEMA, BuiltEngine, ExportManifest

AHEAD = "tensorrt-rtx"


def check_tensorrt(to: str, targets: Sequence[str]) -> None:
    """Raises UserError where `targets` do not fit what is exported `to`, or the builder is not installed."""
    if to == AHEAD:
        check_targets(targets)
        version()
    elif targets:
        raise UserError(
            f"--target {','.join(targets)}: engines are built ahead by --to {AHEAD} alone; with --to tensorrt, {SCRIPT} in the "
            "export builds them on the machine that will run them. Leave --target out."
        )


def finish_tensorrt(targets: Sequence[str], progress: Progress) -> Callable[[Path, ExportManifest], ExportManifest]:
    """What is done to an export: its engines are built for `targets`, or where there are none a script is added."""

    def finish(folder: Path, manifest: ExportManifest) -> ExportManifest:
        if not targets:
            write_script(folder, manifest)
            return manifest
        built = []
        for done, (name, graph) in enumerate(manifest.components.items()):
            progress(done, len(manifest.components))
            file, layers = build_engine(folder / graph.file, targets)
            builder = f"{AHEAD} {version()}"
            built.append(BuiltEngine(component=name, file=file, builder=builder, targets=tuple(targets), layers=layers))
        progress(len(built), len(built))
        return manifest.model_copy(update={"engines": tuple(built), "schema_version": SCHEMA})

    return finish
