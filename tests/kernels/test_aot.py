"""Kernels are compiled for GPUs that are not here, in a process of its own where Triton does not interpret."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "aot.py"


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """The rows of the benchmark, which has to end well."""
    command = [sys.executable, BENCH, "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rows"]


def test_the_products_run_on_tensor_cores() -> None:
    rows = compiled("--kernels", "integer_linear", "--targets", "sm_90", "gfx942")
    assert {row["target"] for row in rows} == {"sm_90", "gfx942"}
    assert all(
        "IGMMA" in row["instruction"] or "IMMA" in row["instruction"] for row in rows if row["target"] == "sm_90"
    )
    assert all("mfma_i32" in row["instruction"] for row in rows if row["target"] == "gfx942")
    assert all(row["spills"] == 0 and row["registers"] > 0 for row in rows)


@pytest.mark.long
def test_every_kernel_keeps_within_the_limits_of_every_target() -> None:
    assert len(compiled()) > 300
