"""From the command line to the exporters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffpress.export.artifact import is_artifact
from diffpress.export.errors import UserError
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import check_files, read_manifest

from .opening import default_sampling


def export_to_onnx(source: PipelineFolder, out: Path, notify: Any) -> dict[str, Any]:
    """Export a pipeline or artifact; returns what was checked. Raises UserError where the extra is not installed."""
    try:
        from diffpress.export.onnx.export import export_onnx
    except ImportError as error:
        raise UserError(f"exporting to ONNX needs {error.name}: pip install 'diffpress[onnx]'") from error
    if is_artifact(source.path):
        check_files(source.path, read_manifest(source.path).files)
    else:
        source.check()
    sampling = default_sampling(source)
    manifest = export_onnx(
        source,
        out,
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        progress=lambda done, total: notify("export", done, total),
    )
    return {"out": str(out), **manifest.model_dump(mode="json", include={"opset", "format", "largest_error"})}
