"""Times of layers: measured once a machine, and kept where that is possible."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffpress.export.edits import Pack
from diffpress.export.runtime import LayerForm, Times, times

# Before a fixture of the session puts another in its place.
from diffpress.export.runtime.times import cache_file, layer_times, machine_key, time_form

FORMS = [
    LayerForm(Pack(component="", module="", weight_bits=8, activation_bits=8), (rows, 4), 4, torch.float32)
    for rows in (1, 4)
]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[LayerForm]:
    """The forms that were timed, in a process that has a cache folder of its own and knows nothing yet."""
    found: list[LayerForm] = []

    def time_form(form: LayerForm, _device: torch.device) -> Times:
        found.append(form)
        return Times(1.0 + form.shape[0], 2.0)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(times, "time_form", time_form)
    times._known.cache_clear()
    return found


def another_process() -> None:
    times._known.cache_clear()


def test_each_form_is_timed_once(timed: list[LayerForm]) -> None:
    expected = {form: Times(1.0 + form.shape[0], 2.0) for form in FORMS}
    assert layer_times(FORMS[:1]) == {FORMS[0]: expected[FORMS[0]]}
    assert layer_times([*FORMS, *FORMS]) == expected
    another_process()
    assert layer_times(FORMS) == expected
    assert timed == FORMS


def test_other_threads_and_kernels_have_times_of_their_own(
    timed: list[LayerForm], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernels in ("reference", ""):
        monkeypatch.setenv("DIFFPRESS_KERNELS", kernels)
        for threads in (1, 2):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            layer_times(FORMS[:1])
    assert timed == 4 * FORMS[:1]
    file = cache_file()
    assert file is not None
    assert len(json.loads(file.read_text())) == 4


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '{"MACHINE": 1}', '{"MACHINE": {"FORM": [1]}}', '{"MACHINE": {"FORM": [1, "x"]}}',
     '{"MACHINE": {"FORM": [NaN, 1]}}', '{"MACHINE": {"FORM": [0, 1]}}', '{"MACHINE": {"FORM": null}}', "\xff"],
    ids=repr,
)  # fmt: skip
def test_a_corrupt_file_is_ignored_and_written_anew(timed: list[LayerForm], text: str) -> None:
    file = cache_file()
    assert file is not None
    file.parent.mkdir()
    file.write_text(text.replace("MACHINE", machine_key()).replace("FORM", FORMS[0].key()), encoding="latin-1")
    assert layer_times(FORMS[:1]) == {FORMS[0]: Times(2.0, 2.0)}
    another_process()
    layer_times(FORMS[:1])
    assert timed == FORMS[:1]


def test_where_nothing_can_be_kept_it_is_measured_again(
    timed: list[LayerForm], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file where the folder should be: root may write to folders that are for reading only."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        layer_times(FORMS)
    another_process()
    layer_times(FORMS)
    assert timed == 2 * FORMS


def test_without_a_home_nothing_is_kept(timed: list[LayerForm], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache_file() is None
    layer_times(FORMS)
    assert timed == FORMS
    for folder in ("", "here"):
        monkeypatch.setattr(Path, "home", lambda folder=folder: Path(folder))
        assert cache_file() is None


@pytest.mark.parametrize(
    ("shape", "geometry"),
    [((16, 8), ()), ((2, 8, 4, 4), ((3, 3), (2, 2), (1, 1), (1, 1)))],
    ids=["linear", "conv2d"],
)
@pytest.mark.parametrize(
    "bits",
    [
        {"weight_bits": 4, "activation_bits": 8, "asymmetric": True},
        {"weight_bits": 8, "activation_bits": 8, "float8": True},
        {"weight_bits": 3, "activation_bits": None, "group_size": 4},
    ],
    ids=["W4A8", "FP8", "W3"],
)
def test_every_format_can_be_timed(
    bits: dict[str, int],
    shape: tuple[int, ...],
    geometry: tuple[tuple[int, ...], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """How long it takes is the machine's business; that it leaves what torch draws next alone is ours."""
    monkeypatch.setattr(times, "SECONDS", 0)
    edit = Pack.model_validate({"component": "", "module": "", **bits})
    before = torch.get_rng_state()
    found = time_form(LayerForm(edit, shape, 8, torch.float32, geometry))
    assert min(found) > 0
    assert torch.equal(torch.get_rng_state(), before)
