"""Every Triton kernel compiled for every target, without a GPU: `python bench/aot.py --json`.

Registers, spills (none are allowed), shared memory against the target's limit, and the tensor-core instruction that was found
in the machine code. Ends with 1 where a kernel breaks a limit or falls off the tensor cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

# Kernels that are interpreted are not compiled.
os.environ.pop("TRITON_INTERPRET", None)
# Said in words because Triton 3.10 turns its default around.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton

import diffpress.kernels
from diffpress.kernels.aot import TARGETS, Form, compile_for

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine

KERNELS = sorted(path.parent.name for path in Path(diffpress.kernels.__file__).parent.glob("*/triton_kernel.py"))


def compilations(kernel: str, targets: Sequence[str]) -> Iterator[tuple[Form, str]]:
    """Every form of a kernel for every target that can run it; what only calls other kernels has none."""
    for form in getattr(import_module(f"diffpress.kernels.{kernel}.triton_kernel"), "forms", list)():
        for target in targets:
            if form.targets is None or target in form.targets:
                yield form, target


def check(form: Form, target: str) -> dict[str, Any]:
    """One row: what came out, and what is wrong with it."""
    row: dict[str, Any] = {"form": form.name, "target": target}
    try:
        made = compile_for(form, TARGETS[target])
    except Exception as error:  # whatever a compiler may raise is a result here
        return {**row, "faults": [f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"]}
    faults = []
    if made.spills:
        faults.append(f"{made.spills} spills")
    if made.shared > TARGETS[target].shared:
        faults.append(f"{made.shared} bytes of shared memory, {TARGETS[target].shared} allowed")
    if form.cores and made.instruction is None:
        faults.append(f"no {form.cores} tensor-core instruction")
    return {**row, **made._asdict(), "faults": faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.kernels:
        for form, target in compilations(name, arguments.targets):
            row = {"kernel": name, **check(form, target)}
            rows.append(row)
            words = ", ".join(row["faults"]) or f"{row['registers']} registers, {row['instruction']}"
            print(f"{name} {form.name} {target}: {words}", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps({"machine": machine(), "triton": triton.__version__, "rows": rows}, indent=1))
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
