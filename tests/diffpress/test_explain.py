"""What the machine and other libraries raise, as a message; what we raise ourselves, as it is."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pydantic
import pytest
import torch
import yaml
from safetensors import SafetensorError

from diffpress.explain import explained
from diffpress.export.errors import UserError
from diffpress.kernels.cpu import TierError


def of_number(number: int, path: str | None = "some/file") -> OSError:
    return OSError(number, os.strerror(number), path)


def of_model() -> None:
    pydantic.TypeAdapter(int).validate_python("x")


def raised(function: Callable[[], object]) -> Exception:
    """What a function raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  # any kind is what is asked for
        function()
    return caught.value


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (of_number(errno.ENOSPC), "some/file cannot be read or written: No space left on device. Free some space"),
        (of_number(errno.EDQUOT), "Disk quota exceeded. Your quota is used up"),
        (of_number(errno.EACCES), "some/file cannot be read or written: Permission denied. Change its permissions"),
        (of_number(errno.EISDIR), "Is a directory. Name a file, not a folder"),
        (of_number(errno.ENOENT), "No such file or directory. Check the name"),
        (of_number(errno.EROFS, None), "a file cannot be read or written: Read-only file system"),
        (OSError("no file named model.safetensors\nfound in model"), "no file named model.safetensors found in model"),
        (
            shutil.Error([("a", "b", "[Errno 28] No space left")]),
            "b cannot be written: [Errno 28] No space left. Free some",
        ),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), "(os error 122). Your quota is used up"),
        (raised(lambda: b"\xff".decode()), "a text is not in UTF-8"),
        (raised(lambda: "é".encode("ascii")), "a text is not in UTF-8"),
        (raised(lambda: json.loads("{")), "a file of settings cannot be read: Expecting property name"),
        (raised(lambda: yaml.safe_load("[")), "a file of settings cannot be read: while parsing"),
        (raised(of_model), "a file of settings cannot be read: 1 validation error"),
        (
            ModuleNotFoundError("No module named 'scipy'", name="scipy"),
            "the package scipy is needed here and not installed",
        ),
        (raised(lambda: bytearray(2**60)), "there is not enough memory. Close other programs"),
        (raised(lambda: torch.empty(2**60, dtype=torch.uint8)), "there is not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "there is not enough memory"),
        (TierError("DIFFPRESS_CPU=sse: name one of avx2."), "DIFFPRESS_CPU=sse: name one of avx2."),
        (ImportError("\nX requires the torchsde library.\n You can\n"), "X requires the torchsde library. You can"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_is_not_our_fault_is_said_in_one_line(error: Exception, words: str) -> None:
    with pytest.raises(UserError) as caught, explained():
        raise error
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError(),
        KeyError("x"),
        ImportError("no x", name="diffpress.x"),
        RuntimeError("x"),
        UserError("known"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_faults_of_ours_are_let_through(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained():
        raise error
    assert caught.value is error


def test_an_ascii_locale_is_enough(tmp_path: Path) -> None:
    """`recipes` has letters that ASCII has not; a recipe is read as UTF-8 all the same."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("record: {prompts: [grüner Baum]}\nquantize: {method: ptq}\n", encoding="utf-8")
    program = (
        "import sys; from diffpress.cli import main; from diffpress.recipe import load_recipe; "
        "print(ascii(load_recipe(sys.argv.pop()).record.prompts)); main()"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", program, "recipes", str(recipe)]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"['gr\\xfcner Baum']\n")
    assert b"Q?K" in done.stdout
