"""Gather what was found and write it as one HTML file that needs nothing beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined

from diffpress.export.manifest import Manifest

from ..pairs import Pairs
from ..poor import poor_of
from .charts import histogram, step_curve
from .figures import Measure, gates_tile, measures, pairs_tile, tiles
from .formatting import byte_size, decibels, measured_words, significant
from .images import gallery
from .learning import learning
from .plan import explained, lines, saving, sensitivity, summary, totals, whole
from .pruning import is_structure, pruning
from .steps import step_plan

if TYPE_CHECKING:
    from ..speed import Speed

SHOWN_AS = {
    "image": "",
    "video": "Videos are shown as some of their frames, beside each other in their order.",
    "audio": "Sounds are shown as spectrograms: time to the right, pitch upwards, brighter is louder.",
    "array": "Arrays are shown from their lowest value, black, to their highest, white.",
}
"""How what is no image is shown."""
UNMEASURED = {
    "parameters": "parameters",
    "macs_per_image": "multiply-accumulates",
    "latency_ms": "latency",
    "peak_memory_bytes": "peak memory",
}
"""What the cost section says of figures that it was not given."""


def write_report(
    path: Path,
    model: str,
    manifest: Manifest | None,
    pairs: Pairs,
    metrics: dict[str, Any],
    cost: dict[str, Any],
    speed: Speed | None = None,
) -> None:
    """Write the report to `path`.

    It is titled as a comparison unless `metrics` says which gates were missed; without a manifest it has no plan.
    Figures that `cost` lacks are said not to be measured; `speed` says what they mean.
    """
    page = _environment().get_template("report.html.j2")
    text = page.render(
        **_shared(model, manifest, pairs, metrics, cost),
        **_status(manifest, metrics),
        speed=speed,
        poor=poor_of(manifest, metrics) if manifest is not None and "gates_missed" in metrics else None,
        artifact=None if manifest is None else _artifact(manifest, measures(metrics, cost), speed),
    )
    # The name of a folder need not be UTF-8; what is no text in it becomes a question mark.
    path.write_text(text, encoding="utf-8", errors="replace")


def _environment() -> Environment:
    folder = files(__package__)
    environment = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": byte_size, "decibels": decibels, "significant": significant}
    return environment


def _shared(
    model: str, manifest: Manifest | None, pairs: Pairs, metrics: dict[str, Any], cost: dict[str, Any]
) -> dict[str, Any]:
    measured = measures(metrics, cost)
    return {
        "model": model,
        "count": len(pairs.psnr_db),
        "steps": pairs.steps,
        "seeds": (pairs.conditions[0].seed, pairs.conditions[-1].seed),
        "tiles": tiles(measured, metrics, pairs.psnr_db),
        "gallery": gallery(pairs),
        "shown": SHOWN_AS[pairs.kind],
        "told": measured_words(pairs.metrics()),
        "spread": histogram(pairs.psnr_db),
        "psnr": _psnr_words(pairs.psnr_db),
        "measured": list(measured.values()),
        "unmeasured": [words for key, words in UNMEASURED.items() if key not in measured],
        "timed": "latency_ms" in measured,
        "curve": step_curve(pairs.step_error, manifest.timesteps if manifest else []),
    }


def _psnr_words(psnr_db: list[float]) -> list[tuple[str, str]]:
    named: dict[str, Callable[[list[float]], float]] = {
        "worst": min,
        "median": statistics.median,
        "mean": statistics.fmean,
        "best": max,
    }
    return [(name, decibels(of(psnr_db))) for name, of in named.items()]


def _status(manifest: Manifest | None, metrics: dict[str, Any]) -> dict[str, Any]:
    """Gates stand only beside the run that checked them: a later comparison may have another reference."""
    if manifest is None or "gates_missed" not in metrics:
        return {
            "comparison": True,
            "sides": ("reference", "candidate"),
            "status": pairs_tile(metrics),
            "missed": [],
        }
    missed = metrics["gates_missed"]
    return {
        "comparison": False,
        "sides": ("original", "compressed"),
        "status": gates_tile(manifest.recipe.get("gates") or {}, missed),
        "missed": missed,
    }


def _artifact(manifest: Manifest, measured: Mapping[str, Measure], speed: Speed | None) -> dict[str, Any]:
    plan = explained(manifest.plan, speed.expansion) if speed else manifest.plan
    weighted = [row for row in plan if not is_structure(row)]
    parts = totals(weighted)
    return {
        "summary": summary(manifest.plan),
        "pruning": pruning(manifest.plan, measured),
        "steps": step_plan(manifest),
        "sensitivity": sensitivity(weighted),
        "learning": learning([row for row in manifest.learning if "iteration" in row]),
        "plan": lines(weighted),
        "totals": [(part, saving(part)) for part in [*parts, whole(parts)]],
        "recipe": yaml.safe_dump(manifest.recipe, sort_keys=False, allow_unicode=True),
        "versions": manifest.versions,
        "digests": manifest.source.get("files", {}),
        "fingerprint": manifest.fingerprint,
    }
