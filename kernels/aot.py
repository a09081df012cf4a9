"""Compile Triton kernels for GPUs that are not here, and read what came out of it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Form(NamedTuple):
    """One way in which a kernel is compiled."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    """Of every argument that is not a constant, in Triton's words: `*i8` points to int8, `i32` is a size."""
    constants: Mapping[str, Any]
    warps: int
    stages: int
    cores: str | None
    """What has to run on tensor cores: `int8`, `half` or `fp8`; None where nothing does."""
    targets: tuple[str, ...] | None = None
    """The names of the only TARGETS that can run it; None: all can."""


class Target(NamedTuple):
    """A GPU, and what a kernel may use of it."""

    gpu: GPUTarget
    shared: int
    """Bytes of shared memory that one program may take."""


class Compiled(NamedTuple):
    """What the compiler made of a form."""

    registers: int
    spills: int
    """Loads and stores of registers that did not fit."""
    shared: int
    """Bytes."""
    instruction: str | None
    """The tensor-core instruction that was found."""


KILOBYTE = 1024
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KILOBYTE),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99 * KILOBYTE),
    "sm_87": Target(GPUTarget("cuda", 87, 32), 163 * KILOBYTE),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 * KILOBYTE),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KILOBYTE),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KILOBYTE),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * KILOBYTE),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KILOBYTE),
}
"""A100, 30 series, Orin, 40 series, H100 and H200, B200, 50 series, MI300; limits from the vendors' programming guides."""
INSTRUCTIONS = {
    "int8": r"\b(?:IMMA|IGMMA|UTCIMMA|v_s?mfma_i32_\w+i8)\b[\w.]*",
    "half": r"\b(?:HMMA|HGMMA|UTCHMMA|v_mfma_f32_\w+(?:b?f16))\b[\w.]*",
    "fp8": r"\b(?:QMMA|QGMMA|UTCQMMA|v_mfma_f32_\w+fp8\w*)\b[\w.]*",
}
"""Names of tensor-core instructions in the machine code of each vendor."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_for(form: Form, target: Target) -> Compiled:
    """Compile without the GPU. Raises whatever Triton raises where it can not."""
    names = form.kernel.arg_names
    source = ASTSource(
        fn=form.kernel,
        signature={name: form.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in form.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in form.types},
    )
    made = triton.compile(source, target=target.gpu, options={"num_warps": form.warps, "num_stages": form.stages})
    if target.gpu.backend == "hip":
        return _of_amd(made.asm["amdgcn"], made.metadata.shared, form.cores)
    return _of_nvidia(made.asm["cubin"], made.metadata.shared, form.cores)


def _of_nvidia(binary: bytes, shared: int, cores: str | None) -> Compiled:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        usage = _run("cuobjdump", "--dump-resource-usage", file)
        code = _run("nvdisasm", "-c", file)
    registers = max(map(int, re.findall(r"\bREG:(\d+)", usage)))
    return Compiled(registers, len(re.findall(r"\b(?:LDL|STL)\b", code)), shared, _instruction(code, cores))


def _of_amd(code: str, shared: int, cores: str | None) -> Compiled:
    registers, spills = (
        max(map(int, re.findall(rf"\.{key}:\s+(\d+)", code))) for key in ("vgpr_count", "vgpr_spill_count")
    )
    return Compiled(registers, spills, shared, _instruction(code, cores))


def _instruction(code: str, cores: str | None) -> str | None:
    found = re.search(INSTRUCTIONS[cores], code) if cores else None
    return found.group() if found else None


def _run(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
