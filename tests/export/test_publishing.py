"""Where results may go, and how they get there."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffpress.export import publishing
from diffpress.export.errors import OutputError
from diffpress.export.manifest import MANIFEST
from diffpress.export.outputs import check_output, check_output_file, check_space
from diffpress.export.publishing import locked, publish, replacing, staging


def write(folder: Path, *names: str) -> Path:
    """A folder with files that hold their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def contents(folder: Path) -> set[str]:
    """Everything below a folder, as paths."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """A finished folder beside where it shall be."""
    return write(tmp_path / "work", "new", "unet/new")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A function that mounts an empty disk at a folder; skips where that is not allowed."""
    places: list[Path] = []

    def mount(place: Path, *options: str) -> Path:
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", ",".join(["size=1m", *options]), "tmpfs", place]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a disk")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", place], check=True)


def test_publish_makes_parents_and_leaves_nothing_behind(staged: Path, tmp_path: Path) -> None:
    publish(staged, tmp_path / "deep" / "er" / "out")
    assert contents(tmp_path) == {
        "deep",
        "deep/er",
        *(f"deep/er/out{name}" for name in ("", "/new", "/unet", "/unet/new")),
    }


@pytest.mark.parametrize("older", ["folder", "empty", "file"])
def test_publish_replaces_what_was_there(staged: Path, tmp_path: Path, older: str) -> None:
    out = tmp_path / "out"
    if older == "file":
        out.write_text("old")
    else:
        out.mkdir()
    if older == "folder":
        write(out, "old", "unet/old")
    publish(staged, out)
    assert contents(tmp_path) == {"out", "out/new", "out/unet", "out/unet/new"}


