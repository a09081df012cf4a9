"""Manifests: what a folder says of itself, and which files it holds, each with its SHA-256; what needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ArtifactError, advice_on

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
    """The path of `name` in `folder`. Raises ArtifactError where it would leave it, through `..`, a root or a link.

    In a snapshot of the hub, links into its own repository's `blobs` do not: that is where its files lie.
    """
    pure = PurePosixPath(name)
    path = folder / pure
    homes = [folder.resolve(), *_blobs(folder)]
    leaves = pure.is_absolute() or ".." in pure.parts or "\0" in name
    if leaves or not any(path.resolve().is_relative_to(home) for home in homes):
        raise ArtifactError(f"{folder}: the path {name!r} leaves the folder, the artifact is not safe to use.")
    return path


def _blobs(folder: Path) -> list[Path]:
    """Where the hub's cache keeps the files of a snapshot, `NAME/snapshots/COMMIT`, that `folder` is or is in."""
    place = folder.resolve()
    snapshots = (own.parent for own in (place, *place.parents) if own.parent.name == "snapshots")
    return [blobs for own in snapshots if (blobs := own.with_name("blobs")).is_dir()]


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


def compare_files(folder: Path, files: Mapping[str, File], apart: Container[str], anew: str) -> list[str]:
    """Compare every file of `files` with its digest, but for the model card; `anew` is the cure.

    Gives the strangers: what lies in `folder` beside them and those named `apart`; they are not read. Raises ArtifactError
    naming the first that differs or is missing.
    """
    for name, expected in files.items():
        path = inside(folder, name)
        if is_card(name):
            continue
        if not path.is_file():
            raise ArtifactError(f"{folder}: {name} is missing. Copy the folder again, or {anew}.")
        if not _matches(path, expected, f"{folder}: {name}"):
            raise ArtifactError(
                f"{folder}: {name} is not what was saved (its digest differs). Copy the folder again, or {anew}."
            )
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return [
        name
        for name, path in found.items()
        if (not path.is_dir() or path.is_symlink()) and name not in files and name not in apart and not is_card(name)
    ]


def _matches(path: Path, expected: File, words: str) -> bool:
    try:
        return path.stat().st_size == expected.size_bytes and digest(path) == expected.sha256
    except OSError as error:
        raise ArtifactError(f"{words} cannot be read: {error.strerror}. {advice_on(error.errno)}") from error


def is_card(name: str) -> bool:
    """Whether a file of a folder is its model card, which people edit where the folder lies."""
    return name == "README.md"


@contextmanager
def known_files(folder: Path, files: Iterable[str], strangers: Iterable[str]) -> Iterator[Path]:
    """A folder that holds `files` of `folder` and none of the `strangers`: loaders choose by names what they read.

    It is `folder` itself where strangers lie beside the folders of `files` only, as `.cache` and `.gitattributes` do.
    """
    files = list(files)
    places = {name.split("/")[0] for name in files if "/" in name}
    if not any(name.split("/")[0] in places for name in strangers):
        yield folder
        return
    with TemporaryDirectory(prefix="diffpress-") as place:
        for name in files:
            link = Path(place) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(inside(folder, name).resolve())
        yield Path(place)
