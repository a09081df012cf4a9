"""Where results may go, and how they get there: whole, or not at all with everything as it was."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from os.path import samestat
from pathlib import Path
from tempfile import TemporaryDirectory

from .errors import OutputError, unwritable
from .manifest import MANIFEST, REPORT
from .portable.manifest import EXPORT

logger = logging.getLogger(__name__)

INCOMING, FINISHING, REPLACED = ".diffpress-incoming", ".diffpress-finishing", ".diffpress-replaced"
"""Inside a folder whose contents are swapped: the new ones, the same once all old ones are aside, and the old ones."""


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
            _put_right(place)
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


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `file` when the body is done; where it raises, `file` is as it was."""
    place = file.resolve()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Beside it, and with its ending: writers choose the format by it.
        with TemporaryDirectory(prefix=f".{place.name}.diffpress-", dir=place.parent) as folder:
            written = Path(folder) / place.name
            yield written
            written.replace(place)
    except OSError as error:
        raise unwritable(file, error) from error


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Keep other processes of ours away from `place`; a lock of the operating system, so that a killed process leaves none.

    Raises OutputError where another one has it.
    """
    path = place.with_name(f".{place.name}.diffpress-lock")
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it before us may have removed it since we opened it.
            free = path.exists() and samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            free = False
        if not free:
            raise OutputError(f"another diffpress is writing --out {place}. Wait for it, or name another folder.")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def staging(place: Path) -> Iterator[Path]:
    """An empty folder beside `place`, for `publish`; `place` is locked meanwhile, and nothing else is left."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with locked(place), TemporaryDirectory(prefix=f".{place.name}.diffpress-", dir=place.parent) as folder:
        # Not the temporary one itself: nobody else may look into that.
        staged = Path(folder) / "staged"
        staged.mkdir()
        yield staged


def publish(staged: Path, place: Path) -> None:
    """Put the finished folder `staged` in place of what is there; where that fails, all is as it was.

    By renaming, or, where the folder itself must stay (a mount point, the folder we are in), by swapping its contents.
    `place` is real and locked.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    if _is_here(place):
        _swap_contents(staged, place)
        return
    try:
        _swap_folders(staged, place)
    except OSError as error:
        if not place.is_dir() or not staged.is_dir():
            raise
        logger.debug("contents are swapped, for renaming failed: %s", error)
        _swap_contents(staged, place)


def _is_here(place: Path) -> bool:
    """Whether the process was started in `place`: a shell that is there would be left in a folder that is no more."""
    try:
        return Path.cwd().is_relative_to(place)
    except FileNotFoundError:
        return False


def _swap_folders(staged: Path, place: Path) -> None:
    old = _aside(place)
    if place.exists():
        place.replace(old)
    try:
        staged.replace(place)
    except OSError:
        if old.exists():
            old.replace(place)
        raise
    _remove(old)


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}{REPLACED}")


def _swap_contents(staged: Path, place: Path) -> None:
    """Everything new is on the disk of `place` before anything old moves, so that only renames are left to do."""
    incoming, finishing, old = (place / name for name in (INCOMING, FINISHING, REPLACED))
    try:
        shutil.move(staged, incoming)
        _move_contents(place, old)
        incoming.replace(finishing)
        _move_contents(finishing, place)
    except OSError:
        if finishing.exists():
            _move_contents(place, finishing)
        _move_contents(old, place)
        for folder in (finishing, incoming, old):
            _remove(folder)
        raise
    _remove(old)
    _remove(finishing)


def _move_contents(source: Path, target: Path) -> None:
    """Rename everything in one folder but our own into another; nothing where there is no `source`."""
    if not source.exists():
        return
    target.mkdir(exist_ok=True)
    for path in list(source.iterdir()):
        if path.name not in (INCOMING, FINISHING, REPLACED):
            path.replace(target / path.name)


def _put_right(place: Path) -> None:
    """Bring a swap to its end that was killed half-way: back where some old contents had not moved, else forward."""
    aside = _aside(place)
    if aside.exists() and not place.exists():
        aside.replace(place)
    incoming, finishing, old = (place / name for name in (INCOMING, FINISHING, REPLACED))
    if finishing.exists():
        _move_contents(finishing, place)
    else:
        _move_contents(old, place)
    # `finishing` last: while it is there, `old` is no longer wanted.
    for path in (aside, incoming, old, finishing):
        _remove(path)


def _remove(path: Path) -> None:
    """Without an error where it cannot be done: what was to be published is in place."""
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)
