"""The runner's parts alone, built for tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

EDGE = Path(__file__).parents[2] / "edge"


@pytest.fixture(scope="session")
def probe(made_once: Callable[..., Path]) -> Callable[..., bytes]:
    """A function: what edge/tests/probe.cpp prints, given its arguments and standard input."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")

    def build(folder: Path) -> None:
        parts = [EDGE / f"{name}.cpp" for name in ("noise", "tokenizer", "utf8")]
        command = [
            "g++",
            "-std=c++17",
            "-O1",
            "-ffp-contract=off",
            EDGE / "tests/probe.cpp",
            *parts,
            "-o",
            folder / "probe",
        ]
        subprocess.run(command, check=True)

    program = made_once("probe", build) / "probe"

    def ask(*arguments: object, given: bytes = b"") -> bytes:
        command = [str(word) for word in (program, *arguments)]
        return subprocess.run(command, input=given, capture_output=True, check=True).stdout

    return ask
