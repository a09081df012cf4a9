"""What the machine, the user's files and other libraries raise, as one message; faults of ours are let through."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from diffpress.export.errors import UserError, advice_on, number_of


@contextmanager
def explained() -> Iterator[None]:
    """Raise a UserError in place of what the body raises because of the user's files, disk or installation."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        raise UserError(message) from error


def _message(error: Exception) -> str | None:
    """None where the fault is ours."""
    if isinstance(error, OSError):
        return _of_file(error)
    if _is_of_memory(error):
        return (
            "there is not enough memory. Close other programs, or take less at a time: `compress` has --set record.batch=1, "
            "and with --estimate it says what a recipe takes."
        )
    if isinstance(error, ImportError):
        return _of_package(error)
    if isinstance(error, UnicodeError):
        return (
            f"a text is not in UTF-8 ({error}). Save the file as UTF-8, or set a UTF-8 locale such as LC_ALL=C.UTF-8."
        )
    from json import JSONDecodeError

    from pydantic import ValidationError
    from safetensors import SafetensorError
    from yaml import YAMLError

    from diffpress.kernels.cpu import TierError

    if isinstance(error, TierError):
        return str(error)
    if isinstance(error, (JSONDecodeError, ValidationError, YAMLError)):
        return f"a file of settings cannot be read: {_one_line(error)}. Restore the file."
    if isinstance(error, SafetensorError):
        return f"a file of weights cannot be read or written: {_one_line(error)}. {advice_on(number_of(error))}"
    return None


def _is_of_memory(error: Exception) -> bool:
    """Python's own, a GPU's, and that of torch's allocator for the processor, which is told by its words alone."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def _of_file(error: OSError) -> str:
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        _source, target, reason = error.args[0][0]
        return f"{target} cannot be written: {reason}. {advice_on(number_of(Exception(reason)))}"
    if error.errno is None:
        # A library's own: it names the file and what is wrong with it.
        return _one_line(error)
    where = "a file" if error.filename is None else error.filename
    return f"{where} cannot be read or written: {error.strerror}. {advice_on(error.errno)}"


def _of_package(error: ImportError) -> str | None:
    if (error.name or "").startswith("diffpress"):
        return None
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is needed here and not installed: pip install {error.name}"
    return _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).removesuffix(".") or type(error).__name__


def as_typed(text: str) -> str:
    """What the user typed in UTF-8, also where the locale is ASCII and Python kept its bytes. Raises UserError for others."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise UserError(f"--prompt {text!r} is no text in UTF-8.") from error
