"""Imports go one way, and importing diffpress costs nothing."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["diffpress", "compress", "calibration", "export", "kernels"]
"""From the one that may import all others to the one that may import none."""
SOURCES = sorted(path for folder in ORDER for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    own, *deeper = path.relative_to(ROOT).parts
    problems = [problem for node in ast.walk(ast.parse(path.read_text())) for problem in _wrong(node, own, len(deeper))]
    assert not problems, "\n".join(problems)


def _wrong(node: ast.AST, own: str, depth: int) -> Iterator[str]:
    """What is wrong with one import in a file `depth` folders below the folder `own`."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names if alias.name.split(".")[0] in ORDER]
        yield from (f"line {node.lineno}: write `from {name} import ...`" for name in names)
    if not isinstance(node, ast.ImportFrom):
        return
    if any(alias.name == "*" for alias in node.names):
        yield f"line {node.lineno}: star import"
    if node.level > depth:
        yield f"line {node.lineno}: a relative import leaves {own}; between folders they are absolute"
    if node.level == depth and own == "diffpress" and _targets(node.module or "", node) & set(ORDER):
        yield f"line {node.lineno}: a relative import reaches another folder; between folders they are absolute"
    if node.level or (node.module or "").split(".")[0] not in ORDER:
        return
    head, *rest = (node.module or "").split(".")
    if head != "diffpress":
        yield f"line {node.lineno}: {head} is imported as diffpress.{head}"
    targets = _targets(".".join(rest), node)
    if own in targets or (own == "diffpress" and not targets & set(ORDER)):
        yield f"line {node.lineno}: inside {own} imports are relative"
    if own != "diffpress" and not targets & set(ORDER):
        yield f"line {node.lineno}: {own} may not import the front door, which stands above it"
    higher = targets & set(ORDER[: ORDER.index(own)])
    if higher:
        yield f"line {node.lineno}: {own} may not import {', '.join(higher)}, which stands above it"


def _targets(module: str, node: ast.ImportFrom) -> set[str]:
    return {module.split(".")[0]} if module else {alias.name for alias in node.names}


@pytest.mark.parametrize(
    ("own", "depth", "line"),
    [
        ("kernels", 1, "from diffpress.export import errors"),
        ("export", 2, "from diffpress.calibration.sampling import replay"),
        ("export", 1, "from diffpress import load"),
        ("export", 1, "from diffpress.zoo import zoo_folder"),
        ("export", 1, "from diffpress.export.errors import UserError"),
        ("export", 1, "from ..kernels import quantize"),
        ("diffpress", 1, "from .export.load import register_quantizers"),
        ("diffpress", 1, "from . import kernels"),
        ("diffpress", 1, "from diffpress.flow import compress_by_name"),
        ("calibration", 1, "from export.errors import UserError"),
        ("calibration", 1, "import diffpress.kernels"),
        ("compress", 1, "from .overlay import *"),
    ],
)
def test_the_import_rule_fires(own: str, depth: int, line: str) -> None:
    assert list(_wrong(ast.parse(line).body[0], own, depth))


def test_kernels_does_not_answer_for_the_distribution_of_that_name() -> None:
    spec = importlib.util.find_spec("kernels")
    origin = Path(spec.origin) if spec is not None and spec.origin is not None else None
    inside = origin is not None and origin.resolve().is_relative_to(ROOT.resolve())
    assert not inside, (
        f"`import kernels` finds {origin}: the repository root is on sys.path, so our folder shadows the distribution "
        "`kernels` that transformers and diffusers probe. Set PYTHONSAFEPATH=1, run plain `pytest`, and install with `make` "
        "(it takes the root out of _editable_skbc_diffpress.pth)."
    )


def _python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


KNOWN = """
config = {"quant_method": "diffpress", "edits": [], "timesteps": []}
for tables, entry in ((diffusers_tables, "DiffusersAutoQuantizer"), (transformers_tables, "AutoHfQuantizer")):
    made = getattr(tables, entry).from_config(config)
    print(type(made).__module__, type(made.quantization_config).__name__)
"""
FOUND = [f"diffpress.export.load.{library} EditsConfig" for library in ("diffusers", "transformers")]


def test_import_is_light_and_registers_when_the_libraries_come_later() -> None:
    program = """
import sys, diffpress
print(sorted({"torch", "diffusers", "transformers"} & sys.modules.keys()))
from diffusers.quantizers import auto as diffusers_tables
from transformers.quantizers import auto as transformers_tables
print([finder.module for finder in sys.meta_path if type(finder).__module__.startswith("diffpress")])
"""
    assert _python(program + KNOWN).splitlines() == ["[]", "['peft.tuners.lora']", *FOUND]


@pytest.mark.long
@pytest.mark.parametrize("imports", ["import diffpress, peft", "import peft, diffpress"])
def test_adapters_know_packed_layers_whoever_is_imported_first(imports: str) -> None:
    pytest.importorskip("peft")
    program = f"""
{imports}
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as tuners
print(tuners[peft.PeftType.LORA].__module__, issubclass(tuners[peft.PeftType.LORA], peft.LoraModel))
"""
    assert _python(program).splitlines() == ["diffpress.export.load.adapters True"]


def test_import_registers_when_the_libraries_came_first() -> None:
    program = """
from diffusers.quantizers import auto as diffusers_tables
from transformers.quantizers import auto as transformers_tables
assert "diffpress" not in {*diffusers_tables.AUTO_QUANTIZER_MAPPING, *transformers_tables.AUTO_QUANTIZER_MAPPING}
import diffpress
"""
    assert _python(program + KNOWN).splitlines() == FOUND


def test_the_front_door_knows_stages_and_no_method() -> None:
    """A new method is a new file in compress/, and nothing in diffpress/ changes with it."""
    shared = {"changes", "methods", "options", "plan", "stage", "stage_folder"}
    for path in (ROOT / "diffpress").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.startswith("diffpress.compress"):
                assert module.split(".")[2] in shared, f"{path.name} imports {module}"
