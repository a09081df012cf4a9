"""What can be wrong with what the user gave us. Every message says what, where and what to do."""

from __future__ import annotations

import errno

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


def advice_on(error: OSError) -> str:
    """What to do about an error of the operating system."""
    return ADVICE.get(error.errno or 0, "Check the path and the disk it is on.")


class UserError(Exception):
    """The input is wrong: the command line prints the message and exits with status 2."""


class RecipeError(UserError):
    """A recipe key or value is not one we know."""


class UnsupportedModelError(UserError):
    """The model exists, but this cannot be done with it."""


class ModelFileError(UserError):
    """A file of the model is missing, unsafe, damaged or holds impossible numbers."""


class ArtifactError(UserError):
    """An artifact or export does not hold what its manifest says."""


class OutputError(UserError):
    """The output folder cannot be written, or must not be."""
