"""The name diffusers and transformers know us by."""

from enum import Enum


class Method(str, Enum):  # noqa: UP042  # both libraries compare it as a plain str and read its value
    """Our one entry in their tables."""

    DIFFPRESS = "diffpress"
