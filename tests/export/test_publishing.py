"""Where results may go, and how they get there."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffpress.export.artifact import check_output, check_space, publish
from diffpress.export.errors import OutputError
from diffpress.export.manifest import MANIFEST


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """A finished folder beside where it shall be."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "new").write_text("new")
    return tmp_path / "work"


def test_publish_makes_parents_and_leaves_nothing_behind(staged: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    publish(staged, out)
    assert (out / "new").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


@pytest.mark.parametrize("older", ["folder", "empty", "file", "link"])
def test_publish_replaces_what_was_there(staged: Path, tmp_path: Path, older: str) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    if older == "file":
        out.write_text("old")
    elif older == "link":
        out.symlink_to(elsewhere, target_is_directory=True)
    else:
        out.mkdir()
    if older == "folder":
        (out / "old").write_text("old")
    publish(staged, out)
    assert [path.name for path in out.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]
    assert (elsewhere / "kept").exists()


def test_publish_goes_on_after_it_was_killed_between_its_renames(staged: Path, tmp_path: Path) -> None:
    (tmp_path / "work.replaced").mkdir()
    (tmp_path / "work.replaced" / "older").write_text("older")
    (tmp_path / "out").mkdir()
    publish(staged, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "out"]


def test_publish_that_fails_leaves_the_older_result(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "missing", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "out"]


def test_check_output_accepts_what_may_be_replaced(tmp_path: Path) -> None:
    check_output(tmp_path / "new", force=False)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", force=False)
    for name in (MANIFEST, "export.json"):
        ours = tmp_path / f"with {name}"
        ours.mkdir()
        (ours / name).write_text("{}")
        check_output(ours, force=False)


def test_check_output_refuses_what_is_not_ours_unless_forced(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("x")
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    for path, message in ((file, "is a file"), (folder, "was not written by diffpress")):
        with pytest.raises(OutputError, match=message):
            check_output(path, force=False)
        check_output(path, force=True)


def test_check_space_looks_at_the_nearest_folder_there_is(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OutputError, match=rf"{tmp_path} has .* MB free, but 1,000,000,000,000 MB are needed"):
        check_space(tmp_path / "not" / "yet", 10**18)
