"""What README.md and docs/ say stands on what is there: files, figures, and the commands that made them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("docs/*.md"))
README_LINES = 200
FOR_THE_READER = {"compress/minmax.py"}
"""Named, and for the reader to write."""
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
NAMED = re.compile(r"`(?:python )?((?:bench|compress|calibration|export|kernels|diffpress|tests|docs)/[\w/.-]+)")
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
HEADING = re.compile(r"^#+ .*$", re.MULTILINE)
MEASURED = re.compile(r"\d+\.\d+ (?:MB|dB|ms)|\| -?\d[\d,]*\.\d+ \|")
"""What a cell of a measured table looks like: a number with a fraction."""


def documents() -> Iterator[pytest.param]:
    return (pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in DOCUMENTS)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("path", documents())
def test_links_lead_somewhere(path: Path) -> None:
    links = LINK.findall(path.read_text(encoding="utf-8"))
    gone = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not gone


@pytest.mark.parametrize("path", documents())
def test_named_files_are_there(path: Path) -> None:
    named = {name.rstrip("./") for name in NAMED.findall(path.read_text(encoding="utf-8"))}
    assert not {name for name in named if not (ROOT / name).exists()} - FOR_THE_READER


@pytest.mark.parametrize("path", documents())
def test_every_measured_table_names_its_command(path: Path) -> None:
    """Since the heading that it stands under."""
    text = path.read_text(encoding="utf-8")
    for table in TABLE.finditer(text):
        if MEASURED.search(table.group()):
            before = HEADING.split(text[: table.start()])[-1]
            assert "bench/" in before, f"no command before the table {table.group().splitlines()[0]}"


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "bench"))
    yield import_module("tables")
    sys.path.remove(str(ROOT / "bench"))


def test_advice_quotes_what_was_recorded(tables: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (advice,) = re.findall(r"^## Which preset\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    recorded = "".join(map(tables.recorded, ("recipes", "cpu", "cpu-avx512vnni")))
    assert set(re.findall(r"\d+\.\d+", advice)) <= set(re.findall(r"\d+\.\d+", recorded))


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("recipes", "README.md"),
        ("quantizers", "docs/beside-peers.md"),
        ("learning", "docs/beside-peers.md"),
        ("cpu", "docs/kernels.md"),
        ("cpu-avx512vnni", "docs/kernels.md"),
        ("gpu", "docs/kernels.md"),
        ("fusion", "docs/kernels.md"),
        ("feedback", "docs/ilf.md"),
        ("bundles", "docs/bundle.md"),
        ("steps", "docs/steps.md"),
        ("caches", "docs/steps.md"),
        ("pruning", "docs/pruning.md"),
        ("pruning-together", "docs/pruning.md"),
        ("pipelines", "docs/pipelines.md"),
        ("step-gradients", "docs/step-gradients.md"),
        ("step-gradient-sizes", "docs/step-gradients.md"),
    ],
)
def test_tables_are_those_that_were_recorded(tables: ModuleType, name: str, document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert tables.recorded(name) in text, f"put there what `python bench/tables.py {name}` prints"
    machine = json.loads((ROOT / "bench" / "results" / tables.TABLES[name][0]).read_text())["machine"]
    for said in (machine["processor"], *re.findall(r"\b[0-9a-f]{7}\b", machine["commit"])):
        assert said in text
