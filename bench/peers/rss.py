"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What `clear_refs` takes to forget the highest value."""


def rss_bytes() -> int:
    return _read("VmRSS")


def peak_rss_bytes() -> int:
    """The highest value since `reset_peak`."""
    return _read("VmHWM")


def reset_peak() -> None:
    CLEAR.write_text(RESET_PEAK)


def _read(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
