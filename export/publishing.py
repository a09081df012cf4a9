"""How results get to their place: whole, or not at all with everything as it was."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import samestat
from pathlib import Path
from tempfile import TemporaryDirectory

from .errors import OutputError, unwritable

logger = logging.getLogger(__name__)

INCOMING, FINISHING, REPLACED = ".diffpress-incoming", ".diffpress-finishing", ".diffpress-replaced"
"""Inside a folder whose contents are swapped: the new ones, the same once all old ones are aside, and the old ones."""


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


def put_right(place: Path) -> None:
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
