"""Every operation on fresh random inputs against its reference: `python bench/gpu/correctness.py DIR`, a part of `gpu.sh`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import diffpress.kernels  # noqa: F401 - registers the operations

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from inputs import Source, arguments
from rows import Row, main
from shapes import Spec, specs
from tolerance import verdict


def implementation(op: str, device: str) -> Callable[..., Any]:
    """What runs there: the operation as torch dispatches it, and without a GPU the Triton kernel by itself."""
    module = f"diffpress.kernels.{op}.triton_kernel"
    if device == "cuda" or find_spec(module) is None:
        return getattr(torch.ops.diffpress, op)
    return import_module(module).launch


def check(spec: Spec, seed: int, device: str = "cuda") -> dict[str, Any]:
    """One row: how far the operation lies from its reference."""
    given = arguments(spec, Source(seed, device, getattr(torch, spec.dtype)))
    return verdict(spec.op, given, implementation(spec.op, device)(**given))


def rows(seed: int) -> Iterator[Row]:
    """All there are; the truth is not to be in TensorFloat-32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for spec in specs():
        yield Row(spec.names(), partial(check, spec, seed))


if __name__ == "__main__":
    raise SystemExit(main(__doc__, "correctness.json", rows, lambda row: row.get("passed", False)))
