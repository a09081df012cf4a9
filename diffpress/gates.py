"""Limits a result must meet."""

from __future__ import annotations

from typing import Any

from .recipe import GatesSection


def check_gates(gates: GatesSection, metrics: dict[str, Any], cost: dict[str, Any]) -> list[str]:
    """A sentence for each gate that is missed."""
    size = metrics["size_bytes"]["candidate"] / metrics["size_bytes"]["reference"]
    missed = []
    if gates.psnr_db is not None and metrics["psnr_db"] < gates.psnr_db:
        missed.append(f"PSNR is {metrics['psnr_db']:.2f} dB, the gate psnr_db asks for at least {gates.psnr_db:g}")
    if gates.size is not None and size > gates.size:
        missed.append(f"the denoiser is {size:.3f} of its size, the gate size allows {gates.size:g}")
    # The ratio itself differs from run to run and must not get into the artifact.
    if gates.latency is not None and cost["latency_ms"]["ratio"] > gates.latency:
        missed.append(
            f"an image takes longer than the {gates.latency:g} of the original's time that the gate latency allows"
        )
    return missed
