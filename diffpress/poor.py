"""Whether a result is poor, which layers it is told by, and what to try: said before anything else is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

from diffpress.export.manifest import Manifest, PlanRow

POOR_PSNR_DB = 25.0
"""Below it images differ at a glance; it is what gates ask for."""
LARGE_ERROR = 1e-2
"""Of a layer alone, relative and squared: it moves the denoiser's output by a tenth of its size at every step."""
NAMED = 3
"""Layers that are named, the worst first."""
FLOAT_SHARE = 0.2
"""Of the multiplications: at W4A4 inputs in float are worth more than anything else that was tried, at W8A8 what `balanced`
has is a quarter of it."""


@dataclass(frozen=True)
class Poor:
    """What is wrong with a result."""

    psnr_db: float
    layers: dict[str, float]
    """Those that err most, by `COMPONENT.MODULE`, with the relative squared error of the denoiser's output by them alone."""
    advice: str

    def sentence(self) -> str:
        """What to say of it, without the last dot."""
        images = f"{self.psnr_db:.1f} dB from the original"
        head = (
            f"Poor: {images}, less than {POOR_PSNR_DB:g}" if self.psnr_db < POOR_PSNR_DB else f"Uneven: {images}, but"
        )
        words = ", ".join(f"{name} ({100 * sqrt(error):.2g} %)" for name, error in self.layers.items())
        worst = "; most moved by" if self.psnr_db < POOR_PSNR_DB else " the denoiser's output is moved by"
        return f"{head}{f'{worst} {words}' if words else ''}. {self.advice}"

    def data(self) -> dict[str, Any]:
        """The same for `--json`."""
        return asdict(self)


def poor_of(manifest: Manifest, metrics: Mapping[str, Any]) -> Poor | None:
    """What `metrics` measured of an artifact; None of a result that is good."""
    rows = sorted((row for row in manifest.plan if row.error is not None), key=_error, reverse=True)
    psnr_db = float(metrics["psnr_db"])
    large = [row for row in rows if _error(row) > LARGE_ERROR]
    if psnr_db >= POOR_PSNR_DB and not large:
        return None
    named = rows[:NAMED] if psnr_db < POOR_PSNR_DB else large[:NAMED]
    layers = {f"{row.component}.{row.module}": _error(row) for row in named}
    return Poor(psnr_db, layers, _advice(manifest.recipe, large))


def _error(row: PlanRow) -> float:
    return row.error or 0.0


def _advice(recipe: Mapping[str, Any], large: Sequence[PlanRow]) -> str:
    """What helped other models, for what loses most: rounding where layers err much, else what is not computed at all."""
    steps, prune = recipe.get("steps") or {}, recipe.get("prune") or {}
    if large or not (steps or prune):
        return _about_rounding(recipe.get("quantize") or {}, large)
    if steps:
        return f"Try less of steps.speedup, which is {steps['speedup']:g}"
    return f"Try less of prune.remove, which is {prune['remove']:g}" if "remove" in prune else "Leave prune out"


def _about_rounding(quantize: Mapping[str, Any], large: Sequence[PlanRow]) -> str:
    activations, weights = quantize.get("activations", "none"), quantize.get("weights", 8)
    if activations != "none" and activations < 8:
        return f"Try --set quantize.activations=8: inputs in {activations} bits lose most"
    if activations != "none" and quantize.get("float_activations", 0) < FLOAT_SHARE:
        return f"Try --set quantize.float_activations={FLOAT_SHARE:g}, which leaves the inputs of the worst layers in float"
    if weights < 8:
        return f"Try --set quantize.weights={2 * weights if weights > 2 else 4}, or the method qalora"
    if activations != "none":
        return "Try --set quantize.activations=none, which rounds weights alone"
    names = ", ".join(row.module for row in large[:NAMED])
    return (
        f"Try --set quantize.keep=[{names}], which leaves them as they are"
        if names
        else "Try more of record.trajectories"
    )
