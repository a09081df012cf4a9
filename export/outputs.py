"""Where results may go: asked before any work is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from .errors import OutputError, unwritable
from .manifest import MANIFEST, REPORT
from .portable.manifest import EXPORT
from .publishing import locked, put_right


def check_output(out: Path, sources: Sequence[Path], force: bool) -> Path:
    """The real place of the folder `out`, links followed, once it is sure that a result can be put there.

    Raises OutputError where it cannot be written, where it is, holds or lies in one of `sources`, and, unless `force`,
    where it holds anything that diffpress did not write.
    """
    place = _real_place(out)
    _check_apart(out, place, sources)
    _check_writable(out, place)
    if place.parent.exists():
        with locked(place):
            put_right(place)
    if place.exists() and not place.is_dir() and not force:
        raise OutputError(f"--out {out} is a file. Name a folder, or give --force to replace it.")
    if place.is_dir() and not force:
        _check_ours(out, place)
    return place


def check_output_file(out: Path, sources: Sequence[Path], option: str = "--out") -> Path:
    """The same for a file, which may replace an older one."""
    place = _real_place(out, option)
    _check_apart(out, place, sources, option)
    if place.is_dir():
        raise OutputError(f"{option} {out} is a folder. Name a file in it.")
    if place.exists() and not place.is_file():
        raise OutputError(f"{option} {out} is a device, not a file. Name a file.")
    _check_writable(out, place, option)
    return place


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raises OutputError where a disk that `folder` or what lies beside it is on has less than `needed_bytes` left."""
    for place in (folder, folder.absolute().parent):
        existing = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        if free < needed_bytes:
            raise OutputError(
                f"{existing} has {free / 1e6:,.0f} MB free, but {needed_bytes / 1e6:,.0f} MB are needed. Free some space, "
                "name an --out on another disk, or record fewer trajectories."
            )


def _real_place(out: Path, option: str = "--out") -> Path:
    for path in (out, *out.absolute().parents):
        if path.is_symlink() and not path.exists():
            raise OutputError(
                f"{option} {out}: {path} is a link to {path.readlink()}, which does not exist. Make that folder, or name "
                "another place."
            )
    place = out.resolve()
    if not place.name:
        raise OutputError(f"{option} {out} is the root of the file system. Name a folder in it.")
    return place


def _check_apart(out: Path, place: Path, sources: Sequence[Path], option: str = "--out") -> None:
    """A result must not take the place of what it is made from, nor change a folder that is under digests."""
    for source in sources:
        for real in _real_places(source):
            relation = _relation(place, real)
            if relation is not None:
                raise OutputError(f"{option} {out} {relation} the input {source}. Name a place apart from it.")
    for parent in place.parents:
        if any((parent / name).is_file() for name in (MANIFEST, EXPORT)):
            raise OutputError(f"{option} {out} lies in the result {parent}, which would not verify any more.")


def _real_places(source: Path) -> set[Path]:
    """Where a source lies, and everything that links in it lead to."""
    links = [path for path in source.rglob("*") if path.is_symlink()] if source.is_dir() else []
    return {path.resolve() for path in (source, *links)}


def _relation(place: Path, source: Path) -> str | None:
    if _same(place, source):
        return "is"
    if any(_same(parent, source) for parent in place.parents):
        return "lies in"
    return "holds" if any(_same(place, parent) for parent in source.parents) else None


def _same(first: Path, second: Path) -> bool:
    """Whether both are one, also where a disk ignores case or a folder is mounted twice."""
    return first == second or (first.exists() and second.exists() and first.samefile(second))


def _check_ours(out: Path, place: Path) -> None:
    """Raises OutputError for a folder that has anything in it which no manifest of ours lists."""
    ours = next((place / name for name in (MANIFEST, EXPORT) if (place / name).is_file()), None)
    if ours is None and any(place.iterdir()):
        raise OutputError(f"--out {out} exists and was not written by diffpress. Name another folder, or give --force.")
    listed = None if ours is None else _listed(ours)
    if listed is None:
        return
    files = [path for path in place.rglob("*") if path.is_file() or path.is_symlink()]
    strange = sorted({path.relative_to(place).as_posix() for path in files} - listed)
    if strange:
        raise OutputError(
            f"--out {out} holds {strange[0]}, which was not written by diffpress. Move it away, name another folder, or give "
            "--force to replace everything."
        )


def _listed(manifest: Path) -> set[str] | None:
    """The files that a manifest lists, itself and the report included; None where it is damaged."""
    try:
        return {*json.loads(manifest.read_text(encoding="utf-8"))["files"], manifest.name, REPORT}
    except (ValueError, KeyError, TypeError):
        return None


def _check_writable(out: Path, place: Path, option: str = "--out") -> None:
    """Make a folder where the work will, and take it away again: what a disk, mount or attribute forbids shows only so.

    Raises OutputError where that fails.
    """
    missing = [parent for parent in place.parents if not parent.exists()]
    there = next(parent for parent in place.parents if parent.exists())
    if not there.is_dir():
        raise OutputError(f"{option} {out} cannot be written: {there} is a file. Move it away, or name another place.")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for folder in (place.parent, *([place] if place.is_dir() else [])):
            with TemporaryDirectory(prefix=f".{place.name}.diffpress-", dir=folder):
                pass
        if place.is_file():
            place.open("ab").close()
    except OSError as error:
        raise unwritable(out, error, option) from error
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
