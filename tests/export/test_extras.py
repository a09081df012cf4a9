"""Packages that only some users have."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diffpress.export.errors import UserError
from diffpress.export.extras import import_extra


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime.*pip install 'diffpress\[onnx\]'"):
        import_extra("onnxruntime")


def test_what_is_missing_inside_of_a_package_is_no_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_extra.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        import_extra("broken_extra")
