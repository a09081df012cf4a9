"""From the command line to bundles."""

from __future__ import annotations

from pathlib import Path

from diffpress.export.bundle.manifest import Target


def package_export(export: Path, target: Target, out: Path) -> str:
    """Write a bundle; returns a sentence on it. Raises UserError."""
    from diffpress.export.bundle.write import package

    manifest = package(export, target, out)
    peak = manifest.peak_memory_bytes
    needs = (
        "; not tried here, for it is for another machine"
        if peak is None
        else f"; it needs {peak / 1e6:,.0f} MB of memory"
    )
    return f"{out} is ready for {target.value}: {out.stat().st_size / 1e6:,.1f} MB, {len(manifest.files)} files{needs}"
