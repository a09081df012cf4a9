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
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [value.value for value in ast.walk(node) if isinstance(value, ast.Constant)]
        binary = any(isinstance(mode, str) and set(mode) <= set("rwabx+") and "b" in mode for mode in modes)
        if name in ("read_text", "write_text") or (name in ("open", "fdopen", "NamedTemporaryFile") and not binary):
            yield node.lineno


def test_every_text_file_names_its_encoding() -> None:
    lines = [
        f"{path.relative_to(ROOT)}:{line}" for path in SOURCES for line in unsaid(path.read_text(encoding="utf-8"))
    ]
    assert not lines


@pytest.mark.parametrize("call", ["path.read_text()", "path.write_text(x)", "open(x)", "path.open('w')"])
def test_a_call_that_does_not_is_seen(call: str) -> None:
    assert list(unsaid(call)) == [1]


@pytest.mark.parametrize("call", ["path.read_text(encoding='utf-8')", "open(x, 'rb')", "path.open(mode='ab')"])
def test_a_call_that_does_is_let_through(call: str) -> None:
    assert not list(unsaid(call))
