"""Where a `compress` keeps what it has done so far: a hidden folder beside `--out`, gone when the artifact is in place."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffpress.compress.stage_folder import StageFolder
from diffpress.export.publishing import locked
from diffpress.kernels.answering import answering_kernels

from .stopping import kept_in


@dataclass(frozen=True)
class Work:
    """One request's folder; a different request given for the same `--out` starts anew."""

    folder: Path

    @property
    def recorded(self) -> Path:
        return self.folder / "recorded"

    @property
    def staged(self) -> Path:
        return self.folder / "staged"

    def stage(self, name: str, component: str) -> StageFolder:
        """Of one stage on one component."""
        return StageFolder(self.folder / name / component)

    @property
    def exported(self) -> Path:
        return self.folder / "exported"


def fingerprint(request: dict[str, Any]) -> str:
    """Digest of everything the result depends on."""
    text = json.dumps(request, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def computed_by(device: str) -> str:
    """The device and whose kernels compute on it: others round elsewhere, and may choose other formats."""
    chosen = torch.device(device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else platform.machine()
    return f"{chosen.type} {name}, {answering_kernels(chosen.type)}"


@contextmanager
def work_folder(out: Path, request: str, fresh: bool) -> Iterator[Work]:
    """The folder of `request`, locked while in use; kept where the body raises, removed where it returns.

    Raises OutputError where another process is compressing into the same `out`.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.diffpress-work")
    with locked(out):
        if fresh or _request_of(folder) != request:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        (folder / "request").write_text(request, encoding="utf-8")
        with kept_in(folder):
            yield Work(folder)
        shutil.rmtree(folder)


def _request_of(folder: Path) -> str | None:
    path = folder / "request"
    return path.read_text(encoding="utf-8") if path.is_file() else None
