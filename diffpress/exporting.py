"""From the command line to the exporters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffpress.export.extras import ONNX, import_extra
from diffpress.export.folder import PipelineFolder

from .defaults import default_sampling


def export_to_onnx(source: PipelineFolder, out: Path, notify: Any, force: bool = False) -> dict[str, Any]:
    """Export a pipeline or artifact; returns what was checked. Raises UserError where a package is not installed."""
    for package in ONNX:
        import_extra(package)
    from diffpress.export.onnx.export import export_onnx

    sampling = default_sampling(source)
    manifest = export_onnx(
        source,
        out,
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        force=force,
        progress=lambda done, total: notify("export", done, total),
    )
    return {"out": str(out), **manifest.model_dump(mode="json", include={"opset", "format", "largest_error"})}
