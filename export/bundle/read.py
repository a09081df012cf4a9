"""Bundles as files from anywhere: nothing of them is used before all of it has been checked."""

from __future__ import annotations

import hashlib
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO

from ..digests import File, digest, inside, read_manifest_file
from ..errors import ArtifactError
from .manifest import ANEW, BUNDLE, SCHEMA, BundleManifest

MANIFEST_LIMIT = 2**24
"""Bytes of `bundle.json`; real ones have thousands."""
PIECE = 2**20
ENCRYPTED = 1
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, RuntimeError, ValueError)
"""What reading a zip raises where its bytes are wrong."""


def is_bundle(path: Path) -> bool:
    """Whether this is a zip, or a folder that a bundle was unzipped to."""
    return (path / BUNDLE).is_file() or (path.is_file() and zipfile.is_zipfile(path))


@contextmanager
def opened_bundle(path: Path) -> Iterator[tuple[BundleManifest, Path]]:
    """What a bundle says of itself, and the folder of its export, once every member has matched its digest.

    Raises ArtifactError for whatever is not as it was packaged, or not safe.
    """
    if path.is_dir():
        manifest = _read_manifest(path)
        _check_folder(path, manifest)
        yield manifest, inside(path, manifest.folder)
        return
    with TemporaryDirectory(prefix="diffpress-bundle-") as folder:
        manifest = _unpack(path, Path(folder))
        yield manifest, inside(Path(folder), manifest.folder)


def _unpack(path: Path, folder: Path) -> BundleManifest:
    """Unpack the export and the manifest; check everything else in passing."""
    # Here, for it brings torch along, which a folder needs not.
    from ..outputs import check_space

    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive)
            _unpack_manifest(path, archive, members, folder)
            manifest = _read_manifest(folder)
            _check_listing(path, members, manifest)
            wanted = [name for name in manifest.files if _lies_in(name, manifest.folder)]
            check_space(folder, sum(manifest.files[name].size_bytes for name in wanted))
            for name, expected in manifest.files.items():
                with archive.open(members[name]) as member:
                    _check_member(path, name, member, expected, folder / name if name in wanted else None)
    except DAMAGED as error:
        raise ArtifactError(f"{path} is damaged: {error}. Copy it again, or {ANEW}.") from error
    return manifest


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Members that are files, by name. Raises ArtifactError for one that no bundle has."""
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
        if name in found:
            raise _unsafe(path, f"it has {name!r} twice")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _unsafe(path, f"{name!r} is a link or a device")
        if member.flag_bits & ENCRYPTED or member.compress_type not in PACKED:
            raise _unsafe(path, f"{name!r} is encrypted or packed in another way")
        if _leaves(name) or _leaves(member.orig_filename):
            raise _unsafe(path, f"the path {name!r} leaves its folder")
        if not member.is_dir():
            found[name] = member
    return found


def _leaves(name: str) -> bool:
    pure = PurePosixPath(name)
    return pure.is_absolute() or ".." in pure.parts or "\0" in name or "\\" in name


def _unpack_manifest(path: Path, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], folder: Path) -> None:
    if BUNDLE not in members:
        raise ArtifactError(f"{path} is no bundle of diffpress: it has no {BUNDLE}.")
    with archive.open(members[BUNDLE]) as member:
        text = member.read(MANIFEST_LIMIT + 1)
    if len(text) > MANIFEST_LIMIT:
        raise _unsafe(path, f"{BUNDLE} is larger than any that diffpress writes")
    (folder / BUNDLE).write_bytes(text)


def _read_manifest(folder: Path) -> BundleManifest:
    manifest = read_manifest_file(folder / BUNDLE, BundleManifest, SCHEMA, ANEW)
    for name in (*manifest.files, manifest.folder):
        inside(folder, name)
    return manifest


def _check_listing(path: Path, members: dict[str, zipfile.ZipInfo], manifest: BundleManifest) -> None:
    """Raises ArtifactError where members and manifest do not name the same files of the same sizes."""
    strange = sorted(members.keys() - manifest.files.keys() - {BUNDLE})
    missing = sorted(manifest.files.keys() - members.keys())
    if strange or missing:
        what = f"{strange[0]} is not in the manifest" if strange else f"{missing[0]} is missing"
        raise ArtifactError(f"{path}: {what}. Copy it again, or {ANEW}.")
    for name, expected in manifest.files.items():
        if members[name].file_size != expected.size_bytes:
            raise _differs(path, name)


def _check_member(path: Path, name: str, member: IO[bytes], expected: File, place: Path | None) -> None:
    """Hash a member, and write it where there is a place; never more than its size, whatever it unpacks to."""
    found, left = hashlib.sha256(), expected.size_bytes
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("xb") if place is not None else _nowhere() as file:
        while piece := member.read(PIECE):
            left -= len(piece)
            if left < 0:
                raise _differs(path, name)
            found.update(piece)
            file.write(piece)
    if left != 0 or found.hexdigest() != expected.sha256:
        raise _differs(path, name)


def _check_folder(folder: Path, manifest: BundleManifest) -> None:
    """An unzipped bundle may have other files beside its own, such as images that were made; its export may not."""
    for name, expected in manifest.files.items():
        file = inside(folder, name)
        if not file.is_file() or file.stat().st_size != expected.size_bytes or digest(file) != expected.sha256:
            raise _differs(folder, name)


def _lies_in(name: str, folder: str) -> bool:
    return PurePosixPath(name).is_relative_to(folder)


class _nowhere:  # noqa: N801
    """A file that keeps nothing."""

    def __enter__(self) -> _nowhere:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def write(self, piece: bytes) -> None:
        """Keep nothing."""


def _unsafe(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path} is not safe to use: {why}. Nothing of it was used; {ANEW}.")


def _differs(path: Path, name: str) -> ArtifactError:
    return ArtifactError(f"{path}: {name} is not what was packaged (its digest differs). Copy it again, or {ANEW}.")
