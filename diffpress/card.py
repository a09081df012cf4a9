"""The model card of an artifact or export, as the hub reads it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffpress.export.manifest import Manifest
from diffpress.export.portable.manifest import ExportManifest

from .hub import HUB_ID
from .report.formatting import significant

CARRIED = ("license", "license_name", "license_link", "pipeline_tag", "language")
"""What holds of a source and of what is made of it alike."""
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")
"""A hub id in the path of its snapshot."""


def artifact_card(folder: Path, manifest: Manifest) -> str:
    """Of what `compress` made: its figures, its recipe, and how it is loaded."""
    source = base_model(str(manifest.source["model"]))
    formats = Counter(row.format for row in manifest.plan)
    rows = {**_figures(manifest.metrics), "formats": ", ".join(f"{n} x {name}" for name, n in formats.most_common())}
    parts = [
        _head(folder, source),
        f"# {folder.resolve().name}\n\nMade of {_named(source)} by diffpress {manifest.versions.get('diffpress', '')}.",
        _table(rows),
        "```python\nimport diffpress\n\n"
        'pipeline = diffpress.load("FOLDER")  # every digest checked; plain from_pretrained works too\n```',
        f"Recipe:\n\n```yaml\n{yaml.safe_dump(manifest.recipe, sort_keys=False).strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def export_card(folder: Path, manifest: ExportManifest) -> str:
    """Of graphs: how they differ from torch, and how they are run."""
    rows = {
        "graphs": ", ".join(sorted(manifest.components)),
        "format": manifest.format,
        "opset": str(manifest.opset),
        "steps": str(manifest.steps),
        "largest difference from torch": f"{manifest.largest_error:.2g}",
        "size": f"{sum(own.size_bytes for own in manifest.files.values()) / 1e6:.1f} MB",
    }
    parts = [
        _head(folder, None),
        f"# {folder.resolve().name}\n\nA {manifest.pipeline} as ONNX graphs, exported by diffpress.",
        _table(rows),
        "```\ndiffpress run FOLDER --out image.png\n```",
    ]
    return "\n\n".join(parts) + "\n"


def base_model(source: str) -> str:
    """A source by its hub id, or by its name alone: where it lay on the machine that made the artifact is nobody's business."""
    found = CACHED.search(source)
    if found:
        return f"{found[1]}/{found[2]}"
    known = source.startswith("zoo:") or (HUB_ID.fullmatch(source) and not Path(source).exists())
    return source if known else Path(source).name


def _named(source: str) -> str:
    return f"[{source}](https://huggingface.co/{source})" if HUB_ID.fullmatch(source) else source


def _head(folder: Path, source: str | None) -> str:
    """What the hub reads: the licence and the task of the source's own card, and what it was made of."""
    values: dict[str, Any] = {"library_name": "diffusers", "tags": ["diffpress"]}
    card = front_matter(folder / "README.md")
    values |= {name: card[name] for name in CARRIED if name in card}
    licences = sorted(path.name for path in folder.glob("LICENSE*"))
    if "license" not in values and licences:
        values |= {"license": "other", "license_link": licences[0]}
    if source is not None and HUB_ID.fullmatch(source):
        values |= {"base_model": source, "base_model_relation": "quantized"}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def front_matter(card: Path) -> Mapping[str, Any]:
    """What stands between the dashes at the top of a card; empty where there is none that can be read."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        values = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _figures(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Of pairs with the source, and sizes."""
    rows = {}
    if "psnr_db" in metrics:
        count, steps = metrics.get("count"), metrics.get("steps")
        rows["PSNR to the original"] = f"{significant(metrics['psnr_db'])} dB ({count} pairs, {steps} steps)"
    for name, words in (("size_bytes", "denoiser"), ("total_size_bytes", "all files")):
        if name in metrics:
            own, before = metrics[name]["candidate"], metrics[name]["reference"]
            rows[words] = f"{own / 1e6:.1f} MB of {before / 1e6:.1f} MB ({significant(own / before, 2)})"
    return rows


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
