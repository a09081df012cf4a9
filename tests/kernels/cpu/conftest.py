"""What tests of the CPU's kernels share: tiers of this processor, and in the long run those that others have."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

from diffpress.kernels.cpu import library
from diffpress.kernels.cpu.attention import _Attention
from diffpress.kernels.cpu.layer import TYPES
from diffpress.kernels.cpu.library import CHOICE as TIER
from diffpress.kernels.cpu.library import ONEDNN, built_tiers, processor_tiers
from diffpress.kernels.library import CHOICE

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "kernels" / "cpu"
SOURCES = Path(__file__).parent / "emulated"
TIERS = [tier for tier in processor_tiers() if tier != ONEDNN and tier in built_tiers()]
ARM = {"emulated-i8mm": "max", "emulated-neondot": "cortex-a76", "emulated-neon": "cortex-a53"}
"""Tiers of aarch64, and the processor that the emulator is to be: the fastest tier of that is this one."""
X86 = ("emulated-avx512vnni", "emulated-avxvnni")
"""Tiers of x86, whose instructions are functions for AVX2."""
EMULATED = [pytest.param(tier, marks=pytest.mark.long) for tier in (*ARM, *X86)]
BYTES = {number: dtype.itemsize for dtype, number in TYPES.items()}
Made = Callable[[str, Callable[[Path], None]], Path]
Emulator = Callable[[str, str], "Emulated"]


@pytest.fixture(autouse=True, params=[*(TIERS or [None]), *EMULATED], ids=str)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, references_answer: None) -> str | None:
    """Operations are their kernels again, of every tier that the processor has or that can be emulated."""
    monkeypatch.delenv(CHOICE)
    if request.param:
        monkeypatch.setenv(TIER, request.param)
    if request.param in (*ARM, *X86):
        loaded = request.getfixturevalue("emulated_tier")(request.param)
        for function in ("processor_tiers", "built_tiers"):
            monkeypatch.setattr(library, function, lambda: (request.param,))
        monkeypatch.setattr(library, "_loaded", lambda name: loaded)
    return request.param


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Alone, and with others."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def emulated_tier(made_once: Made, aarch64: Emulator) -> Callable[[str], ctypes.CDLL | Emulated]:
    """A function: the library of an emulated tier, opened once."""

    @cache
    def opened(tier: str) -> ctypes.CDLL | Emulated:
        name = tier.removeprefix("emulated-")
        if tier in ARM:
            return aarch64(ARM[tier], f"diffpress_cpu_{name}.so")
        return library.open_library(made_once(name, lambda folder: build_for_avx2(name, folder)) / "tier.so")

    return opened


@pytest.fixture(scope="session")
def aarch64(made_once: Made) -> Iterator[Emulator]:
    """A function: a library for aarch64 as it ships, on an emulated processor."""
    running: list[Emulated] = []

    def start(processor: str, name: str) -> Emulated:
        need("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64")
        folder = made_once("aarch64", build_for_aarch64)
        command = ("qemu-aarch64", "-cpu", processor, "-L", "/usr/aarch64-linux-gnu", folder / "driver", folder / name)
        running.append(Emulated(*map(str, command)))
        return running[-1]

    yield start
    for emulated in running:
        emulated.end()


def need(*tools: str) -> None:
    """Skip a test for which one of them is missing."""
    absent = [tool for tool in tools if not shutil.which(tool)]
    if absent:
        pytest.skip(f"needs {', '.join(absent)}: apt-get install cmake g++ g++-aarch64-linux-gnu qemu-user")


def run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def build_for_aarch64(folder: Path) -> None:
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={KERNELS / 'aarch64.cmake'}"
    run("cmake", "-S", ROOT, "-B", folder, toolchain, "-DCMAKE_BUILD_TYPE=Release", "-DDIFFPRESS_RUNNER=OFF")
    run("cmake", "--build", folder)
    run("aarch64-linux-gnu-g++", "-O2", SOURCES / "driver.cpp", "-o", folder / "driver")


def build_for_avx2(tier: str, folder: Path) -> None:
    """A tier's sources, with functions in the place of instructions that AVX2 lacks."""
    need("g++")
    if "avx2" not in processor_tiers():
        pytest.skip("the processor has no AVX2")
    shared = sorted(file for file in KERNELS.glob("*.cpp") if not file.name.startswith("tiers_"))
    define = (f"-DDIFFPRESS_TIER={tier}", f'-DDIFFPRESS_TIER_HEADER="tiers/{tier}.h"')
    flags = ("-std=c++17", "-O3", "-ffp-contract=off", "-mavx2", "-mfma", "-mf16c", "-Wno-psabi", "-fopenmp")
    files = (*shared, KERNELS / "tiers" / "dot.cpp", "-o", folder / "tier.so")
    run("g++", "-shared", "-fPIC", *flags, *define, "-I", SOURCES, *files)