def test_a_link_stays_one_and_its_target_is_replaced(staged: Path, tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere", MANIFEST)
    (tmp_path / "out").symlink_to(elsewhere, target_is_directory=True)
    place = check_output(tmp_path / "out", [], force=False)
    assert place == elsewhere
    publish(staged, place)
    assert (tmp_path / "out").is_symlink()
    assert contents(elsewhere) == {"new", "unet", "unet/new"}


def test_the_folder_that_one_is_in_is_kept_and_filled(
    staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "out", MANIFEST, "old")
    number = out.stat().st_ino
    monkeypatch.chdir(out)
    (out / MANIFEST).write_text('{"files": {"old": {}}}')
    place = check_output(Path(), [], force=False)
    publish(staged, place)
    assert contents(Path()) == {"new", "unet", "unet/new"}
    assert out.stat().st_ino == number
    assert contents(tmp_path) == {"out", "out/new", "out/unet", "out/unet/new"}


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_contents_are_swapped_where_the_folder_cannot_be_renamed(
    staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = write(tmp_path / "out", "old", "unet/old")
    _forbid_renaming(monkeypatch, out, number)
    publish(staged, out)
    assert contents(tmp_path) == {"out", "out/new", "out/unet", "out/unet/new"}


def _forbid_renaming(monkeypatch: pytest.MonkeyPatch, out: Path, number: int) -> None:
    """As at a mount point: nothing takes its place, nothing is renamed into it from outside."""
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if out in (Path(source), Path(target)) or (out in Path(target).parents and out not in Path(source).parents):
            raise OSError(number, os.strerror(number), str(source), None, str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(Path, "replace", lambda self, target: refuse(self, target))


def test_a_mounted_disk_is_filled(staged: Path, tmp_path: Path, mounted: Callable[..., Path]) -> None:
    out = mounted(tmp_path / "out")
    publish(staged, check_output(out, [], force=False))
    assert contents(out) == {"new", "unet", "unet/new"}
    publish(write(tmp_path / "work", "newer"), out)
    assert contents(tmp_path) == {"out", "out/newer"}
    assert out.is_mount()


def test_a_mounted_disk_that_is_too_small_keeps_what_it_has(tmp_path: Path, mounted: Callable[..., Path]) -> None:
    out = write(mounted(tmp_path / "out"), "old")
    staged = write(tmp_path / "work", "new")
    (staged / "large").write_bytes(bytes(2_000_000))
    with pytest.raises(shutil.Error, match="No space left"):
        publish(staged, out)
    assert contents(out) == {"old"}
    assert contents(staged) == {"new", "large"}


def test_a_disk_mounted_for_reading_is_refused_before_the_work(tmp_path: Path, mounted: Callable[..., Path]) -> None:
    out = mounted(tmp_path / "disk", "ro")
    for place in (out, out / "deep" / "er"):
        with pytest.raises(OutputError, match=r"cannot be written: Read-only file system.*name another place"):
            check_output(place, [], force=False)
    with pytest.raises(OutputError, match=r"Read-only file system"):
        check_output_file(out / "a.png", [])


def test_a_folder_that_nobody_may_change_is_refused_before_the_work(tmp_path: Path) -> None:
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    change = shutil.which("chattr")
    if change is None or subprocess.run([change, "+i", fixed], capture_output=True, check=False).returncode:
        pytest.skip("this user, or this disk, knows no attributes")
    try:
        for place in (fixed, fixed / "out"):
            with pytest.raises(OutputError, match=r"cannot be written: Operation not permitted"):
                check_output(place, [], force=False)
    finally:
        subprocess.run([change, "-i", fixed], check=True)


@pytest.mark.parametrize("moves", range(1, 7))
def test_a_swap_that_fails_leaves_all_as_it_was(
    staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """Six renames: two old entries aside, the word that they are, two new ones in; then nothing can fail any more."""
    out = write(tmp_path / "out", "old", "unet/old")
    _break_renaming(monkeypatch, out, moves, OSError(errno.EIO, "I/O error"))
    if moves == 6:
        publish(staged, out)
        return
    with pytest.raises(OSError, match="I/O error"):
        publish(staged, out)
    assert contents(out) == {"old", "unet", "unet/old"}
    assert (out / "unet" / "old").read_text() == "unet/old"


def _break_renaming(monkeypatch: pytest.MonkeyPatch, out: Path, moves: int, error: BaseException) -> None:
    """The folder cannot be renamed, and the rename number `moves` inside it raises."""
    _forbid_renaming(monkeypatch, out, errno.EBUSY)
    replace, count = Path.replace, 0

    def breaking(source: Path, target: Path) -> None:
        nonlocal count
        count += out in source.parents
        if count == moves and out in source.parents:
            raise error
        replace(source, target)

    monkeypatch.setattr(Path, "replace", breaking)


@pytest.mark.parametrize("moves", range(1, 6))
def test_a_swap_that_was_killed_is_put_right_by_the_next_check(
    staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    class Killed(BaseException):
        pass

    out = write(tmp_path / "out", MANIFEST, "old")
    (out / MANIFEST).write_text('{"files": {"old": {}}}')
    write(staged, MANIFEST).joinpath(MANIFEST).write_text('{"files": {"new": {}, "unet/new": {}}}')
    with monkeypatch.context() as patch:
        _break_renaming(patch, out, moves, Killed())
        with pytest.raises(Killed):
            publish(staged, out)
    check_output(out, [], force=False)
    # The third is the word that all old ones are aside.
    assert contents(out) == ({MANIFEST, "old"} if moves <= 3 else {MANIFEST, "new", "unet", "unet/new"})


def test_what_was_put_aside_comes_back_where_a_run_was_killed_between_its_renames(tmp_path: Path) -> None:
    write(tmp_path / f".out{publishing.REPLACED}", MANIFEST)
    check_output(tmp_path / "out", [], force=False)
    assert contents(tmp_path) == {"out", f"out/{MANIFEST}"}


def test_publish_that_fails_leaves_the_older_result(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "missing", tmp_path / "out")
    assert contents(tmp_path) == {"out", "out/old"}


def test_a_staging_folder_is_gone_afterwards_and_open_to_others(tmp_path: Path) -> None:
    with staging(tmp_path / "out") as staged:
        (tmp_path / "usual").mkdir()
        assert staged.stat().st_mode == (tmp_path / "usual").stat().st_mode
        with pytest.raises(OutputError, match="another diffpress is writing"), locked(tmp_path / "out"):
            pass
        publish(staged, tmp_path / "out")
    assert contents(tmp_path) == {"out", "usual"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = write(tmp_path, "a.png") / "a.png"

    def write_half() -> None:
        with replacing(file) as path:
            path.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert file.read_text() == "a.png"
    with replacing(file) as path:
        assert path.suffix == ".png"
        path.write_text("whole")
    assert file.read_text() == "whole"
    assert contents(tmp_path) == {"a.png"}


def test_check_output_accepts_what_may_be_replaced(tmp_path: Path) -> None:
    assert check_output(tmp_path / "deep" / "new", [], force=False) == tmp_path / "deep" / "new"
    assert contents(tmp_path) == set()
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", [], force=False)
    for name in (MANIFEST, "export.json"):
        ours = write(tmp_path / f"with {name}", name)
        check_output(ours, [], force=False)


def test_check_output_refuses_what_is_not_ours_unless_forced(tmp_path: Path) -> None:
    file, folder = write(tmp_path, "file") / "file", write(tmp_path / "folder", "thesis.tex")
    added = write(tmp_path / "artifact", MANIFEST, "old", "notes/thesis.tex")
    (added / MANIFEST).write_text('{"files": {"old": {}}}')
    for path, message in (
        (file, "is a file"),
        (folder, "was not written by diffpress"),
        (added, r"holds notes/thesis\.tex, which was not written by diffpress"),
    ):
        with pytest.raises(OutputError, match=message):
            check_output(path, [], force=False)
        check_output(path, [], force=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(("out", "relation"), [("model", "is"), ("model/unet/out", "lies in"), (".", "holds")])
def test_a_result_never_takes_the_place_of_its_source(
    tmp_path: Path, out: str, relation: str, linked: bool, force: bool
) -> None:
    model = write(tmp_path / "disk" / "model", MANIFEST, "unet/weights")
    place = model.parent / out
    if linked:
        (tmp_path / "link").symlink_to(model.parent, target_is_directory=True)
        place = tmp_path / "link" / out
    with pytest.raises(OutputError, match=f"{relation} the input"):
        check_output(place, [model], force)


def test_a_part_that_the_source_links_to_counts_as_the_source(tmp_path: Path) -> None:
    unet, model = write(tmp_path / "unet", MANIFEST), write(tmp_path / "model", "model_index.json")
    (model / "unet").symlink_to(unet, target_is_directory=True)
    with pytest.raises(OutputError, match="is the input"):
        check_output(unet, [model], force=True)


def test_a_source_that_is_mounted_twice_is_one(tmp_path: Path, mounted: Callable[..., Path]) -> None:
    disk, again = mounted(tmp_path / "disk"), tmp_path / "again"
    model = write(disk / "model", MANIFEST)
    again.mkdir()
    subprocess.run(["mount", "--bind", disk, again], check=True)
    try:
        with pytest.raises(OutputError, match="is the input"):
            check_output(again / "model", [model], force=True)
    finally:
        subprocess.run(["umount", again], check=True)


def test_dangling_and_circling_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for place in ("out", "out/deeper", "circle"):
        with pytest.raises(OutputError, match=r"is a link to .*, which does not exist"):
            check_output(tmp_path / place, [], force=True)
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("file/out", r"file is a file. Move it away"), ("x" * 250, "File name too long.*shorter name")],
)
def test_a_place_that_cannot_be_made_is_refused(tmp_path: Path, name: str, message: str) -> None:
    write(tmp_path, "file")
    with pytest.raises(OutputError, match=message):
        check_output(tmp_path / name, [], force=False)
    assert contents(tmp_path) == {"file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        check_output(tmp_path / "out", [], force=False)
    tmp_path.chmod(0o700)


def test_the_root_is_refused() -> None:
    with pytest.raises(OutputError, match="is the root of the file system"):
        check_output(Path("/"), [], force=True)


def test_files_go_where_files_can(tmp_path: Path) -> None:
    artifact = write(tmp_path / "artifact", MANIFEST)
    check_output_file(write(tmp_path, "a.png") / "a.png", [])
    for place, message in (
        (tmp_path, "is a folder"),
        (Path("/dev/null"), "is a device"),
        (artifact / "a.png", "would not verify any more"),
    ):
        with pytest.raises(OutputError, match=message):
            check_output_file(place, [])


def test_check_space_looks_at_the_nearest_folder_there_is(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OutputError, match=rf"{tmp_path} has .* MB free, but 1,000,000,000,000 MB are needed"):
        check_space(tmp_path / "not" / "yet", 10**18)


def test_check_space_looks_beside_a_mounted_disk_too(tmp_path: Path, mounted: Callable[..., Path]) -> None:
    out = mounted(tmp_path / "out")
    with pytest.raises(OutputError, match=f"{out} has"):
        check_space(out, 10_000_000)
