"""Where and of what a number was taken."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

TELLING = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
"""Instructions that decide which product is fast; two processors of one name may differ in them."""


def machine() -> dict[str, str | int]:
    """Processor, threads, versions and commit."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "processor": names[0] if names else platform.processor(),
        "instructions": " ".join(name for name in TELLING if name in flags),
        "cores": len(names),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit,
    }
