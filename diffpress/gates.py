"""Limits a result must meet."""

from __future__ import annotations

from typing import Any

from .recipe import GatesSection


def check_gates(gates: GatesSection, metrics: dict[str, Any], cost: dict[str, Any]) -> list[str]:
    """A sentence for each gate that is missed."""
    size = metrics["size_bytes"]["candidate"] / metrics["size_bytes"]["reference"]
    latency = cost["latency_ms"]["ratio"]
    missed = []
    if gates.psnr_db is not None and metrics["psnr_db"] < gates.psnr_db:
        missed.append(f"psnr_db is {metrics['psnr_db']:.2f}, the gate asks for at least {gates.psnr_db}")
    if gates.size is not None and size > gates.size:
        missed.append(f"size is {size:.3f} of the original, the gate allows {gates.size}")
    if gates.latency is not None and latency > gates.latency:
        missed.append(f"latency is over the gate's {gates.latency} of the original")
    return missed
