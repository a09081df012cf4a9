from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from diffpress import flow, measuring
from diffpress.cli import main
from diffpress.export.manifest import REPORT


@pytest.fixture(scope="session", autouse=True)
def measured_little() -> Iterator[None]:
    """How many pairs and timings there are changes none of what is asked here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "MEASURED", 3)
        patch.setattr(measuring, "REPEATS", 1)
        yield


class Outcome(NamedTuple):
    status: int
    output: str
    errors: str


@pytest.fixture
def diffpress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line, run in this process: `diffpress("verify", path)` gives its status and what it printed."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["diffpress", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 0
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err)

    return run


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder` but the report, which holds timings."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != REPORT]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(name="digests")
def digests_fixture() -> Callable[[Path], dict[str, str]]:
    return digests


@pytest.fixture(scope="session")
def quick_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, four trajectories: enough to go the whole way in seconds."""
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    path.write_text(
        "sampling: {steps: 2}\nrecord: {trajectories: 4, batch: 2}\nquantize: {method: ptq, weights: 4, activations: 8}\n"
    )
    return path
