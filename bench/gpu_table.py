"""The table of `results/gpu_kernels.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HALF = ("torch", "cuDNN channels last", "SDPA")
"""What floats of 16 bits are computed with."""
CODES = ("quantize_rows", "norm_modulate_quantize", "group_norm_silu_quantize")
"""Operations beside which nothing is computed in floats of 16 bits, but the same in torch."""
HEADER = ("operation", "form", "model", "shape", "µs", "share of roofline", "torch, 16 bits, µs", "others, µs")


def lines(results: Mapping[str, Any]) -> list[Sequence[str]]:
    """A line for every row that was timed, by operation."""
    return [_line(row) for row in sorted(results["rows"], key=lambda row: row["op"])]


def _line(row: Mapping[str, Any]) -> Sequence[str]:
    timed = {name: other["us"] for name, other in row["baselines"].items() if "us" in other}
    half = next((f"{timed[name]:.0f}" for name in HALF if name in timed and row["op"] not in CODES), "")
    others = [f"{name} {us:.0f}" for name, us in timed.items() if name not in HALF or row["op"] in CODES]
    names = (f"`{row['op']}`", row["form"], row["model"], row["shape"])
    return *names, f"{row['us']:.0f}", f"{row['share_of_roofline']:.2f}", half, ", ".join(others)
