"""Which implementation the operations choose on a machine, and what that machine is."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

from .cpu import tier, why_no_library
from .library import CHOICE, only_reference


def answering_kernels(device: str) -> str:
    """Which implementation the operations choose on a type of device."""
    if only_reference():
        return f"reference ({CHOICE})"
    reason = why_no_library() if device == "cpu" else None
    return f"reference ({reason})" if reason else f"C++ for {tier()}" if device == "cpu" else "Triton"


def machine_words(device: str = "cpu") -> str:
    """What times of a device depend on: `AMD EPYC 7B13, 2 threads, C++ for avx2`, or a GPU's name and `Triton`."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        return f"{torch.cuda.get_device_name(chosen)}, {answering_kernels(chosen.type)}"
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' * (threads != 1)}, {answering_kernels(chosen.type)}"


@cache
def processor_name() -> str:
    """As the system calls it; its architecture where it has no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
