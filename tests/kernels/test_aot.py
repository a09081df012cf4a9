"""Kernels are compiled for GPUs that are not here, in a process of its own where Triton does not interpret."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "aot.py"


TARGETS = {"sm_90": ("IGMMA", "IMMA"), "gfx942": ("v_mfma_i32", "v_smfma_i32")}
"""How products of bytes begin there."""


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """The rows of the benchmark, which has to end well."""
    command = [sys.executable, BENCH, "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rows"]


def test_the_products_run_on_tensor_cores() -> None:
    rows = compiled("--kernels", "quantized_conv2d", "--targets", *TARGETS)
    assert {row["target"] for row in rows} == {"sm_90", "gfx942"}
    for target, names in TARGETS.items():
        products = [row for row in rows if row["target"] == target and row["form"].startswith("3x3")]
        assert len(products) == 2
        assert all(row["instruction"].startswith(names) for row in products)
    assert all(row["spills"] == 0 and row["registers"] > 0 for row in rows)


@pytest.mark.long
def test_every_kernel_keeps_within_the_limits_of_every_target() -> None:
    assert len(compiled()) > 300
