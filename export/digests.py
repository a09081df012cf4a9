"""Manifests: what a folder says of itself, and which files it holds, each with its SHA-256; what needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping
from pathlib import Path, PurePosixPath
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ArtifactError

Manifest = TypeVar("Manifest", bound=BaseModel)


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


def read_manifest_file(path: Path, model: type[Manifest], schema: int, anew: str) -> Manifest:
    """What the file `path` says, up to `schema`. Raises ArtifactError where it is damaged or newer, with `anew` as the cure."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data.get("schema_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > schema:
            raise ArtifactError(f"{path} has schema {version}, this diffpress reads up to {schema}: update diffpress.")
        return model.model_validate(data)
    except (ValueError, ValidationError) as error:
        raise ArtifactError(f"{path} is damaged: {_damage(error)}. Copy the folder again, or {anew}.") from error


def _damage(error: ValueError) -> str:
    """What is wrong with a manifest, in one line: of several things the first."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg'][0].lower()}{first['msg'][1:]}"


def compare_files(folder: Path, files: Mapping[str, File], apart: Container[str], anew: str) -> None:
    """Compare every file of `folder` with its digest, but those named `apart`; `anew` is the cure.

    Raises ArtifactError naming the first that differs, is missing or is not listed.
    """
    for name, expected in files.items():
        path = inside(folder, name)
        if not path.is_file():
            raise ArtifactError(f"{folder}: {name} is missing. Copy the folder again, or {anew}.")
        if path.stat().st_size != expected.size_bytes or digest(path) != expected.sha256:
            raise ArtifactError(
                f"{folder}: {name} is not what was saved (its digest differs). Copy the folder again, or {anew}."
            )
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (not path.is_dir() or path.is_symlink()) and name not in files and name not in apart:
            raise ArtifactError(f"{folder}: {name} is not in the manifest. Remove it, or {anew}.")
