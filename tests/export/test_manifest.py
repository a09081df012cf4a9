"""`diffpress.json` and the files it vouches for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from diffpress.export.digests import known_files
from diffpress.export.edits import Pack
from diffpress.export.errors import ArtifactError
from diffpress.export.manifest import (
    MANIFEST,
    REPORT,
    SCHEMA,
    Manifest,
    PlanRow,
    check_files,
    inside,
    list_files,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two files with their manifest."""
    path = tmp_path / "artifact"
    (path / "unet").mkdir(parents=True)
    (path / "model_index.json").write_text("{}")
    (path / "unet" / "weights").write_bytes(bytes(range(100)))
    write_manifest(path, manifest_of(path))
    return path


def manifest_of(path: Path) -> Manifest:
    row = PlanRow(component="unet", module="a", shape=(3, 5), format="W4A8", source_bytes=30, bytes=9, error=0.1)
    return Manifest(
        fingerprint="f",
        versions={"torch": "2"},
        recipe={"seed": 0},
        source={"name": "x"},
        timesteps=[981.0, 1.0],
        edits=[Pack(component="unet", module="a", weight_bits=4, activation_bits=8)],
        plan=[row],
        metrics={"psnr_db": 30.5},
        files=list_files(path),
    )


def change(path: Path, **values: object) -> None:
    data = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(data | values))


def test_a_manifest_of_the_first_schema_is_read_as_it_was(folder: Path) -> None:
    """It knew Pack edits alone."""
    change(folder, schema_version=1)
    read, expected = read_manifest(folder), manifest_of(folder)
    assert (read.schema_version, read.edits, read.plan) == (1, expected.edits, expected.plan)


def test_round_trip(folder: Path) -> None:
    assert read_manifest(folder) == manifest_of(folder)
    check_files(folder, read_manifest(folder).files)


def test_the_same_manifest_gives_the_same_bytes(folder: Path) -> None:
    before = (folder / MANIFEST).read_bytes()
    write_manifest(folder, read_manifest(folder))
    assert (folder / MANIFEST).read_bytes() == before


def test_files_are_listed_without_manifest_and_report(folder: Path) -> None:
    (folder / REPORT).write_text("timings")
    assert set(list_files(folder)) == {"model_index.json", "unet/weights"}
    check_files(folder, read_manifest(folder).files)


def test_a_flipped_bit_is_found(folder: Path) -> None:
    file = folder / "unet" / "weights"
    data = bytearray(file.read_bytes())
    data[57] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="unet/weights is not what was saved"):
        check_files(folder, read_manifest(folder).files)


def test_a_missing_file_is_found(folder: Path) -> None:
    (folder / "unet" / "weights").unlink()
    with pytest.raises(ArtifactError, match="unet/weights is missing"):
        check_files(folder, read_manifest(folder).files)


STRANGERS = [
    "extra.bin",
    "unet/extra.bin",
    "unet/diffpress.json",
    "deep/er/report.html",
    ".gitattributes",
    "unet/.DS_Store",
]


@pytest.mark.parametrize("name", STRANGERS)
def test_a_file_nobody_listed_is_named_and_left_out(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
    files = read_manifest(folder).files
    assert check_files(folder, files) == [name]
    with known_files(folder, files, [name]) as known:
        found = {path.relative_to(known).as_posix() for path in known.rglob("*") if path.is_file()}
        assert (known / "unet/weights").read_bytes() == (folder / "unet/weights").read_bytes()
    beside = not name.startswith("unet/")
    assert (known == folder) == beside
    assert beside or found == set(files)


def test_a_linked_folder_nobody_listed_is_named_and_not_entered(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("x")
    (folder / "vae").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert check_files(folder, read_manifest(folder).files) == ["vae"]


def test_the_model_card_may_be_edited(folder: Path) -> None:
    (folder / "README.md").write_text("before")
    write_manifest(folder, read_manifest(folder).model_copy(update={"files": list_files(folder)}))
    (folder / "README.md").write_text("after")
    assert check_files(folder, read_manifest(folder).files) == []
    (folder / "README.md").unlink()
    assert check_files(folder, read_manifest(folder).files) == []


def snapshot(folder: Path, place: Path) -> Path:
    """The folder as the hub's cache holds it: links into the repository's own blobs."""
    own = place / "models--an--artifact" / "snapshots" / "0123abc"
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        link = own / file.relative_to(folder)
        blob = own.parents[1] / "blobs" / file.name
        for path in (link, blob):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    return own


def test_links_of_a_snapshot_into_its_own_blobs_are_fine(folder: Path, tmp_path: Path) -> None:
    own = snapshot(folder, tmp_path / "hub")
    assert check_files(own, read_manifest(own).files) == []


@pytest.mark.parametrize("name", ["unet/weights", "diffpress.json"])
def test_links_of_a_snapshot_into_another_repository_are_not(folder: Path, tmp_path: Path, name: str) -> None:
    own, other = (snapshot(folder, tmp_path / place) for place in ("hub", "other"))
    (own / name).unlink()
    (own / name).symlink_to((other / name).resolve())
    with pytest.raises(ArtifactError, match=f"'{name}' leaves the folder"):
        read_manifest(own)


@pytest.mark.parametrize("name", ["../secret", "unet/../../secret", "/etc/passwd", "unet/..", "a\0b"], ids=repr)
def test_paths_that_leave_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("x")
    with pytest.raises(ArtifactError, match="leaves the folder"):
        inside(folder, name)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    change(folder, files=files | {name: {"size_bytes": 1, "sha256": "0"}})
    with pytest.raises(ArtifactError, match="leaves the folder"):
        read_manifest(folder)


def test_links_that_leave_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes((folder / "unet" / "weights").read_bytes())
    (folder / "unet" / "weights").unlink()
    (folder / "unet" / "weights").symlink_to(outside)
    with pytest.raises(ArtifactError, match="'unet/weights' leaves the folder"):
        read_manifest(folder)


def test_a_folder_reached_through_a_link_is_fine(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    check_files(tmp_path / "link", read_manifest(tmp_path / "link").files)


def test_a_newer_schema_asks_for_an_update(folder: Path) -> None:
    change(folder, schema_version=SCHEMA + 1, something_new=1)
    with pytest.raises(ArtifactError, match=rf"schema {SCHEMA + 1}.*reads up to {SCHEMA}: update diffpress"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "text", ["{", "", "[]", "null", '{"files": {}}', '{"schema_version": "one"}', "\xff"], ids=repr
)
def test_a_damaged_manifest_is_named(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=f"{MANIFEST} is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("values", [{"surprise": 1}, {"edits": [{"kind": "drop"}]}, {"timesteps": "never"}])
def test_values_that_make_no_sense_are_damage(folder: Path, values: dict[str, object]) -> None:
    change(folder, **values)
    with pytest.raises(ArtifactError, match=next(iter(values))):
        read_manifest(folder)


def test_a_folder_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no artifact of diffpress"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting property name"),
        ("[]", "all of it: input should be a valid dictionary"),
        ('{"fingerprint": 3}', "fingerprint: input should be a valid string"),
    ],
)
def test_a_damaged_manifest_is_said_to_be_so_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError) as caught:
        read_manifest(tmp_path)
    assert f"{MANIFEST} is damaged: {words}" in str(caught.value)
    assert "\n" not in str(caught.value)
