"""Text files are in UTF-8 whatever the locale, so every read and write says so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("diffpress", "compress", "calibration", "export", "kernels")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def unsaid(source: str) -> Iterator[int]:
    """Lines of calls that leave the encoding of a text file to the locale."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and _is_text(node) and "encoding" not in {word.arg for word in node.keywords}:
            yield node.lineno


def _is_text(call: ast.Call) -> bool:
    """Whether a call opens a text file; an `open` of something else, such as a session, has no mode."""
    if isinstance(call.func, ast.Name):
        return call.func.id == "open" and "b" not in _mode(call, call.args[1:])
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    return name in ("read_text", "write_text") or (name == "open" and "b" not in _mode(call, call.args))


def _mode(call: ast.Call, given: list[ast.expr]) -> str:
    """`r` where none is given, `b` where what is given is none."""
    modes = [*given[:1], *(word.value for word in call.keywords if word.arg == "mode")]
    if not modes:
        return "r"
    mode = modes[0].value if isinstance(modes[0], ast.Constant) else None
    return mode if isinstance(mode, str) and set(mode) <= set("rwabx+t") else "b"


def test_every_text_file_names_its_encoding() -> None:
    lines = [
        f"{path.relative_to(ROOT)}:{line}" for path in SOURCES for line in unsaid(path.read_text(encoding="utf-8"))
    ]
    assert not lines


@pytest.mark.parametrize("call", ["path.read_text()", "path.write_text(x)", "open(x)", "path.open('w')"])
def test_a_call_that_does_not_is_seen(call: str) -> None:
    assert list(unsaid(call)) == [1]


@pytest.mark.parametrize(
    "call", ["path.read_text(encoding='utf-8')", "open(x, 'rb')", "path.open(mode='ab')", "engine.open(path, 1)"]
)
def test_a_call_that_does_is_let_through(call: str) -> None:
    assert not list(unsaid(call))
