"""How much memory a process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CPU = torch.device("cpu")

GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Where both versions of control groups, such as a container's, say their limit, what is used, and what of it is files that
can be dropped."""


def free_bytes(device: torch.device = CPU) -> int:
    """What is free of a GPU's memory, torch's cache counted, or of the machine's and of the container's that we are in."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return min([psutil.virtual_memory().available, *(own for group in GROUPS if (own := _left(*group)) is not None)])


def _left(folder: str, limit: str, used: str, files: str) -> int | None:
    """What a control group leaves; None where it sets no limit, or there is none."""
    try:
        most, now = (int((Path(folder) / name).read_text(encoding="utf-8")) for name in (limit, used))
        lines = (Path(folder) / "memory.stat").read_text(encoding="utf-8").splitlines()
        counts = dict(line.split() for line in lines)
        return max(0, most - now + int(counts.get(files, 0)))
    # No limit is the word `max`.
    except (OSError, ValueError):
        return None
