"""Bundles from anywhere, read in Python: what no bundle has is refused before anything is unpacked or run."""

from __future__ import annotations

import hashlib
import json
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from diffpress.export.bundle import read
from diffpress.export.bundle.manifest import BUNDLE, BundleManifest, Target
from diffpress.export.bundle.read import is_bundle, opened_bundle
from diffpress.export.errors import ArtifactError

FILES = {"diffpress-run": b"program", "export/export.json": b"{}", "export/a/b.data": b"weights" * 1000}
Member = tuple[str | zipfile.ZipInfo, bytes]


def manifest_of(files: dict[str, bytes], **other: Any) -> bytes:
    listed = {name: {"size_bytes": len(own), "sha256": hashlib.sha256(own).hexdigest()} for name, own in files.items()}
    given = {"target": Target.LINUX_X64, "versions": {}, "tokenizer": None, "peak_memory_bytes": 1, "measured_on": "x"}
    return BundleManifest.model_validate(given | {"files": listed} | other).model_dump_json().encode()


def zipped(path: Path, members: list[Member]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def sound() -> list[Member]:
    return [*FILES.items(), (BUNDLE, manifest_of(FILES))]


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.fixture(autouse=True)
def only_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever was unpacked is gone in the end, and nothing was put elsewhere."""
    import tempfile

    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert list(place.iterdir()) == []


def test_only_the_export_is_unpacked(tmp_path):
    path = zipped(tmp_path / "a.zip", [*sound(), ("folder/", b"")])
    assert is_bundle(path)
    with opened_bundle(path) as (manifest, folder):
        assert manifest.target is Target.LINUX_X64
        assert (folder / "a" / "b.data").read_bytes() == FILES["export/a/b.data"]
        found = {file.relative_to(folder.parent).as_posix() for file in folder.parent.rglob("*") if file.is_file()}
        assert found == {BUNDLE, "export/export.json", "export/a/b.data"}


def test_an_unzipped_bundle_may_have_files_beside_it(tmp_path):
    with zipfile.ZipFile(zipped(tmp_path / "a.zip", sound())) as archive:
        archive.extractall(tmp_path / "a")
    (tmp_path / "a" / "pizza.png").write_bytes(b"")
    with opened_bundle(tmp_path / "a") as (_, folder):
        assert folder == tmp_path / "a" / "export"
    (tmp_path / "a" / "diffpress-run").write_bytes(b"another")
    with pytest.raises(ArtifactError, match="diffpress-run is not what was packaged"), opened_bundle(tmp_path / "a"):
        pass


ESCAPED = dict(FILES) | {"../outside": b"x"}
REFUSED: dict[str, tuple[Callable[[], list[Member]], str]] = {
    "slip": (lambda: [*sound(), ("../outside", b"x")], "leaves its folder"),
    "listed slip": (lambda: [*ESCAPED.items(), (BUNDLE, manifest_of(ESCAPED))], "leaves its folder"),
    "root": (lambda: [*sound(), ("/outside", b"x")], "leaves its folder"),
    "backslash": (lambda: [*sound(), ("a\\..\\outside", b"x")], "leaves its folder"),
    "link": (lambda: [*sound(), (link("export/link"), b"/etc/passwd")], "is a link"),
    "twice": (lambda: [*sound(), ("diffpress-run", b"other")], "twice"),
    "unlisted": (lambda: [*sound(), ("export/more", b"x")], "export/more is not in the manifest"),
    "missing": (lambda: sound()[1:], "diffpress-run is missing"),
    "other bytes": (lambda: [("diffpress-run", b"Program"), *sound()[1:]], "its digest differs"),
    "other size": (lambda: [("diffpress-run", b"programs"), *sound()[1:]], "its digest differs"),
    "no manifest": (lambda: sound()[:-1], "is no bundle of diffpress"),
    "no JSON": (lambda: [*FILES.items(), (BUNDLE, b"{")], "is damaged"),
    "newer": (lambda: [*FILES.items(), (BUNDLE, manifest_of(FILES, schema_version=9))], "update diffpress"),
    "folder": (lambda: [*FILES.items(), (BUNDLE, manifest_of(FILES, folder="../.."))], "leaves the folder"),
    "huge manifest": (lambda: [*FILES.items(), (BUNDLE, b" " * (read.MANIFEST_LIMIT + 1))], "larger than any"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_bundle_has_is_refused(tmp_path, kind):
    members, said = REFUSED[kind]
    path = zipped(tmp_path / "a.zip", members())
    with pytest.raises(ArtifactError, match=said), opened_bundle(path):
        pass
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.zip", "temporary"]


def test_a_member_that_says_it_is_small_is_read_no_further(tmp_path, monkeypatch):
    """The directory and the manifest say seven bytes, and gigabytes come out."""
    path = zipped(tmp_path / "a.zip", sound())
    pieces = []

    class Endless:
        def __enter__(self) -> Endless:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def read(self, size: int) -> bytes:
            pieces.append(size)
            return b"x" * size

    opened = zipfile.ZipFile.open
    monkeypatch.setattr(
        zipfile.ZipFile,
        "open",
        lambda self, member, *rest: opened(self, member, *rest) if member.filename == BUNDLE else Endless(),
    )
    with pytest.raises(ArtifactError, match="its digest differs"), opened_bundle(path):
        pass
    assert len(pieces) == 1


def test_a_damaged_zip_is_refused(tmp_path):
    content, unpacked = zipped(tmp_path / "a.zip", sound()).read_bytes(), [name for name in FILES if "export" in name]
    for place in range(0, len(content), 37):
        (tmp_path / "a.zip").write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        # Where what changed is no part of any file, such as a date, all is as it was.
        with suppress(ArtifactError), opened_bundle(tmp_path / "a.zip") as (_, folder):
            assert {name: (folder.parent / name).read_bytes() for name in unpacked} == {
                name: FILES[name] for name in unpacked
            }


def test_other_files_are_no_bundles(tmp_path):
    (tmp_path / "a").write_text(json.dumps({}))
    assert not is_bundle(tmp_path / "a")
    assert not is_bundle(tmp_path)
    assert not is_bundle(tmp_path / "none")
