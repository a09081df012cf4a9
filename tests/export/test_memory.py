"""What is free is what both the machine and the container leave."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from diffpress.export.runtime import memory


@pytest.mark.parametrize(
    ("limit", "used", "files", "free"),
    [
        ("1000", "900", "100", 200),
        ("1000", "100", "0", 500),
        ("1000", "1200", "0", 0),
        ("max", "900", "0", 500),
        ("9223372036854771712", "900", "0", 500),
    ],
)
@pytest.mark.parametrize("version", [0, 1])
def test_the_smaller_of_machine_and_container(
    limit: str, used: str, files: str, free: int, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _folder, limit_name, used_name, files_name = memory.GROUPS[version]
    (tmp_path / limit_name).write_text(f"{limit}\n")
    (tmp_path / used_name).write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\n{files_name} {files}\n")
    groups = [(str(tmp_path), limit_name, used_name, files_name), ("/no/such/folder", "a", "b", "c")]
    monkeypatch.setattr(memory, "GROUPS", groups)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=500))
    assert memory.free_bytes() == free
