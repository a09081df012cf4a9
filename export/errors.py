"""What can be wrong with what the user gave us. Every message says what, where and what to do."""

from __future__ import annotations


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
