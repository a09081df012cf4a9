"""Which files a folder holds, each with its SHA-256; what needs no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ArtifactError


def digest(path: Path) -> str:
    """Hexadecimal SHA-256 of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class File(BaseModel):
    """One file of the artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int
    sha256: str


def inside(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`. Raises ArtifactError where it would leave it, through `..`, a root or a link."""
    pure = PurePosixPath(name)
    path = folder / pure
    if pure.is_absolute() or ".." in pure.parts or "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{folder}: the path {name!r} leaves the folder, the artifact is not safe to use.")
    return path


def damage(error: ValueError) -> str:
    """What is wrong with a manifest, in one line: of several things the first."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg'][0].lower()}{first['msg'][1:]}"
