"""Ctrl-C and SIGTERM: one message, the status that shells expect, and what is done so far kept."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffpress import flow
from diffpress.stopping import Stopped, stoppable


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stopped_compress_says_how_it_goes_on_and_does(
    number: signal.Signals,
    diffpress: Callable[..., Any],
    digests: Callable[[Path], dict[str, str]],
    tiny_pixels: Path,
    quick_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("compress", tiny_pixels, "--recipe", quick_recipe, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(flow, "run_stages", lambda *_, **__: os.kill(os.getpid(), number))
        found = diffpress(*command)
    errors = " ".join(found.errors.split())
    assert (found.status, found.output) == (128 + number, "")
    work = tmp_path / ".out.diffpress-work"
    assert f"diffpress: stopped by {number.name}. What is done so far is kept in {work}" in errors
    assert "give the same command again to go on, or with --fresh" in errors
    assert "Traceback" not in errors
    assert list((work / "recorded").iterdir())
    assert not (tmp_path / "out").exists()


def test_before_there_is_anything_to_keep_nothing_is_promised(
    diffpress: Callable[..., Any], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("diffpress.recipe.presets", lambda: os.kill(os.getpid(), signal.SIGINT))
    found = diffpress("recipes")
    assert (found.status, " ".join(found.errors.split())) == (130, "diffpress: stopped by SIGINT.")


def test_what_signals_did_before_they_do_again() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_leave_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