class Emulated:
    """A tier's library in a process of another processor, which has copies of what its functions read and write."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._released: list[int] = []

    def call(self, name: str, *arguments: int, given: bytes = b"", size: int = 0) -> tuple[int, bytes]:
        """What function `name` answers to at most nine numbers, and bytes that it wrote to the caller."""
        request = struct.pack("32s9q", name.encode(), *arguments, *(9 - len(arguments)) * [0])
        self._process.stdin.write(request + given)
        self._process.stdin.flush()
        answer = self._process.stdout.read(size + 8)
        assert len(answer) == size + 8, f"the emulator ended in {name}"
        return struct.unpack("q", answer[size:])[0], answer[:size]

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    @contextmanager
    def _memory(self) -> Iterator[Callable[[int | None, int], int]]:
        """A function: the address there of a copy of some bytes here, until the context is left."""
        made: list[int] = []

        def copy(address: int | None, size: int) -> int:
            if address is None:
                return 0
            made.append(self.call("malloc", max(size, 1))[0])
            self.call("write", made[-1], size, given=ctypes.string_at(address, size))
            return made[-1]

        yield copy
        for address in made:
            self.call("free", address)

    def _read(self, source: int, target: int, size: int) -> None:
        ctypes.memmove(target, self.call("read", source, size, size=size)[1], size)

    def diffpress_pack(self, codes: int, outputs: int, channels: int, taps: int) -> int:
        while self._released:
            self.call("diffpress_release", self._released.pop())
        with self._memory() as copy:
            return self.call("diffpress_pack", copy(codes, outputs * channels * taps), outputs, channels, taps)[0]

    def diffpress_release(self, panels: int) -> None:
        """Before the next are packed: memory is collected at any time, and also in the midst of a call."""
        self._released.append(panels)

    def diffpress_bytes(self, panels: int) -> int:
        return self.call("diffpress_bytes", panels)[0]

    def diffpress_layer(self, form: ctypes.Array[ctypes.c_int64], x: int, panels: int, *rest: int | None) -> bool:
        (x_type, output_type), sizes, strides = form[:2], form[2:6], form[6:10]
        outputs, height, width, scale_a_row = *form[10:13], form[-2]
        rows = sizes[0] * height * width
        counts = (outputs, rows if scale_a_row else 1, 1, outputs, rows * outputs)
        written = rows * outputs * BYTES[output_type]
        with self._memory() as copy:
            read = [copy(address, 4 * count) for address, count in zip(rest[:-1], counts, strict=True)]
            output = copy(rest[-1], written)
            x = copy(x, extent(sizes, strides) * BYTES[x_type])
            form_there = copy(ctypes.addressof(form), ctypes.sizeof(form))
            done, _ = self.call("diffpress_layer", form_there, x, panels, *read, output)
            self._read(output, rest[-1], written)
        return bool(done & 1)

    def diffpress_attention(self, address: int) -> None:
        a = _Attention.from_address(address)
        there, item = _Attention.from_buffer_copy(a), BYTES[a.type]
        written = a.batch * a.heads * a.queries * a.columns * item
        with self._memory() as copy:
            for name, tokens in (("q", a.queries), ("k", a.keys), ("v", a.keys)):
                strides = (*getattr(a, f"{name}_stride"), 1)
                count = extent((a.batch, a.heads, tokens, a.columns), strides)
                setattr(there, name, copy(getattr(a, name), count * item))
            there.k_mean = copy(a.k_mean, 4 * a.batch * a.heads * a.columns)
            there.output = output = copy(a.output, written)
            self.call("diffpress_attention", copy(ctypes.addressof(there), ctypes.sizeof(there)))
            self._read(output, a.output, written)


def extent(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from a tensor's first to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) if all(sizes) else 0
