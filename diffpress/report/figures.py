"""What was measured, as the page says it: ratios in large type, absolutes beneath, and the cost table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .formatting import IDENTICAL_DB, TIMES, byte_size, change, decibels, milliseconds, quantity, significant


@dataclass(frozen=True)
class Measure:
    """One quantity of both pipelines."""

    label: str
    reference: str
    candidate: str
    ratio: float


@dataclass(frozen=True)
class Tile:
    """One big figure: `value` in large type, `unit` beside it, `detail` beneath."""

    label: str
    value: str
    unit: str
    detail: str
    tone: str = ""
    """`good`, `bad`, `absent` or nothing."""


LABELS: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("Parameters of the denoiser", quantity),
    "macs_per_image": ("Multiply-accumulates per image", quantity),
    "latency_ms": ("Latency per image, median", milliseconds),
    "peak_memory_bytes": ("Peak memory of tensors", byte_size),
    "size_bytes": ("Denoiser, stored", byte_size),
    "total_size_bytes": ("Whole folder", byte_size),
}

TILES = (
    ("size_bytes", "Denoiser", "smaller", "larger"),
    ("total_size_bytes", "Whole folder", "smaller", "larger"),
    ("latency_ms", "Latency", "faster", "slower"),
    ("peak_memory_bytes", "Peak memory", "less", "more"),
    ("macs_per_image", "Multiply-accumulates", "fewer", "more"),
)


def measures(metrics: Mapping[str, Any], cost: Mapping[str, Any]) -> dict[str, Measure]:
    """Everything that both pipelines have a figure for, in the order of the cost table."""
    known = {**metrics, **cost}
    return {key: _measure(*LABELS[key], known[key]) for key in LABELS if key in known}


def tiles(measured: Mapping[str, Measure], metrics: Mapping[str, Any], psnr_db: list[float]) -> list[Tile]:
    """The row of big figures, gates not among them."""
    changes = [_change_tile(label, measured.get(key), less, more) for key, label, less, more in TILES]
    return [*changes[:2], _psnr_tile(metrics, psnr_db), _ssim_tile(metrics), *changes[2:]]


def gates_tile(gates: Mapping[str, Any], missed: list[str]) -> Tile:
    """Whether the limits of the recipe were met."""
    asked = gates_asked(gates)
    if not asked and not missed:
        return Tile("Gates", "none", "", "the recipe sets no limits", "absent")
    count = max(len(asked), len(missed))
    if missed:
        return Tile("Gates", f"{len(missed)} of {count}", "missed", "; ".join(asked), "bad")
    return Tile("Gates", f"{count} of {count}", "met", "; ".join(asked), "good")


def pairs_tile(metrics: Mapping[str, Any]) -> Tile:
    """What takes the place of the gates in a comparison."""
    return Tile("Pairs", str(metrics["count"]), "", f"of {metrics['steps']} steps each")


def gates_asked(gates: Mapping[str, Any]) -> list[str]:
    """The limits that were set, in words."""
    words = {
        "psnr_db": ("PSNR at least", " dB"),
        "size": ("size at most", TIMES),
        "latency": ("latency at most", TIMES),
    }
    return [f"{start} {gates[key]:g}{unit}" for key, (start, unit) in words.items() if gates.get(key) is not None]


def _measure(label: str, words: Callable[[float], str], both: Mapping[str, float]) -> Measure:
    reference, candidate = both["reference"], both["candidate"]
    ratio = both.get("ratio", candidate / reference if reference else math.nan)
    return Measure(label, words(reference), words(candidate), ratio)


def _change_tile(label: str, measure: Measure | None, less: str, more: str) -> Tile:
    if measure is None:
        return Tile(label, "—", "", "not measured", "absent")
    value, unit = change(measure.ratio, less, more)
    tone = {less: "good", more: "bad"}.get(unit, "")
    equal = measure.reference == measure.candidate
    detail = f"{measure.reference} each" if equal else f"{measure.reference} → {measure.candidate}"
    return Tile(label, value, unit, detail, tone)


def _psnr_tile(metrics: Mapping[str, Any], psnr_db: list[float]) -> Tile:
    if min(psnr_db) >= IDENTICAL_DB:
        return Tile("PSNR", "equal", "", "no difference in any pair", "good")
    return Tile("PSNR", decibels(metrics["psnr_db"]), "dB", f"mean; worst pair {decibels(min(psnr_db))} dB")


def _ssim_tile(metrics: Mapping[str, Any]) -> Tile:
    latent = f"latent error {significant(metrics['latent_mse'], 2)}" if "latent_mse" in metrics else ""
    return Tile("SSIM", f"{metrics['ssim']:.3f}", "", f"1 is identical; {latent}" if latent else "1 is identical")
