"""From the command line to the exporters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpress.export.extras import ONNX, import_extra
from diffpress.export.folder import PipelineFolder

from .defaults import default_sampling


def export_to(
    source: PipelineFolder, to: str, targets: Sequence[str], out: Path, notify: Any, force: bool = False
) -> dict[str, Any]:
    """Export a pipeline or artifact to `onnx`, `tensorrt` or `tensorrt-rtx`; returns what was checked.

    Raises UserError where a package is not installed, or `targets` do not fit.
    """
    for package in ONNX:
        import_extra(package)
    from diffpress.export.engines.onnxruntime import FOLDED, ONNXRUNTIME
    from diffpress.export.onnx.export import as_it_is, export_onnx

    from .exporting_tensorrt import check_tensorrt, finish_tensorrt

    check_tensorrt(to, targets)
    sampling = default_sampling(source)
    manifest = export_onnx(
        source,
        out,
        engine=ONNXRUNTIME if to == "onnx" else FOLDED,
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        force=force,
        progress=lambda done, total: notify("export", done, total),
        finish=as_it_is if to == "onnx" else finish_tensorrt(targets, lambda d, t: notify("build", d, t)),
    )
    engines = {
        own.component: {"targets": own.targets, "layers": own.layers, "low_bits_share": own.low_bits_share}
        for own in manifest.engines
    }
    summary = manifest.model_dump(mode="json", include={"opset", "format", "largest_error"})
    return {"out": str(out), **summary, **({"engines": engines} if engines else {})}
