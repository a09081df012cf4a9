"""What can be wrong with what the user gave us. Every message says what, where and what to do."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

ADVICE = {
    errno.ENOSPC: "Free some space, or name a place on another disk.",
    errno.EDQUOT: "Your quota is used up: free some space, or name a place on another disk.",
    errno.EACCES: "Change its permissions, or name another place.",
    errno.EPERM: "Change its permissions or attributes, or name another place.",
    errno.EROFS: "The disk is mounted for reading only: name another place.",
    errno.ENOENT: "Check the name.",
    errno.ENOTDIR: "A part of the path is a file: check the name.",
    errno.EISDIR: "Name a file, not a folder.",
    errno.EEXIST: "Move it away, or name another place.",
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ELOOP: "Its links lead in a circle: mend them, or name another place.",
    errno.EIO: "The disk fails: copy what is on it, or name another place.",
}
"""What to do about what the operating system says of a file."""


def advice_on(number: int | None) -> str:
    """What to do about an error of the operating system."""
    return ADVICE.get(number or 0, "Check the path and the disk it is on.")


def number_of(error: Exception) -> int | None:
    """The number of the operating system's error behind `error`; safetensors has it in its words only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"os error (\d+)|Errno (\d+)", str(error))
    return int(found[1] or found[2]) if found else None


class UserError(Exception):
    """The input is wrong: the command line prints the message and exits with status 2."""


class RecipeError(UserError):
    """A recipe key or value is not one we know."""


class UnsupportedModelError(UserError):
    """The model exists, but this cannot be done with it."""


class ModelFileError(UserError):
    """A file of the model is missing, unsafe, damaged or holds impossible numbers."""


class LearningError(UserError):
    """Learning left the numbers that a computer can hold."""


class ArtifactError(UserError):
    """An artifact or export does not hold what its manifest says."""


class OutputError(UserError):
    """The output folder cannot be written, or must not be."""


def unwritable(path: Path, error: Exception, option: str = "") -> OutputError:
    """What to raise where `path` could not be written because of `error`."""
    number = number_of(error)
    reason = os.strerror(number) if number else str(error)
    return OutputError(f"{option} {path} cannot be written: {reason}. {advice_on(number)}".lstrip())
